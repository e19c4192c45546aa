"""What becomes of images before a network sees them: the same in training, predict and serving."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

import stdb
from pipeline.data import DataError, Files, Split, load_split, save_split
from pipeline.data.images import array_to_size
from pipeline.data.sources import read_source
from pipeline.finetune_stdb import write_network
from pipeline.learning.networks import build_ann, build_snn, example_of, recipe
from pipeline.params import DataParams
from pipeline.prepare_data import split
from stdb import Preparation, preparation_of, read_image, to_size
from tests.pipeline.support import NETWORK, PARAMS, STDB

OWN = {"mean": [0.4], "std": [0.3]}
COLOUR = [None, *stdb.NORMALISATIONS, {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.25, 1]}]
SIZES = [(8, None), ([6, 10], None), (8, 9), ([10, 6], 12)]  # image_size, resize


def data(**changes) -> DataParams:
    return DataParams.model_validate(PARAMS.data.model_dump() | changes)


def strangers(folder, count=4) -> list:
    """Images of every kind and several sizes, as people have them."""
    draw, files = np.random.default_rng(0), []
    for k, mode in enumerate(("L", "RGB", "RGBA", "P", "LA", "I;16", "1", "CMYK")):
        for i in range(count):
            size = (draw.integers(7, 40), draw.integers(7, 40), {"RGB": 3, "RGBA": 4}.get(mode, 1))
            if mode == "I;16":
                image = Image.fromarray(draw.integers(0, 65536, size[:2], np.uint16))
            elif mode in ("RGB", "RGBA"):
                image = Image.fromarray(draw.integers(0, 256, size, np.uint8))
            else:
                colours = Image.fromarray(draw.integers(0, 256, (*size[:2], 3), np.uint8))
                image = (
                    colours.convert("L").convert("LA") if mode == "LA" else colours.convert(mode)
                )
            files.append(folder / "cd"[k % 2] / f"{k}-{i}.{'tif' if mode == 'CMYK' else 'png'}")
            files[-1].parent.mkdir(parents=True, exist_ok=True)
            image.save(files[-1])
    return files


def saved(parts, path, stdb_params=STDB, surrogate=stdb.STDB()):  # noqa: B008 (frozen)
    """The file that a fine-tuning on this data writes."""
    params = PARAMS.model_copy(update={"network": NETWORK, "stdb": stdb_params})
    channels, height, width = parts["train"].shape
    torch.manual_seed(0)  # of others the neurons may be silent
    classes = len(parts["train"].classes)
    ann = torch.nn.Sequential(
        torch.nn.Conv2d(channels, 2, 3, bias=False), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(2 * (height - 2) * (width - 2), classes, bias=False),
    )  # fmt: skip
    example = torch.zeros(1, channels, height, width)
    snn = stdb.convert(ann, stdb.DirectEncoder(), surrogate, example=example)
    write_network(snn, params, parts["train"], path, STDB.timesteps)
    return snn


def test_a_file_has_the_surrogate_that_was_learned_with(tmp_path):
    """Not that it was left open; what was not left open stays as it was said."""
    strangers(tmp_path / "images", count=2)
    params = data(source="folder", path=str(tmp_path / "images"), image_size=4)
    parts = split(params, *read_source(params))
    saved(parts, tmp_path / "said")
    open_ = {"surrogate": "auto", "alpha": None, "beta": None, "over_threshold": None}
    few = STDB.model_copy(update=open_ | {"timesteps": 4})
    saved(parts, tmp_path / "auto", few, stdb.surrogate_of("auto", 4))
    kept = {name: stdb.load(tmp_path / name)[1]["stdb"] for name in ("said", "auto")}
    assert kept["said"]["surrogate"] == "stdb"
    wanted = {"surrogate": "rectangle", "alpha": 1.0, "beta": 1.0, "over_threshold": True}
    assert {name: kept["auto"][name] for name in wanted} == wanted


@pytest.mark.parametrize(("size", "resize"), SIZES)
@pytest.mark.parametrize("normalise", [*COLOUR, OWN], ids=str)
def test_predict_sees_what_training_saw(tmp_path, size, resize, normalise):
    """Bit for bit, of any image, in memory and streamed, through the network's file."""
    strangers(tmp_path / "images", count=2)
    changes = {"image_size": size, "resize": resize, "normalise": normalise}
    changes |= {"source": "folder", "path": str(tmp_path / "images"), "grayscale": normalise == OWN}
    memory, streamed = (
        (params := data(**changes, stream=stream), split(params, *read_source(params)))[1]
        for stream in (False, True)
    )
    saved(memory, tmp_path / "snn")
    classifier = stdb.Classifier(tmp_path / "snn", "cpu")
    for name, part in streamed.items():
        assert isinstance(part, Files)
        path = tmp_path / "data" / "prepared" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_split(part, path)
        again = load_split(path).take(torch.arange(len(part))).pixels()
        assert torch.equal(classifier.read(part.names), again)
        assert torch.equal(memory[name].pixels(), again)
    shape = tuple(size) if isinstance(size, list) else (size, size)
    assert again.shape[1:] == (1 if normalise == OWN else 3, *shape)
    expected = stdb.NORMALISATIONS.get(normalise, None) if isinstance(normalise, str) else None
    expected = expected or stdb.normalisation_of(normalise)
    assert classifier.shape == again.shape[1:]
    assert classifier.preparation == Preparation(resize, expected)


