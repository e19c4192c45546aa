"""Data sets: sources, splits, and what is refused."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data import DataError, augment, load_split, normalise, read_source, save_split
from pipeline.params import load_params
from pipeline.prepare_data import split

ROOT = Path(__file__).parents[2]


def params(**changes):
    return load_params(ROOT / "params.yaml").data.model_copy(update=changes)


def make_folder(root: Path, classes=("cat", "dog", "owl"), count=12, size=(8, 8)) -> Path:
    generator = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def prepare(**changes):
    p = params(**changes)
    return split(p, *read_source(p))


def test_digits_are_split_by_class_completely_and_by_seed():
    """The splits are disjoint, complete, equal by class, and a function of the seed."""
    parts, again, other = prepare(), prepare(), prepare(seed=1)
    ids = torch.cat([part.ids for part in parts.values()])
    assert sorted(ids.tolist()) == list(range(1797))
    for name, part in parts.items():
        shares = torch.bincount(part.labels) / len(part)
        assert shares.min() > 0.08, name
        assert torch.equal(part.ids, again[name].ids)
        assert not torch.equal(part.ids, other[name].ids)
    assert parts["train"].shape == (1, 8, 8)
    assert len(parts["test"]) == 450


@pytest.mark.parametrize("form", ["folder", "tar.gz", "zip", "nested"])
def test_a_class_folder_data_set(tmp_path, form):
    """A folder or an archive of class folders, also inside a single folder, gives its images."""
    root = make_folder(tmp_path / "images")
    path = root
    if form == "tar.gz":
        path = tmp_path / "images.tar.gz"
        with tarfile.open(path, "w:gz") as file:
            file.add(root, "images")
    elif form == "zip":
        path = tmp_path / "images.zip"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("__MACOSX/._cat", b"what macOS adds")
            for image in root.rglob("*.png"):
                file.write(image, image.relative_to(root))
    elif form == "nested":
        path = tmp_path / "outer.tar"
        with tarfile.open(path, "w") as file:
            file.add(root, "a/b")
    (images, labels), test, classes = read_source(params(source="folder", path=str(path)))
    assert classes == ["cat", "dog", "owl"]
    assert images.shape == (36, 3, 8, 8)
    assert test is None
    first = np.asarray(Image.open(root / "cat" / "0.png")).transpose(2, 0, 1)
    assert np.array_equal(images[0], first)
    assert labels.tolist() == [0] * 12 + [1] * 12 + [2] * 12


def test_a_folder_with_its_own_test_split(tmp_path):
    """train/ and test/ are kept apart."""
    make_folder(tmp_path / "train")
    make_folder(tmp_path / "test", count=4)
    parts = prepare(source="folder", path=str(tmp_path))
    assert len(parts["test"]) == 12
    assert len(parts["train"]) + len(parts["validation"]) == 36


def test_images_of_several_sizes_are_brought_to_one(tmp_path):
    """image_size crops and resizes."""
    make_folder(tmp_path, ("a",), size=(20, 10))
    make_folder(tmp_path, ("b",), size=(9, 30))
    (images, _), _, _ = read_source(params(source="folder", path=str(tmp_path), image_size=8))
    assert images.shape == (24, 3, 8, 8)


def refusal(path, **changes) -> str:
    with pytest.raises(DataError) as caught:
        prepare(source="folder", path=str(path), **changes)
    return str(caught.value)


def test_unusable_folders_are_refused(tmp_path):
    """An empty class, one class, an unreadable image, mixed sizes, nothing there."""
    assert "does not exist" in refusal(tmp_path / "nowhere")
    make_folder(tmp_path / "one", ("cat",))
    assert "has 1 class folders; allowed" in refusal(tmp_path / "one")
    empty = make_folder(tmp_path / "empty")
    (empty / "zebra").mkdir()
    assert f"class folder {empty / 'zebra'} is empty" in refusal(empty)
    broken = make_folder(tmp_path / "broken")
    (broken / "dog" / "3.png").write_bytes(b"no image")
    assert f"{broken / 'dog' / '3.png'} cannot be read as an image" in refusal(broken)
    mixed = make_folder(tmp_path / "mixed")
    Image.new("RGB", (9, 9)).save(mixed / "dog" / "3.png")
    assert "set data.image_size" in refusal(mixed)
    few = make_folder(tmp_path / "few", count=1)
    assert "cannot be split" in refusal(few)


def test_bad_archives_are_refused(tmp_path):
    """A broken archive; one that would write outside its folder."""
    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes(b"not an archive")
    assert "cannot be unpacked" in refusal(broken)
    escape = tmp_path / "escape.tar"
    with tarfile.open(escape, "w") as file:
        entry = tarfile.TarInfo("../escaped.png")
        entry.size = 1
        file.addfile(entry, io.BytesIO(b"x"))
    assert "cannot be unpacked" in refusal(escape)
    assert not (tmp_path / "escaped.png").exists()


def test_a_split_survives_its_file(tmp_path):
    """What is written is what is read; another file is refused."""
    part = prepare()["validation"]
    save_split(part, tmp_path / "a.safetensors")
    read = load_split(tmp_path / "a.safetensors")
    assert torch.equal(read.images, part.images)
    assert torch.equal(read.ids, part.ids)
    assert read.classes == part.classes
    (tmp_path / "b.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match=r"b\.safetensors is no split"):
        load_split(tmp_path / "b.safetensors")


def test_shares_are_disjoint_and_complete():
    """Workers see every image once."""
    part = prepare()["test"]
    ids = torch.cat([part.share(rank, 4).ids for rank in range(4)])
    assert sorted(ids.tolist()) == sorted(part.ids.tolist())


def test_pixels_fill_the_range():
    """0 and 255 become −1 and 1 exactly, which the encoder fires at with certainty."""
    assert normalise(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_augmentation_depends_on_the_sample_only():
    """Same (seed, epoch, id), same crop, whatever the batch; another epoch, another crop."""
    images = torch.arange(6 * 3 * 8 * 8).remainder(251).to(torch.uint8).view(6, 3, 8, 8)
    ids = torch.arange(6)
    whole = augment(images, ids, 0, 1)
    part = augment(images[2:4], ids[2:4], 0, 1)
    assert torch.equal(whole[2:4], part)
    assert not torch.equal(whole, augment(images, ids, 0, 2))
    assert not torch.equal(whole, augment(images, ids, 1, 1))
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    windows = [padded[0, :, r : r + 8, c : c + 8] for r in range(9) for c in range(9)]
    assert any(torch.equal(whole[0], w) or torch.equal(whole[0], w.flip(-1)) for w in windows)
