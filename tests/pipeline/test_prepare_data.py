"""Splitting: what any source gives is checked; memory is estimated before it is taken."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import pipeline.prepare_data
from pipeline.data import DataError, Files, load_split, save_split
from pipeline.data.sources import Held
from pipeline.params import load_params
from pipeline.prepare_data import main, split
from pipeline.reporting.results import DataSummary
from tests.pipeline.support import ROOT

CLASSES = ["cat", "dog", "owl"]
DATA = load_params(ROOT / "params.yaml").data


def samples(count=30, size=(8, 8), channels=1):
    draw = np.random.default_rng(count)
    pixels = draw.integers(0, 256, (count, channels, *size), dtype=np.uint8)
    return pixels, np.arange(count) % 3


def refusal(train, test=None, classes=CLASSES, **changes) -> str:
    with pytest.raises(DataError) as caught:
        split(DATA.model_copy(update=changes), train, test, list(classes))
    said = str(caught.value)
    assert "\n" not in said
    return said


def changed(labels, position, value):
    labels = labels.copy()
    labels[position] = value
    return labels


IMAGES, LABELS = samples()


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ((IMAGES, LABELS[:-1]), "has 30 images and 29 labels; allowed: a label an image"),
        ((IMAGES[:-1], LABELS), "has 29 images and 30 labels"),
        ((IMAGES, changed(LABELS, 4, 3)), "1 of 30; the first is 3, of image 4; allowed: 0 to 2"),
        ((IMAGES, changed(LABELS, 7, -1)), "the first is -1, of image 7; allowed: 0 to 2"),
        ((IMAGES, LABELS.astype(float)), "type float64; allowed: integers (N,)"),
        ((IMAGES, LABELS > 0), "type bool; allowed: integers (N,)"),
        ((IMAGES, LABELS[:, None]), "labels of shape (30, 1)"),
        ((IMAGES / 255, LABELS), "type float64; allowed: (N, C, H, W) uint8, or (N,) names"),
        ((IMAGES * np.nan, LABELS), "type float64"),
        ((IMAGES[:, 0], LABELS), "images of shape (30, 8, 8)"),
        ((IMAGES[:0], LABELS[:0]), "images of shape (0, 1, 8, 8)"),
        ((IMAGES[..., :0], LABELS), "images of shape (30, 1, 8, 0)"),
        ((IMAGES[..., :5], LABELS), "data.image_size is null; allowed for digits, whose images"),
        (
            (np.array(["a.png"] * 30), LABELS),
            "data.image_size is null; allowed for digits, whose images",
        ),
    ],
)
def test_images_and_labels_that_do_not_fit_are_refused(train, said):
    """Naming the source and the split, in every split."""
    if "image_size" in said:  # of all splits together
        assert said in refusal(train)
        return
    found = {
        "train": refusal(train),
        "test": refusal((IMAGES, LABELS), train),
        "validation": refusal((IMAGES, LABELS), Held(IMAGES, LABELS, validation=train)),
    }
    for name, message in found.items():
        assert f"digits, {name}, has " in message
        assert said in message


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_class_with_too_few_images_is_named(count):
    """For three splits it needs three."""
    keep = np.flatnonzero((LABELS != 1) | (np.cumsum(LABELS == 1) <= count))
    assert f"class dog of digits has {count} image" in refusal((IMAGES[keep], LABELS[keep]))


def test_a_limit_that_leaves_a_class_out_is_refused():
    """The network could never learn it."""
    assert "cannot be split" in refusal((IMAGES, LABELS), train_limit=2)


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (["cat", "dog", "two\nlines"], "class 'two\\nlines' in digits has a name that cannot be"),
        (["cat", "dog", "caf\udce9"], "class 'caf\\udce9' in digits"),
        (["cat", "dog", ""], "class '' in digits"),
        (["cat", "dog", 3], "class '3' in digits"),
        (["cat", "dog", "cat"], "has 3 classes (cat, dog, cat); allowed: two or more, each once"),
        (["cat"], "has 1 classes (cat); allowed: two or more"),
    ],
)
def test_names_of_classes_that_shift_or_repeat_are_refused(classes, said):
    """They are written a line each."""
    assert said in refusal((IMAGES, LABELS), classes=classes)


def test_classes_may_have_names_in_any_script():
    """Joiners and spaces of other scripts are no line breaks."""
    classes = ["گربه\u200cها", "犬\u3000", "chien\u00a0noir"]
    assert split(DATA, (IMAGES, LABELS), None, classes)["train"].classes == classes


def test_splits_of_other_shapes_are_refused():
    """With image_size they are brought to one."""
    said = refusal((IMAGES, LABELS), samples(6, (9, 9)))
    assert "digits has images of 1×8×8 and 1×9×9; allowed: one shape in all splits" in said
    resized = DATA.model_copy(update={"image_size": 8})
    assert split(resized, (IMAGES, LABELS), samples(6, (9, 9)), CLASSES)["test"].shape == (1, 8, 8)
    assert "images of 1×8×8 and 3×8×8" in refusal(
        (IMAGES, LABELS), samples(6, channels=3), image_size=8
    )


def test_a_sources_own_validation_split_is_kept():
    """Nothing is drawn from the training images; ids go on from split to split."""
    test, validation = samples(6), samples(9)
    parts = split(DATA, (IMAGES, LABELS), Held(*test, validation), CLASSES)
    for name, (images, labels) in (
        *(("train", (IMAGES, LABELS)), ("test", test), ("validation", validation)),
    ):
        assert np.array_equal(parts[name].images.numpy(), images)
        assert np.array_equal(parts[name].labels.numpy(), labels)
    assert [parts[n].ids.tolist() for n in ("train", "test", "validation")] == [
        *(list(range(30)), list(range(30, 36)), list(range(36, 45))),
    ]


@pytest.mark.parametrize("kind", ["<i4", ">i4", "u1", "u8"])
def test_any_integers_are_labels(kind):
    """As files of other programs have them."""
    parts = split(DATA, (IMAGES, LABELS.astype(kind)), None, CLASSES)
    for part in parts.values():
        assert part.labels.dtype == torch.int64
        assert np.array_equal(part.labels.numpy(), LABELS[part.ids.numpy()])


def test_what_the_memory_has_no_room_for_is_refused_before_it_is_taken():
    """Through image_size."""
    said = refusal((IMAGES, LABELS), image_size=10**6)
    assert "30 images of 1×1000000×1000000 take 27939.7 GiB of memory, and this machine has" in said
    assert said.endswith("allowed: a smaller data.image_size")


def test_what_was_drawn_and_what_is_the_sources_own_is_said(tmp_path, monkeypatch):
    """In lines for the person who watches, and in metrics/data.json; not where all was drawn."""
    monkeypatch.chdir(tmp_path)
    lines: list[str] = []
    stage = SimpleNamespace(
        params=SimpleNamespace(data=DATA), say=lines.append, log=lambda metrics: None
    )
    for test, own in (
        *((None, []), (samples(6), ["test"])),
        (Held(*samples(6), samples(9)), ["validation", "test"]),
    ):
        found = (IMAGES, LABELS), test, CLASSES
        monkeypatch.setattr(pipeline.prepare_data, "read_source", lambda params, f=found: f)
        lines.clear()
        main(stage)
        written = json.loads(Path("metrics/data.json").read_text())
        assert [name for name in ("train", "validation", "test") if "own" in written[name]] == own
        assert [line.split()[0] for line in lines if "the source's own" in line] == own
        assert "digits: 30 images of 3 classes (cat, dog, owl)" in lines
        assert DataSummary.model_validate_json(json.dumps(written)).test.own == ("test" in own)


# -- files of splits -------------------------------------------------------------------------------


def damaged(path, **tensors):
    """The file with other tensors."""
    save_file(load_file(path) | tensors, path, {"classes": "cat\ndog\nowl"})
    with pytest.raises(DataError, match="is no split of a data set") as caught:
        load_split(path)
    return str(caught.value)


def test_a_file_whose_parts_do_not_fit_each_other_is_no_split(tmp_path):
    """Labels, ids, images and classes are as many as each other."""
    path = tmp_path / "train.safetensors"
    part = split(DATA, (IMAGES, LABELS), None, CLASSES)["train"]
    for wrong, said in (
        ({"labels": part.labels[:-1]}, "has 17 images and 16 labels"),
        ({"labels": part.labels + 1}, "labels out of range"),
        ({"labels": part.labels.float()}, "labels of shape (17,) and type float32"),
        ({"ids": part.ids[:-1]}, "labels and ids"),
        ({"ids": part.ids.int()}, "labels and ids"),
        ({"images": part.images.float()}, "type float32"),
        ({"images": part.images[:, 0]}, "images of shape (17, 8, 8)"),
    ):
        save_split(part, path)
        assert said in damaged(path, **wrong)


def test_a_file_with_other_than_a_name_a_label_is_no_split(tmp_path):
    """Names would shift against labels."""
    path = tmp_path / "data" / "prepared" / "train.safetensors"
    path.parent.mkdir(parents=True)
    names = np.array(["a.png", "two\nlines.png", "caf\udce9.png"])
    labels, ids = torch.tensor([0, 1, 2]), torch.arange(3)
    save_split(Files(names, labels, ids, CLASSES, (1, 8, 8)), path)
    again = load_split(path)
    assert again.names.tolist() == [str(tmp_path / name) for name in names]
    save_split(Files(names[:2], labels, ids, CLASSES, (1, 8, 8)), path)
    with pytest.raises(DataError, match="has 2 images and 3 labels"):
        load_split(path)
    for shape in ((2, 8, 8), (1, 8, 0), (1, 0, 0)):
        save_split(Files(names, labels, ids, CLASSES, shape), path)
        with pytest.raises(DataError, match="allowed: 1 or 3 channels"):
            load_split(path)
