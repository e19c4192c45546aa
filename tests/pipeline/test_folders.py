"""Folders of images as people have them: splits, classes, links, what is left behind, names."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data import DataError, load_split, save_split
from pipeline.data.sources import read_source
from pipeline.params import load_params
from pipeline.prepare_data import split
from tests.pipeline.support import ROOT


def settings(path, **changes):
    changes = {"source": "folder", "path": str(path), "image_size": 8} | changes
    return load_params(ROOT / "params.yaml").data.model_copy(update=changes)


def prepare(path, **changes):
    there = settings(path, **changes)
    return split(there, *read_source(there))


def refusal(path, **changes) -> str:
    with pytest.raises(DataError) as caught:
        prepare(path, **changes)
    return str(caught.value)


def classes(place: Path, names=("cat", "dog"), count=8, shade=0) -> Path:
    """Images of one shade each: ``shade``, ``shade`` + 1 …"""
    for name in names:
        (place / name).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            Image.new("L", (8, 8), shade).save(place / name / f"{k:02}.png")
            shade += 1
    return place


def shades(part) -> list[int]:
    return sorted(part.images[:, 0, 0, 0].tolist())


# -- splits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "held"),
    [
        *(("train", name) for name in ("test", "val", "valid", "validation", "dev", "testing")),
        *(("Train", "Test"), ("TRAIN", "VAL"), ("training", "testing")),
        *(("training_set", "test_set"), ("training-set", "Test Set")),
    ],
)
def test_a_folder_beside_train_is_the_test_split(tmp_path, capsys, train, held):
    """Under any of its names; what was taken for what is said."""
    classes(tmp_path / train)
    classes(tmp_path / held, count=2, shade=100)
    parts = prepare(tmp_path)
    assert parts["train"].classes == ["cat", "dog"]
    assert shades(parts["test"]) == [100, 101, 102, 103]
    assert sorted(shades(parts["train"]) + shades(parts["validation"])) == list(range(16))
    assert f"{held}/ is the test split, validation will be drawn from {train}/" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["val", "valid", "Validation", "dev"])
def test_a_third_folder_is_the_validation_split(tmp_path, name, stream):
    """Nothing is drawn from train/ then, and every sample has an id of its own."""
    classes(tmp_path / "train", count=1)
    classes(tmp_path / "test", count=2, shade=100)
    classes(tmp_path / name, count=3, shade=200)
    parts = prepare(tmp_path, stream=stream)
    assert {n: len(part) for n, part in parts.items()} == {"train": 2, "validation": 6, "test": 4}
    assert sorted(k for part in parts.values() for k in part.ids.tolist()) == list(range(12))
    if not stream:
        assert shades(parts["train"]) == [0, 1]
        assert shades(parts["validation"]) == list(range(200, 206))
        assert shades(parts["test"]) == list(range(100, 104))


def test_train_alone_is_split_like_class_folders(tmp_path):
    """The others are drawn from it."""
    classes(tmp_path / "train")
    assert sum(map(len, prepare(tmp_path).values())) == 16


@pytest.mark.parametrize(
    "names",
    [
        ("valid",),
        ("test", "val"),
        ("val", "validation", "train"),
        ("Train", "train", "test"),
        ("train", "cat", "dog"),
        ("train", "test", "unlabelled"),
        ("cat", "dog", "test"),
    ],
)
def test_an_unclear_mix_of_splits_and_classes_is_refused(tmp_path, names):
    """With the folders there are, and the names that splits may have."""
    for name in names:
        classes(tmp_path / name)
    said = refusal(tmp_path)
    assert all(f"{name}/" in said for name in names)
    assert "allowed: class folders alone, or train/ (or training, train_set, training_set)" in said
    assert "val/ (or valid, validation, dev" in said


@pytest.mark.parametrize(
    "names",
    [
        ("seg_train", "seg_test", "seg_pred"),
        ("train2017", "val2017"),
        ("trainA", "trainB", "testA", "testB"),
    ],
)
def test_what_looks_like_splits_under_other_names_is_not_taken_for_classes(tmp_path, names):
    """A network would learn to tell training images from test images."""
    for name in names:
        classes(tmp_path / name)
    assert "which look like splits; allowed names of splits: train/ (or" in refusal(tmp_path)


def test_a_class_may_be_called_like_a_word_of_a_split(tmp_path):
    """Where the others are plainly classes; and within a split anything is a class."""
    names = ("bus_station", "market", "train_station")
    classes(tmp_path / "plain", names)
    assert prepare(tmp_path / "plain")["train"].classes == list(names)
    for name in ("train", "test"):
        classes(tmp_path / "splits" / name, ("car", "train"))
    assert prepare(tmp_path / "splits")["train"].classes == ["car", "train"]


# -- what else is in folders -----------------------------------------------------------------------

LEFT_BEHIND = (".ipynb_checkpoints", "__MACOSX", "@eaDir", ".thumbnails")


@pytest.mark.parametrize("where", [".", "cat", "cat/more/deeper"])
def test_what_programs_leave_behind_is_no_image(tmp_path, where):
    """At any depth: folders with copies of images, and files."""
    classes(tmp_path)
    (tmp_path / where).mkdir(parents=True, exist_ok=True)
    for name in LEFT_BEHIND:
        (tmp_path / where / name).mkdir()
        shutil.copy(tmp_path / "cat/00.png", tmp_path / where / name / "00-copy.png")
    for name in ("Thumbs.db", "thumbs.DB", "desktop.ini", ".DS_Store", "._00.png"):
        (tmp_path / where / name).write_bytes(b"no image")
    (images, labels), _, names = read_source(settings(tmp_path))
    assert names == ["cat", "dog"]
    assert images[:, 0, 0, 0].tolist() == list(range(16))
    assert labels.tolist() == [0] * 8 + [1] * 8


def test_links_to_folders_and_files_are_followed(tmp_path):
    """Once each, also where they lead back to where they are."""
    classes(tmp_path / "elsewhere", ("more", "one"), count=2, shade=100)
    classes(tmp_path / "images")
    cat = tmp_path / "images/cat"
    (cat / "linked").symlink_to(tmp_path / "elsewhere/more")
    (cat / "again").symlink_to(tmp_path / "elsewhere/more")
    (cat / "one.png").symlink_to(tmp_path / "elsewhere/one/00.png")
    (cat / "itself").symlink_to(cat)
    (cat / "above").symlink_to(tmp_path / "images")
    (images, labels), _, _ = read_source(settings(tmp_path / "images"))
    assert sorted(images[labels == 0, 0, 0, 0].tolist()) == [*range(8), 100, 101, 102]
    assert images[labels == 1, 0, 0, 0].tolist() == list(range(8, 16))


def test_a_folder_in_two_classes_or_splits_is_refused(tmp_path):
    """Its images would have two labels, or be learnt from and tested with."""
    classes(tmp_path / "a")
    (tmp_path / "a/cat/more").symlink_to(tmp_path / "a/dog")
    assert "dog is also in" in refusal(tmp_path / "a")
    classes(tmp_path / "b/train")
    (tmp_path / "b/test").symlink_to(tmp_path / "b/train")
    assert "2 faults" in (said := refusal(tmp_path / "b"))
    assert f"{tmp_path}/b/test/cat is also in {tmp_path}/b/train/cat" in said


def test_files_beside_the_class_folders_are_said_not_to_be_used(tmp_path, capsys):
    """Nobody should believe that they were."""
    classes(tmp_path)
    shutil.copy(tmp_path / "cat/00.png", tmp_path / "loose.png")
    prepare(tmp_path)
    assert "not used: 1 file beside the class folders" in (said := capsys.readouterr().out)
    assert "(loose.png)" in said


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", [b"caf\xe9.png", b"two\nlines.png", "ни.png".encode()])
def test_any_name_of_a_file_leaves_labels_where_they_are(tmp_path, name, stream):
    """Not UTF-8, with a line break: read, written, read again."""
    classes(tmp_path / "images")
    os.rename(tmp_path / "images/cat/03.png", os.fsencode(tmp_path / "images/cat") + b"/" + name)
    for part in prepare(tmp_path / "images", stream=stream).values():
        save_split(part, tmp_path / "split.safetensors")
        again = load_split(tmp_path / "split.safetensors")
        pixels = again.take(np.arange(len(part))).images if stream else again.images
        assert ((pixels[:, 0, 0, 0] >= 8).long() == again.labels).all()
        assert again.classes == ["cat", "dog"]


@pytest.mark.parametrize("name", [b"caf\xe9", b"two\nlines", b"a\x85b"])
def test_a_name_of_a_class_that_cannot_be_written_is_refused(tmp_path, name):
    """It goes into files and pages, a line each."""
    classes(tmp_path)
    os.rename(tmp_path / "dog", os.fsencode(tmp_path) + b"/" + name)
    said = refusal(tmp_path)
    assert "has a name that cannot be written; allowed: UTF-8 without line breaks" in said
    assert "\n" not in said
    said.encode()


# -- all faults at once ----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_all_files_that_cannot_be_read_are_told_at_once(tmp_path, stream):
    """The first ten, and how many."""
    classes(tmp_path)
    for k in range(7):
        (tmp_path / f"cat/{k:02}.png").write_bytes(b"no image")
        (tmp_path / f"dog/{k:02}.png").write_bytes(b"no image")
    lines = refusal(tmp_path, stream=stream).splitlines()
    assert lines[0] == f"14 faults in {tmp_path}:"
    assert [line.split(" cannot be read as an image")[0] for line in lines[1:11]] == [
        f"  {tmp_path}/{name}"
        for name in [*(f"cat/{k:02}.png" for k in range(7)), *(f"dog/{k:02}.png" for k in range(3))]
    ]
    assert lines[11:] == ["  … and 4 more"]


def test_without_image_size_other_sizes_are_faults_like_others(tmp_path):
    """The first image that can be read says what the size is."""
    classes(tmp_path)
    (tmp_path / "cat/00.png").write_bytes(b"no image")
    Image.new("L", (9, 9)).save(tmp_path / "dog/02.png")
    said = refusal(tmp_path, image_size=None)
    assert "2 faults" in said
    assert f"{tmp_path}/dog/02.png is 9×9 pixels and {tmp_path}/cat/01.png 8×8 pixels" in said


def test_empty_classes_broken_links_and_what_is_no_file_are_told_at_once(tmp_path):
    """A link to nothing is an image that somebody believes to be there."""
    classes(tmp_path)
    (tmp_path / "owl").mkdir()
    (tmp_path / "cow").mkdir()
    (tmp_path / "cat/gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "dog/pipe.png")
    said = refusal(tmp_path)
    assert "4 faults" in said
    assert f"class folder {tmp_path}/owl is empty" in said
    assert f"class folder {tmp_path}/cow is empty" in said
    assert f"{tmp_path}/cat/gone.png is no file, or a link to nothing" in said
    assert f"{tmp_path}/dog/pipe.png is no file" in said


@pytest.mark.parametrize(("held", "needed"), [((), 3), (("test",), 2), (("test", "val"), 1)])
def test_a_class_with_too_few_images_is_named(tmp_path, held, needed):
    """Each split that is drawn needs one."""
    place = tmp_path / "train" if held else tmp_path
    classes(place)
    for name in held:
        classes(tmp_path / name)
    (place / "owl").mkdir()
    for name in held:
        classes(tmp_path / name, ("owl",), count=1)
    for k in range(needed - 1):
        shutil.copy(place / "cat/00.png", place / f"owl/{k}.png")
    said = refusal(tmp_path)
    if needed == 1:
        assert f"class folder {place}/owl is empty" in said
    else:
        count = f"{needed - 1} image{'s' * (needed > 2)}"
        assert f"class owl of {place} has {count} and cannot be split" in said
        assert f"allowed: {needed} or more" in said


# -- what is no folder of images -------------------------------------------------------------------


def test_a_path_that_is_none_is_refused(tmp_path):
    """Too long, a device, nothing, an image."""
    assert "no path" in refusal("x" * 5000)
    assert "neither a folder nor a file" in refusal("/dev/null")
    assert "which does not exist; allowed: a folder or an archive" in refusal(tmp_path / "nowhere")
    classes(tmp_path)
    assert "cannot be unpacked (it is neither a tar nor a zip" in refusal(tmp_path / "cat/00.png")


def test_archives_in_the_place_of_class_folders_are_named(tmp_path):
    """What to do is said."""
    for name in ("cat.zip", "dog.tar.gz"):
        (tmp_path / name).write_bytes(b"x")
    assert "two or more; unpack cat.zip, dog.tar.gz first" in refusal(tmp_path)


def test_images_that_do_not_fit_the_memory_are_refused_before_they_are_read(tmp_path):
    """With what to set instead."""
    classes(tmp_path, count=200)
    said = refusal(tmp_path, image_size=10**6, stream=False)
    assert (
        "400 images of 3×1000000×1000000 take 1117587.1 GiB of memory, and this machine has" in said
    )
    assert said.endswith("allowed: data.stream: true, or a smaller data.image_size")
