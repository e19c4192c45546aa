"""What convert() and calibration are given in place of what they want, and networks in wrappers."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.optim.swa_utils import AveragedModel

import stdb
from tests.stdb.support import batch, small_cnn

IMAGES = batch()


class Written(nn.Module):
    """A forward method that is a function of (module, x)."""

    def __init__(self, forward):
        super().__init__()
        torch.manual_seed(0)
        self.written = forward
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.one, self.last = nn.Conv2d(3, 1, 3, padding=1), nn.Conv2d(6, 5, 1)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 5)
        self.logit = nn.Linear(6, 1)
        self.eval()

    def forward(self, x):
        return self.written(self, x)


@pytest.mark.parametrize("wrap", [AveragedModel, fx.symbolic_trace, nn.DataParallel])
@pytest.mark.parametrize("example", [None, IMAGES], ids=["blind", "example"])
def test_a_network_is_found_in_its_wrapper(wrap, example):
    """The average of weights, a traced module: converted like what they are of."""
    found = stdb.convert(wrap(small_cnn()), stdb.DirectEncoder(), example=example)
    plain = stdb.convert(small_cnn(), stdb.DirectEncoder())
    assert torch.equal(found(IMAGES, 4), plain(IMAGES, 4))


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.last(m.pool(F.relu(m.first(x)))).squeeze(),
        lambda m, x: m.last(m.pool(F.relu(m.first(x)))).squeeze(-1).squeeze(2),
        lambda m, x: m.head(m.pool(F.relu(m.first(x))).squeeze()),
    ],
)
@pytest.mark.parametrize("example", [None, IMAGES], ids=["blind", "example"])
def test_squeezed_logits_are_flat(forward, example):
    """(B, classes), as the ANN's, and decided as by the ANN in the long run."""
    ann = Written(forward)
    snn = stdb.convert(ann, stdb.DirectEncoder(), example=example).eval()
    stdb.balance_thresholds(snn, IMAGES, 64, bias_correction=False)
    with torch.no_grad():
        logits, expected = snn(IMAGES, 512) / 512, ann(IMAGES)
    assert logits.shape == expected.shape == (6, 5)
    assert (logits - expected).abs().max() < 0.02 * expected.abs().max()
    assert stdb.decide(snn, IMAGES, 4).final.shape == (6, 5)


FLAT = "allowed: all but the batch flat"
REFUSED = {
    "one logit, squeezed": (lambda m, x: m.logit(pooled(m, x)).squeeze(1), FLAT),
    "one logit, viewed": (lambda m, x: m.logit(pooled(m, x)).view(-1), FLAT),
    "mean of all": (
        lambda m, x: F.relu(m.first(x)).mean((1, 2, 3)).unsqueeze(1),
        "mean .*allowed: the mean of height and width",
    ),
    "a sum of two shapes": (
        lambda m, x: m.head(m.pool(F.relu(m.first(x) + m.one(x))).flatten(1)),
        r"adds \(B, 6, .*\) and \(B, 1, .*\); allowed: branches of one shape",
    ),
    "a context": (
        lambda m, x: pooled(m, (lambda y: y + y.mean((2, 3), keepdim=True))(x)),
        r"adds \(B, 3, .*\) and \(B, 3, 1, 1\); allowed: branches of one shape",
    ),
    "a constant tensor": (
        lambda m, x: pooled(m, x * torch.tensor(2.0)),
        "_tensor_constant0 is a constant tensor used outside a layer; allowed: numbers",
    ),
    "softmax over the batch": (
        lambda m, x: m.head(pooled(m, x)).softmax(0),
        "softmax over the batch; allowed: dim=1",
    ),
}


def pooled(m, x):
    return m.pool(F.relu(m.first(x))).flatten(1)


