"""torchvision's networks by name, and the weights that are published for them."""

import re

import pytest
import torch
from torch import nn
from torchvision import models

import stdb
from pipeline import train_ann
from pipeline.data import Split
from pipeline.errors import ParamsError, StageError
from pipeline.learning import published
from pipeline.learning.networks import build_ann, load_given
from pipeline.params import load_params
from tests.pipeline.support import NETWORK, PARAMS, ROOT, KeptWorker


def network(name: str):
    return NETWORK.model_copy(update={"architecture": f"torchvision:{name}"})


def images(channels=3, size=32, classes=4, count=8) -> Split:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(
        0, 256, (count, channels, size, size), generator=generator, dtype=torch.uint8
    )
    labels = torch.arange(count) % classes
    return Split(pixels, labels, torch.arange(count), [str(k) for k in range(classes)])


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("resnet19", "torchvision:resnet18, "),
        ("vgg16bn", "torchvision:vgg16_bn, "),
        ("", "and 77 other names of torchvision.models"),
        ("x" * 5000, "torchvision:resnet18, torchvision:vgg16_bn, torchvision:mobilenet_v2 and "),
        ("fcn_resnet50", "torchvision:"),
    ],
)
def test_unknown_names_are_refused_with_close_ones(tmp_path, name, allowed):
    """Before anything is built; networks that do not classify are none of them."""
    path = tmp_path / "params.yaml"
    text = (ROOT / "params.yaml").read_text()
    path.write_text(text.replace("architecture: resnet12", f"architecture: 'torchvision:{name}'"))
    with pytest.raises(ParamsError, match=r"network\.architecture is 'torchvision:") as caught:
        load_params(path)
    assert allowed in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_known_name_is_allowed_and_built(tmp_path):
    """With a logit for each class, and weights by torch's generator."""
    path = tmp_path / "params.yaml"
    text = (ROOT / "params.yaml").read_text()
    path.write_text(text.replace("architecture: resnet12", "architecture: torchvision:resnet18"))
    params = load_params(path).network
    torch.manual_seed(5)
    ann = build_ann(params, images())
    torch.manual_seed(5)
    expected = models.resnet18(weights=None, num_classes=4)
    assert type(ann) is models.ResNet
    for name, value in expected.state_dict().items():
        assert torch.equal(ann.state_dict()[name], value)


@pytest.mark.parametrize(
    ("name", "head"),
    [("resnet18", "fc"), ("squeezenet1_1", "classifier.1"), ("mnasnet0_5", "classifier.1"),
     ("googlenet", "fc")],
)  # fmt: skip
def test_the_head_is_the_layer_that_gives_the_classes(name, head):
    """A linear layer, or SqueezeNet's convolution; no network has a second one beside it."""
    with torch.device("meta"):
        built = published.build(f"torchvision:{name}", 7)
    assert published.head(built) == head
    assert len(built.get_submodule(head).weight) == 7
    assert not any(n.startswith(("aux", "AuxLogits.")) for n in built.state_dict())


def test_grey_images_are_refused():
    """In plainer words than a convolution's."""
    with pytest.raises(StageError, match=r"torchvision:resnet18, which takes images of 3 channels"):
        build_ann(network("resnet18"), images(channels=1))


def test_too_small_images_are_refused_with_torchs_words():
    """As a network of one's own is."""
    with pytest.raises(StageError, match=r"torchvision:alexnet, whose network is given images of"):
        build_ann(network("alexnet"), images(size=8))


def saved(tmp_path, ann, change=lambda state: state):
    """A file of torch.save, as it is published."""
    path = tmp_path / "weights.pth"
    torch.save(change(dict(ann.state_dict())), path)
    return path


def test_published_weights_are_loaded_without_counts_of_batches(tmp_path):
    """Which torchvision's files lack; the network's own stay."""
    torch.manual_seed(1)
    theirs = models.resnet18(weights=None, num_classes=4)
    without = saved(tmp_path, theirs, lambda s: {n: t for n, t in s.items() if "tracked" not in n})
    ann = build_ann(network("resnet18"), images())
    assert load_given(ann, network("resnet18"), without) is None
    for name, value in theirs.state_dict().items():
        assert torch.equal(ann.state_dict()[name], value), name


def test_another_number_of_classes_leaves_the_head_as_it_was_drawn(tmp_path):
    """All else is the file's; another difference is still refused."""
    torch.manual_seed(1)
    theirs = models.resnet18(weights=None, num_classes=10)
    ann = build_ann(network("resnet18"), images())
    head = ann.fc.weight.detach().clone()
    assert load_given(ann, network("resnet18"), saved(tmp_path, theirs)) == 10
    assert torch.equal(ann.fc.weight, head)
    assert torch.equal(ann.layer4[1].conv2.weight, theirs.layer4[1].conv2.weight)
    other = saved(tmp_path, models.squeezenet1_1(weights=None))
    with pytest.raises(stdb.WeightsError, match="belong to another network"):
        load_given(ann, network("resnet18"), other)
    own = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    with pytest.raises(stdb.WeightsError, match="belong to another network"):
        load_given(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)), NETWORK,
                   saved(tmp_path, own))  # fmt: skip


def test_names_of_older_files_are_those_of_today(tmp_path):
    """DenseNet's norm.1, and GoogLeNet's classifiers that only its training needs."""
    dense = models.densenet121(weights=None, num_classes=4)
    old = r"(denselayer\d+\.(?:norm|conv))([12]\.)"
    path = saved(tmp_path, dense, lambda s: {re.sub(old, r"\1.\2", n): t for n, t in s.items()})
    ann = build_ann(network("densenet121"), images())
    load_given(ann, network("densenet121"), path)
    name = "features.denseblock1.denselayer1.norm1.weight"
    assert torch.equal(ann.get_parameter(name), dense.get_parameter(name))
    theirs = models.googlenet(weights=None, num_classes=4, init_weights=False)
    assert any(n.startswith("aux1.") for n in theirs.state_dict())
    ann = build_ann(network("googlenet"), images())
    load_given(ann, network("googlenet"), saved(tmp_path, theirs))
    assert torch.equal(ann.fc.weight, theirs.fc.weight)


@pytest.mark.parametrize(("classes", "epochs"), [(4, 0), (10, 1)])
def test_other_classes_are_learned_from_the_files_weights(
    tmp_path, monkeypatch, capsys, classes, epochs
):
    """Where the head fits, nothing is trained; where it does not, that is said in one line."""
    name = "torchvision:squeezenet1_1"
    theirs = models.squeezenet1_1(weights=None, num_classes=classes)
    path = saved(tmp_path, theirs)
    ann = PARAMS.train_ann.model_copy(
        update={"weights": str(path), "epochs": 1, "batch_size": 8, "learning_rate": 1e-4}
    )
    sections = {"network": network("squeezenet1_1"), "train_ann": ann}
    worker = KeptWorker(PARAMS.model_copy(update=sections), tmp_path)
    monkeypatch.setattr(worker, "split", lambda _: images())
    train_ann.train_loop(worker)
    state = worker.states[-1]
    assert len(state["history"]) == epochs
    lines = [line for line in capsys.readouterr().out.splitlines() if "is new" in line]
    expected = (
        f"[work] {path} is for 10 classes, the images have 4: layer classifier.1 is new, and the "
        "training begins from the others' weights"
    )
    assert lines == ([expected] if epochs else [])
    first = "features.0.weight"
    assert torch.allclose(state["best_network"][first], theirs.state_dict()[first], atol=1e-2)
    assert name == worker.params.network.architecture