@pytest.mark.parametrize("normalise", [None, OWN], ids=str)
@pytest.mark.parametrize(("size", "resize"), SIZES)
def test_predict_sees_what_training_saw_of_other_sources(tmp_path, size, resize, normalise):
    """An image of the digits as a file."""
    params = data(image_size=size, resize=resize, normalise=normalise, train_limit=60)
    parts = split(params, *read_source(params))
    saved(parts, tmp_path / "snn")
    classifier = stdb.Classifier(tmp_path / "snn", "cpu")
    (images, _), _, _ = read_source(params)
    ids = parts["train"].ids[:5]
    for i in ids:
        Image.fromarray(images[i, 0]).save(tmp_path / f"{i}.png")
    pixels = classifier.read([tmp_path / f"{i}.png" for i in ids])
    assert torch.equal(pixels, parts["train"].pixels()[:5])


@pytest.mark.parametrize("normalise", COLOUR, ids=str)
def test_serving_sees_what_training_saw(tmp_path, normalise):
    """The model that MLflow loads, of uint8 images."""
    from pipeline.tracking.served_model import SpikingClassifier

    strangers(tmp_path / "images", count=2)
    params = data(
        source="folder", path=str(tmp_path / "images"), image_size=[6, 10], normalise=normalise
    )
    parts = split(params, *read_source(params))
    snn = saved(parts, tmp_path / "snn")
    model = SpikingClassifier()
    model.load_context(SimpleNamespace(artifacts={"network": tmp_path / "snn"}))
    images = parts["train"]
    with torch.no_grad():
        expected = snn.eval()(images.pixels(), STDB.timesteps).softmax(1)
    found = model.predict(None, images.images.numpy())
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)
    assert np.ptp(found, axis=0).max() > 1e-4


@pytest.mark.parametrize(("wide", "high"), [(40, 30), (31, 44), (33, 33), (18, 90)])
@pytest.mark.parametrize("crop", [(16, 16), (11, 18), (18, 7)])
def test_resize_is_torchvisions(wide, high, crop):
    """As their published weights were evaluated, to the last bit."""
    pixels = np.random.default_rng(wide).integers(0, 256, (high, wide, 3), np.uint8)
    image = Image.fromarray(pixels)
    named = stdb.NORMALISATIONS["imagenet"]
    theirs = transforms.Compose([
        transforms.Resize(18), transforms.CenterCrop(crop), transforms.ToTensor(),
        transforms.Normalize(named.mean, named.std),
    ])(image)  # fmt: skip
    ours = torch.from_numpy(np.asarray(to_size(image, crop, 18)).transpose(2, 0, 1).copy())
    assert torch.equal(named(ours[None])[0], theirs)