@pytest.mark.parametrize("form", REFUSED, ids=lambda form: form.replace(" ", "-"))
def test_a_form_that_a_spike_cannot_take_is_refused_by_name(form):
    forward, told = REFUSED[form]
    with pytest.raises(stdb.ConversionError, match=told):
        stdb.convert(Written(forward), stdb.DirectEncoder())


def test_a_tensor_of_the_forward_method_is_asked_for_as_a_buffer():
    """An example does not help, and is not asked for where it is given."""
    ann = Written(lambda m, x: m.head(pooled(m, x - torch.ones(3).view(1, 3, 1, 1))))
    with pytest.raises(stdb.ConversionError, match=r"as buffers, register_buffer\(\)") as told:
        stdb.convert(ann, stdb.DirectEncoder(), example=IMAGES)
    assert "example=" not in str(told.value)


@pytest.mark.parametrize("encoder", ["direct", None, stdb.DirectEncoder], ids=str)
def test_an_encoder_is_asked_for(encoder):
    with pytest.raises(ValueError, match=r"^encoder is .*; allowed: DirectEncoder\(\), "):
        stdb.convert(small_cnn(), encoder)


@pytest.mark.parametrize("surrogate", ["linear", None, stdb.Linear], ids=str)
def test_a_surrogate_is_asked_for(surrogate):
    with pytest.raises(ValueError, match=r"^surrogate is .*; allowed: STDB\(\), "):
        stdb.convert(small_cnn(), stdb.DirectEncoder(), surrogate)


@pytest.mark.parametrize(
    ("example", "told"),
    [
        ([IMAGES], "example is a list;"),
        ({"image": IMAGES}, "example is a dict;"),
        (IMAGES[:0], r"example is a Tensor of \(0, 3, 12, 12\);"),
        (torch.tensor(1.0), r"example is a Tensor of \(\);"),
    ],
)
def test_an_example_is_a_batch_of_images(example, told):
    with pytest.raises(stdb.ConversionError, match=told + " allowed: images as one tensor"):
        stdb.convert(small_cnn(), stdb.DirectEncoder(), example=example)


def test_an_exported_program_is_asked_for_as_what_it_was_exported_from():
    program = torch.export.export(small_cnn(), (IMAGES,))
    with pytest.raises(
        stdb.ConversionError, match=r"ann is a ExportedProgram; allowed: an nn.Module"
    ):
        stdb.convert(program, stdb.DirectEncoder())
    with pytest.raises(stdb.ConversionError, match=r"layer 0 is a bare nn.Module, as .* exported"):
        stdb.convert(program.module(), stdb.DirectEncoder())


@pytest.mark.parametrize("value", [float("nan"), -3.0])
def test_statistics_that_are_none_are_named(value):
    """Before they are folded into the weights of another layer."""
    ann = small_cnn()
    ann[1].running_var[0] = value
    with pytest.raises(stdb.ConversionError, match=r"^1.running_var holds NaN, or less than 0"):
        stdb.convert(ann, stdb.DirectEncoder())


@pytest.mark.parametrize("method", ["mse", "maximum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_images_of_any_real_type_calibrate(method, dtype):
    """In the type of the weights, whatever the method."""
    rounded = IMAGES.to(torch.bfloat16)
    found = []
    for images in (rounded.to(dtype), rounded.float()):
        snn = stdb.convert(small_cnn(), stdb.DirectEncoder())
        found.append(stdb.balance_thresholds(snn, images, 8, method=method))
    assert found[0] == found[1]


@pytest.mark.parametrize("method", ["mse", "maximum"])
@pytest.mark.parametrize("images", [(IMAGES * 127).byte(), IMAGES[0]], ids=["bytes", "an image"])
def test_what_is_no_batch_of_images_does_not_calibrate(method, images):
    snn = stdb.convert(small_cnn(), stdb.DirectEncoder())
    with pytest.raises(ValueError, match=r"^images are .*; allowed: a floating-point batch"):
        stdb.balance_thresholds(snn, images, 8, method=method)
