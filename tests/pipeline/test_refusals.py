"""Parameters and archives that cannot be used are refused with a message, never a crash."""

import io
import math
import tarfile
import zipfile

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from pipeline.data import DataError
from pipeline.data.sources import read_source
from pipeline.params import Params, ParamsError, load_params
from pipeline.prepare_data import split
from tests.pipeline.archives import pack
from tests.pipeline.support import ROOT

TEXT = (ROOT / "params.yaml").read_text()
VALUES = yaml.safe_load(TEXT)
KEYS = [(section, key) for section, keys in VALUES.items() for key in keys]


def has_default(section, key) -> bool:
    """What 0.1.0 did not have."""
    return not Params.model_fields[section].annotation.model_fields[key].is_required()


NEW = [(section, key) for section, key in KEYS if has_default(section, key)]


def message(tmp_path, content: str | bytes | dict) -> str:
    """Why these parameters are refused."""
    path = tmp_path / "params.yaml"
    if isinstance(content, dict):
        content = yaml.safe_dump(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ParamsError) as caught:
        load_params(path)
    return str(caught.value)


def with_value(section, key, value) -> dict:
    changed = yaml.safe_load(TEXT)
    changed[section][key] = value
    return changed


@pytest.mark.parametrize(("section", "key"), [each for each in KEYS if each not in NEW])
def test_a_missing_parameter_is_named(tmp_path, section, key):
    """There are no hidden defaults but of what 0.1.0 did not have."""
    changed = yaml.safe_load(TEXT)
    del changed[section][key]
    assert f"{section}.{key} is missing" in message(tmp_path, changed)


def test_a_file_of_0_1_0_is_complete(tmp_path):
    """It means what the file here says, all of whose new keys are at their defaults."""
    old = yaml.safe_load(TEXT)
    for section, key in NEW:
        del old[section][key]
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(old))
    assert {("data", "normalise"), ("data", "resize")} <= set(NEW)
    assert load_params(path) == load_params(ROOT / "params.yaml")


@pytest.mark.parametrize("section", VALUES)
def test_an_unknown_parameter_is_named_with_the_known_ones(tmp_path, section):
    """A typing error in any section cannot go unnoticed."""
    said = message(tmp_path, with_value(section, "typo", 1))
    known = ", ".join(Params.model_fields[section].annotation.model_fields)
    assert f"{section}.typo is no known key; allowed: {known}" in said


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_a_mapping_is_no_value_of_any_parameter(tmp_path, section, key):
    """Key, value and what is allowed are in the message."""
    said = message(tmp_path, with_value(section, key, {"a": 1}))
    assert f"{section}.{key} is {{'a': 1}}; allowed: " in said


NUMBERS = [(s, k) for s, k in KEYS if type(VALUES[s][k]) in (int, float)]
INTEGERS = [(s, k) for s, k in NUMBERS if type(VALUES[s][k]) is int and k != "decay"]


@pytest.mark.parametrize("value", ["3", True, math.nan, math.inf, -1], ids=repr)
@pytest.mark.parametrize(("section", "key"), NUMBERS)
def test_no_number_may_be_a_string_a_bool_negative_or_not_finite(tmp_path, section, key, value):
    """True is not 1, "3" is not 3; NaN would go through every comparison."""
    said = message(tmp_path, with_value(section, key, value))
    assert f"{section}.{key} is {value!r}; allowed: " in said


@pytest.mark.parametrize(("section", "key"), INTEGERS)
def test_no_count_may_be_a_fraction(tmp_path, section, key):
    """1.5 epochs are not 1."""
    said = message(tmp_path, with_value(section, key, 1.5))
    assert f"{section}.{key} is 1.5; allowed: integer" in said


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("stdb", "timesteps", 0),
        ("stdb", "timesteps", None),
        ("stdb", "timesteps", 32768),
        ("stdb", "leak", 1.5),
        ("stdb", "alpha", 0),
        ("stdb", "alpha", -0.3),
        ("stdb", "threshold_scale", 0),
        ("stdb", "truncate", 0),
        ("stdb", "clip", 0),
        ("stdb", "chunk", 0),
        ("stdb", "dropout", 1.0),
        ("stdb", "decay", 1),
        ("stdb", "encoder", "rate"),
        ("stdb", "seed", 2**31),
        ("train_ann", "epochs", 0),
        ("train_ann", "learning_rate", 0),
        ("train_ann", "momentum", 1),
        ("train_ann", "augment", "yes"),
        ("network", "dropout", 1),
        ("network", "architecture", "resnet50"),
        ("network", "architecture", "no file.py:f"),
        ("data", "image_size", 0),
        ("data", "image_size", "large"),
        ("data", "image_size", 16385),
        ("data", "image_size", [8]),
        ("data", "normalise", "imagenot"),
        ("data", "normalise", {"mean": [0.5]}),
        ("data", "normalise", {"mean": [], "std": []}),
        ("data", "resize", 0),
        ("data", "resize", [256, 256]),
        ("data", "path", ""),
        ("data", "path", "a\0b"),
        ("data", "train_limit", 0),
        ("data", "test_fraction", 0),
        ("data", "source", "MNIST"),
        ("evaluate_converted", "scales", []),
        ("cluster", "workers", 0),
        ("cluster", "workers", "two"),
        ("cluster", "workers", 1.5),
        ("cluster", "cpus_per_worker", 0),
        ("cluster", "use_gpu", "maybe"),
        ("cluster", "use_gpu", 1),
    ],
)
def test_a_value_out_of_range_is_named_with_the_range(tmp_path, section, key, value):
    """Key, value and what is allowed, all in the message."""
    said = message(tmp_path, with_value(section, key, value))
    assert f"{section}.{key} is {value!r}; allowed: " in said