def test_without_resize_it_is_the_largest_middle():
    """Of the shape that is wanted; nothing is resampled where it has the size."""
    pixels = np.arange(12 * 20, dtype=np.uint8).reshape(12, 20)
    image = Image.fromarray(pixels)
    for size, rows, columns in (
        ((12, 12), slice(0, 12), slice(4, 16)),
        ((12, 6), slice(0, 12), slice(7, 13)),
        ((5, 20), slice(3, 8), slice(0, 20)),
        ((12, 20), slice(0, 12), slice(0, 20)),
    ):
        assert np.array_equal(to_size(image, size, None), pixels[rows, columns])
    flat = Image.new("L", (40, 10), 77)
    for size in ((1, 64), (64, 1), (3, 7)):
        assert np.array_equal(to_size(flat, size, None), np.full(size, 77))


def test_what_is_too_narrow_to_be_resized_is_refused(tmp_path):
    """It would take gigabytes; without resize its middle is small."""
    Image.new("L", (9000, 1)).save(tmp_path / "line.png")
    assert read_image(tmp_path / "line.png", 1, (8, 8)).shape == (1, 8, 8)
    with pytest.raises(
        DataError, match=r"line\.png cannot be .* \(it is 9000×1 pixels, and with a"
    ):
        read_image(tmp_path / "line.png", 1, (8, 8), 8)


@pytest.mark.parametrize(("size", "resize"), [((9, 5), None), ((16, 16), None), ((7, 6), 8)])
@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_are_resized_as_files_are(tmp_path, channels, size, resize):
    """The same pixels, whichever source they come from."""
    pixels = np.random.default_rng(1).integers(0, 256, (channels, 12, 17), np.uint8)
    image = Image.fromarray(pixels[0] if channels == 1 else pixels.transpose(1, 2, 0))
    image.save(tmp_path / "a.png")
    expected = read_image(tmp_path / "a.png", channels, size, resize)
    assert np.array_equal(array_to_size(pixels, size, resize), expected)


# -- files of splits -------------------------------------------------------------------------------


def batch(**preparation) -> Split:
    images = torch.randint(0, 256, (6, 3, 4, 5), dtype=torch.uint8)
    labels = torch.arange(6) % 2
    return Split(images, labels, torch.arange(6), ["c", "d"], Preparation(**preparation))


@pytest.mark.parametrize(
    "preparation",
    [{}, {"resize": 9}, {"normalisation": stdb.NORMALISATIONS["cifar10"], "resize": 7}],
    ids=str,
)
def test_a_split_keeps_what_becomes_of_it(tmp_path, preparation):
    """Also its parts; in one key, so that the same split is the same bytes in every process."""
    part, path = batch(**preparation), tmp_path / "a.safetensors"
    save_split(part, path)
    again = load_split(path)
    assert again.preparation == part.preparation
    assert torch.equal(again.take(torch.tensor([1, 3])).pixels(), part.pixels()[[1, 3]])
    head = path.read_bytes()[8:].partition(b"}")[0].decode()
    assert ('"__metadata__":{"classes":' in head) is (preparation == {})
    assert ('"__metadata__":{"about":' in head) is (preparation != {})
    assert preparation_of(part.preparation.settings()) == part.preparation


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ({"normalisation": OWN}, "its images have 3 channels and the normalisation 1; allowed: as"),
        ({"normalisation": {"mean": [0.5]}}, "normalisation is {'mean': [0.5]}; allowed: mean and"),
        ({"resize": "256"}, "resize is '256'; allowed: 1 to 8192, or none"),
        ({"resize": True}, "resize is True"),
        ({"resize": 0}, "resize is 0"),
    ],
)
def test_a_split_with_another_preparation_is_refused(tmp_path, monkeypatch, kept, said):
    """What prepare_data does not write."""
    monkeypatch.setattr(Preparation, "settings", lambda _: kept)
    save_split(batch(), tmp_path / "a.safetensors")
    with pytest.raises(DataError, match="is no split of a data set") as caught:
        load_split(tmp_path / "a.safetensors")
    assert said in str(caught.value)


# -- what does not fit -----------------------------------------------------------------------------


def test_images_of_other_channels_are_refused_before_they_are_read(tmp_path):
    """Of a folder, which is read as parameters say, and of any other source."""
    strangers(tmp_path)
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(b"is not even looked at")
    folder = {"source": "folder", "path": str(tmp_path), "image_size": 8}
    for changes, said in (
        (
            folder | {"normalise": "imagenet", "grayscale": True},
            "1 channel and the normalisation 3",
        ),
        (folder | {"normalise": OWN}, "3 channels and the normalisation 1; allowed: as many"),
        ({"normalise": "cifar10"}, "data.normalise: the images of digits have 1 channel and the"),
    ):
        params = data(**changes)
        with pytest.raises(DataError, match="the images of") as caught:
            split(params, *read_source(params))
        assert said in str(caught.value)


def test_poisson_spikes_beyond_one_have_the_normalisations_limits():
    """A spike stands for the largest pixel of its channel; a current may be anything."""
    ann = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(60, 9), torch.nn.ReLU(), torch.nn.Linear(9, 3)
    )
    imagenet = stdb.NORMALISATIONS["imagenet"]
    part = batch(normalisation=imagenet)
    snn = build_snn(ann, STDB, 7, part)
    assert snn.encoder == stdb.PoissonEncoder(7, limits=imagenet.largest)
    assert part.pixels().abs().max() > 1
    with torch.no_grad():
        assert snn(part.pixels(), 3).isfinite().all()
    direct = build_snn(ann, STDB.model_copy(update={"encoder": "direct"}), 7, part)
    assert direct.encoder == stdb.DirectEncoder()
    for within in (batch(), batch(normalisation=stdb.Normalisation([0.5] * 3, [0.5] * 3))):
        assert build_snn(ann, STDB, 7, within).encoder == stdb.PoissonEncoder(7)


def test_a_conversion_is_checked_with_images_of_the_data():
    """Zeros would hide what differs for pixels alone."""
    layers = torch.nn.Linear(60, 9, bias=False), torch.nn.ReLU(), torch.nn.Linear(9, 3, bias=False)
    ann, part = torch.nn.Sequential(torch.nn.Flatten(), *layers), batch()
    assert torch.equal(example_of(part), part.pixels()[:2])
    assert build_snn(ann, STDB, 7, part).neurons.keys() == {"1"}
    ann[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(stdb.ConversionError, match=r"^layer 1 .*differs from the ANN's"):
        build_snn(ann, STDB, 7, part)


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"image_size": [8]}, "image_size [8]; allowed: 1 or 3, and 1 to 4096 or two of that"),
        ({"image_size": [8, 0]}, "image_size [8, 0]"),
        ({"image_size": [8, "9"]}, "image_size [8, '9']"),
        ({"image_size": True}, "image_size True"),
        ({"resize": 7}, "resize is 7; allowed: 8 or more, or none"),
        ({"resize": "x"}, "resize is 'x'; allowed: 1 to 8192"),
        ({"in_channels": 1}, "its images have 1 channel and the normalisation 3"),
    ],
)
def test_a_network_whose_images_cannot_be_made_is_refused(tmp_path, about, said):
    """By its file, before an image is read."""
    network = {"in_channels": 3, "image_size": 8} | about
    ann = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 9), torch.nn.ReLU())
    ann.append(torch.nn.Linear(9, 2))
    known = {"network": network, "normalisation": stdb.NORMALISATIONS["imagenet"]} | about
    snn = stdb.convert(ann, stdb.DirectEncoder())
    stdb.save(snn, tmp_path / "snn", timesteps=4, classes=["a", "b"], **known)
    with pytest.raises(DataError, match="snn") as caught:
        stdb.Classifier(tmp_path / "snn")
    assert said in str(caught.value)


BUILDER = """
from torch import nn
sizes = []
def build(in_channels, image_size, num_classes):
    sizes.append(image_size)
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes, bias=False))
"""


def test_a_builder_gets_a_pair_for_rectangles(tmp_path, monkeypatch):
    """One number for squares, as ever; the paper's networks are built for both."""
    (tmp_path / "mine_of_rectangles.py").write_text(BUILDER)
    monkeypatch.syspath_prepend(tmp_path)
    own = NETWORK.model_copy(update={"architecture": "mine_of_rectangles:build"})
    for size, given in (([6, 10], (6, 10)), ([8, 8], 8), (8, 8)):
        params = data(image_size=size, train_limit=60)
        part = split(params, *read_source(params))["train"]
        build_ann(own, part)
        assert recipe(own, part)["image_size"] == given
    import mine_of_rectangles

    assert mine_of_rectangles.sizes == [(6, 10), 8, 8]
    assert build_ann(NETWORK, batch())(torch.zeros(2, 3, 4, 5)).shape == (2, 2)