@pytest.mark.parametrize(
    ("section", "key", "value", "position"),
    [
        ("evaluate_converted", "scales", [0.5, 0], 1),
        ("train_ann", "milestones", [0.5, 1.0], 1),
        ("stdb", "milestones", ["0.5"], 0),
        ("data", "image_size", [8, 0], 1),
    ],
)
def test_a_bad_member_of_a_list_is_named_by_its_position(tmp_path, section, key, value, position):
    """Which of them, counted from 0."""
    said = message(tmp_path, with_value(section, key, value))
    assert f"{section}.{key}.{position} is {value[position]!r}; allowed: " in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"normalise": {"mean": [0.5], "std": [0]}},
            "data.normalise.std has 0; allowed: 1e-06 to 1",
        ),
        (
            {"normalise": {"mean": [0.5, 0.5], "std": [0.5]}},
            "mean has 2 channels and std 1; allowed",
        ),
        ({"resize": 8}, "data.resize is 8 and image_size None; allowed: null, or an image_size"),
        (
            {"resize": 11, "image_size": [8, 12]},
            "data.resize is 11 and image_size [8, 12]; allowed",
        ),
        (
            {"normalise": "x"},
            "allowed: null, imagenet, cifar10, cifar100, or {mean: …, std: …} with",
        ),
    ],
)
def test_what_becomes_of_images_is_checked(tmp_path, changes, said):
    """Before any image is read."""
    values = yaml.safe_load(TEXT)
    assert said in message(tmp_path, values | {"data": values["data"] | changes})


@pytest.mark.parametrize(
    "content",
    ["", "[1, 2]", "text", b"\xff\xfe\x80", "stdb: [", "a: &x [*x", "stdb: null", "1: 2", "\t"],
    ids=repr,
)
def test_a_file_that_is_no_parameter_file_is_refused(tmp_path, content):
    """Empty, a list, no text, half a file: a message that names the file, and no crash."""
    assert str(tmp_path / "params.yaml") in message(tmp_path, content)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "+1e-4", ".1e-3", "1.e-4"])
def test_a_number_may_be_written_as_people_write_it(tmp_path, text):
    """YAML 1.1 takes some of these for strings."""
    path = tmp_path / "params.yaml"
    before = "learning_rate: 1.0e-4"
    assert before in TEXT
    path.write_text(TEXT.replace(before, f"learning_rate: {text}"))
    assert load_params(path).stdb.learning_rate == pytest.approx(1e-4)


# -- archives --------------------------------------------------------------------------------------


def params(path, **changes):
    return load_params(ROOT / "params.yaml").data.model_copy(
        update={"source": "folder", "path": str(path), **changes}
    )


def png(seed: int, size=(8, 8)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


IMAGES = {f"{name}/{i}.png": png(i) for name in ("cat", "dog") for i in range(6)}


@pytest.mark.parametrize("kind", ["zip", "", "gz", "bz2", "xz"])
def test_an_archive_that_was_cut_off_is_refused(tmp_path, kind):
    """An interrupted download: wherever it ends, a message that names the file, and no crash."""
    whole, path = pack(kind, IMAGES), tmp_path / "images"
    path.write_bytes(whole)
    (images, _), _, _ = read_source(params(path))
    assert len(images) == 12
    end = 12 * 1024 if kind == "" else len(whole)  # a plain tar ends with empty blocks
    for size in range(1, end, end // 29):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=f"{path} cannot be unpacked"):
            read_source(params(path))


@pytest.mark.parametrize("kind", ["zip", "gz", "bz2", "xz"])
def test_a_changed_byte_in_an_archive_is_noticed(tmp_path, kind):
    """Refused, or harmless: never other pixels, fewer images or other classes."""
    whole, path, refused = pack(kind, IMAGES), tmp_path / "images", 0
    path.write_bytes(whole)
    (images, labels), _, classes = read_source(params(path))
    for position in range(0, len(whole), len(whole) // 60):
        broken = bytearray(whole)
        broken[position] ^= 0x55
        path.write_bytes(broken)
        try:
            (others, other_labels), _, other_classes = read_source(params(path))
        except DataError:
            refused += 1
            continue
        assert np.array_equal(others, images), position
        assert np.array_equal(other_labels, labels), position
        assert other_classes == classes, position
    assert refused > 40


@pytest.mark.parametrize("kind", ["symlink", "absolute", "parent"])
def test_a_tar_cannot_reach_out_of_its_folder(tmp_path, kind):
    """Links and paths to elsewhere are refused, and nothing is written there."""
    target, path = tmp_path / "elsewhere", tmp_path / "bad.tar"
    target.mkdir()
    with tarfile.open(path, "w") as file:
        name = {
            "symlink": "out/x.png",
            "absolute": str(target / "x.png"),
            "parent": "../" * 12 + str(target / "x.png"),
        }[kind]
        if kind == "symlink":
            link = tarfile.TarInfo("out")
            link.type, link.linkname = tarfile.SYMTYPE, str(target)
            file.addfile(link)
        entry = tarfile.TarInfo(name)
        entry.size = 1
        file.addfile(entry, io.BytesIO(b"x"))
    with pytest.raises(DataError):
        read_source(params(path))
    assert list(target.iterdir()) == []


def test_a_zip_cannot_reach_out_of_its_folder(tmp_path):
    """A member with .. in its name is written nowhere but inside."""
    target, path = tmp_path / "elsewhere", tmp_path / "bad.zip"
    target.mkdir()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("../" * 12 + str(target / "x.png"), png(0))
    with pytest.raises(DataError):
        read_source(params(path))
    assert list(target.iterdir()) == []


def write(root, **classes) -> None:
    for name, files in classes.items():
        (root / name).mkdir(parents=True)
        for i, content in enumerate(files):
            (root / name / f"{i}.png").write_bytes(content)


def test_train_and_test_with_different_classes_are_refused(tmp_path):
    """The message names the classes that only one of them has."""
    write(tmp_path / "train", cat=[png(0)], dog=[png(1)])
    write(tmp_path / "test", cat=[png(0)], owl=[png(1)])
    with pytest.raises(DataError, match="different classes: dog, owl in only one"):
        read_source(params(tmp_path))


def test_images_that_are_not_square_need_a_size(tmp_path):
    """Without image_size they are refused, with it the middle is cut out."""
    write(tmp_path, cat=[png(0, (8, 12))] * 3, dog=[png(1, (8, 12))] * 3)
    with pytest.raises(DataError, match=r"12×8 pixels; set data\.image_size"):
        read_source(params(tmp_path))
    (images, _), _, _ = read_source(params(tmp_path, image_size=8))
    original = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    assert np.array_equal(images[0], original[:, 2:10].transpose(2, 0, 1))


def test_grayscale_gives_one_channel(tmp_path):
    """Read as grey: (N, 1, H, W)."""
    write(tmp_path, cat=[png(0)] * 3, dog=[png(1)] * 3)
    (images, _), _, _ = read_source(params(tmp_path, grayscale=True))
    assert images.shape == (6, 1, 8, 8)


# -- splits ----------------------------------------------------------------------------------------


def test_each_split_has_its_share_of_every_class():
    """Stratified: every class within one image of its part of the source, with a limit too."""
    for limit in (None, 300):
        data = load_params(ROOT / "params.yaml").data.model_copy(update={"train_limit": limit})
        source = read_source(data)
        labels = torch.from_numpy(source[0][1])
        parts = split(data, *source)
        for name, part in parts.items():
            expected = torch.bincount(labels) * (len(part) / len(labels))
            assert (torch.bincount(part.labels) - expected).abs().max() <= 1.5, (limit, name)
        if limit:
            assert len(parts["train"]) + len(parts["validation"]) == limit


def test_a_samples_id_is_its_place_in_the_source():
    """Ids name random streams: pixels and label of an id are those of the source."""
    data = load_params(ROOT / "params.yaml").data
    source = read_source(data)
    for part in split(data, *source).values():
        assert np.array_equal(part.images.numpy(), source[0][0][part.ids.numpy()])
        assert np.array_equal(part.labels.numpy(), source[0][1][part.ids.numpy()])


def test_a_sources_own_test_images_stay_the_test_split():
    """They are neither drawn from nor mixed in, and their ids are their own."""
    data = load_params(ROOT / "params.yaml").data
    (images, labels), _, classes = read_source(data)
    own = images[1000:], labels[1000:]
    parts = split(data, (images[:1000], labels[:1000]), own, classes)
    assert np.array_equal(parts["test"].images.numpy(), own[0])
    ids = [set(part.ids.tolist()) for part in parts.values()]
    assert sum(map(len, ids)) == len(set().union(*ids)) == 1797
    assert set(parts["test"].ids.tolist()) == set(range(1000, 1797))


@pytest.mark.parametrize(("image_size", "pixels"), [(9, 9), (12, 12), (None, 8)])
def test_images_are_resized_to_image_size(image_size, pixels):
    """To any size, uint8, and a flat image stays as it is."""
    data = load_params(ROOT / "params.yaml").data.model_copy(update={"image_size": image_size})
    images, labels = read_source(data)[0]
    flat = np.full_like(images, 200)
    parts = split(data, (flat, labels), None, [str(i) for i in range(10)])
    assert parts["train"].shape == (1, pixels, pixels)
    assert parts["train"].images.dtype == torch.uint8
    assert parts["train"].images.unique().tolist() == [200]
