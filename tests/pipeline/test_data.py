"""Data sets: sources, splits, and what is refused."""

import gzip
import hashlib
import io
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import pipeline.data.archives
import pipeline.data.sources
from pipeline.data import (
    DataError,
    Files,
    load_split,
    save_split,
    subset,
    worker_batches,
)
from pipeline.data.sources import read_source
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


@pytest.fixture
def offline(monkeypatch):
    """No network."""

    def refuse(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("source", "place", "files"),
    [
        ("mnist", "MNIST/raw", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]),
        ("fashion_mnist", "FashionMNIST/raw", ["train-labels-idx1-ubyte.gz"]),
        ("cifar10", "", ["https://", "cifar-10-python.tar.gz"]),
        ("cifar100", "", ["https://", "cifar-100-python.tar.gz"]),
    ],
)
def test_without_a_network_it_is_said_which_file_goes_where(
    tmp_path, offline, source, place, files
):
    """And what else there is to do."""
    with pytest.raises(DataError) as caught:
        read_source(params(source=source, path=str(tmp_path)))
    said = str(caught.value)
    assert f"into {tmp_path / place}, or set data.source to folder" in said
    assert all(name in said for name in files)


def test_mnist_files_put_there_by_hand_are_read(tmp_path, offline, monkeypatch):
    """In the format that they are published in."""
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    pixels = {
        name: random.integers(0, 256, (n, 28, 28)) for name, n in (("train", 30), ("t10k", 9))
    }
    resources = []
    for name, of_split in pixels.items():
        labels = np.arange(len(of_split)) % 10
        for kind, values, magic in (("images-idx3", of_split, 2051), ("labels-idx1", labels, 2049)):
            path = raw / f"{name}-{kind}-ubyte.gz"
            head = np.array([magic, *values.shape], ">i4").tobytes()
            path.write_bytes(gzip.compress(head + values.astype(np.uint8).tobytes()))
            resources.append((path.name, md5(path)))
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    (images, labels), (test_images, _), classes = read_source(
        params(source="mnist", path=str(tmp_path))
    )
    np.testing.assert_array_equal(images[:, 0], pixels["train"])
    np.testing.assert_array_equal(test_images[:, 0], pixels["t10k"])
    assert labels.tolist() == [k % 10 for k in range(30)]
    assert len(classes) == 10


def test_a_cifar_archive_put_there_by_hand_is_read(tmp_path, offline, monkeypatch):
    """In the format that it is published in."""
    of_class = torchvision.datasets.CIFAR10
    random = np.random.default_rng(0)
    names = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    pixels = {name: random.integers(0, 256, (4, 3, 32, 32), np.uint8) for name in names}
    inside = tmp_path / of_class.base_folder
    inside.mkdir()
    for name, values in pixels.items():
        batch = {"data": values.reshape(4, -1), "labels": [0, 1, 2, 3]}
        (inside / name).write_bytes(pickle.dumps(batch))
    classes = [f"class {k}" for k in range(10)]
    (inside / "batches.meta").write_bytes(pickle.dumps({"label_names": classes}))
    digests = {path.name: md5(path) for path in inside.iterdir()}
    with tarfile.open(tmp_path / of_class.filename, "w:gz") as archive:
        archive.add(inside, of_class.base_folder)
    shutil.rmtree(inside)
    monkeypatch.setattr(of_class, "tgz_md5", md5(tmp_path / of_class.filename))
    monkeypatch.setattr(of_class, "train_list", [[n, digests[n]] for n in names[:5]])
    monkeypatch.setattr(of_class, "test_list", [[names[5], digests[names[5]]]])
    monkeypatch.setattr(of_class, "meta", of_class.meta | {"md5": digests["batches.meta"]})
    (images, _), (test_images, labels), found = read_source(
        params(source="cifar10", path=str(tmp_path))
    )
    np.testing.assert_array_equal(images, np.concatenate([pixels[n] for n in names[:5]]))
    np.testing.assert_array_equal(test_images, pixels["test_batch"])
    assert labels.tolist() == [0, 1, 2, 3]
    assert found == classes


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


def test_some_samples_are_drawn_by_seed(streamed):
    """Of a split in memory or in files; all where there are not as many."""
    for part in (splits["train"] for splits in streamed):
        drawn = [subset(part, 4, seed).ids.tolist() for seed in (0, 0, 1)]
        assert drawn[0] == drawn[1] != drawn[2]
        assert len(set(drawn[0])) == 4
        assert subset(part, None, 0) is subset(part, 10_000, 0) is part


def test_shares_are_disjoint_and_complete():
    """Workers see every image once."""
    for world in (1, 2, 4, 30):
        batches = [batch for rank in range(world) for batch in worker_batches(450, 16, rank, world)]
        assert sorted(torch.cat(batches).tolist()) == list(range(450))


def test_shares_are_of_the_same_batches_for_any_number_of_workers():
    """So that products round alike."""
    alone = [batch.tolist() for batch in worker_batches(450, 16, 0, 1)]
    assert [len(batch) for batch in alone] == [16] * 28 + [2]
    for world in (2, 3, 40):
        found = [b.tolist() for rank in range(world) for b in worker_batches(450, 16, rank, world)]
        assert sorted(found) == sorted(alone)


# -- data sets that stay in their files ------------------------------------------------------------


@pytest.fixture
def streamed(tmp_path, monkeypatch):
    """A folder of images of several sizes, in memory and streamed, as a repository has them."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "images", ("a", "b"), size=(20, 10))
    make_folder(tmp_path / "images", ("c",), size=(8, 8))
    found = []
    for stream in (False, True):
        parts = prepare(source="folder", path="images", image_size=8, stream=stream)
        Path("data/prepared").mkdir(parents=True, exist_ok=True)
        for name, part in parts.items():
            save_split(part, Path(f"data/prepared/{name}.safetensors"))
        found.append(
            {n: load_split(tmp_path / f"data/prepared/{n}.safetensors", readers=2) for n in parts}
        )
    return found


def assert_same(a, b):
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.labels, b.labels)
    assert torch.equal(a.ids, b.ids)
    assert a.classes == b.classes


def test_no_images_are_none_wherever_they_are(streamed):
    """What a worker takes that has no share."""
    for part in (splits["train"] for splits in streamed):
        taken = part.take(torch.arange(0))
        assert (taken.images.shape, taken.images.dtype) == ((0, 3, 8, 8), torch.uint8)
        assert len(taken.labels) == len(taken.ids) == 0


def test_names_of_files_are_of_the_repository_that_a_split_is_linked_into(streamed, tmp_path):
    """As DVC does where its cache is a folder of its own."""
    path = tmp_path / "data/prepared/train.safetensors"
    kept = tmp_path / "cache/files/md5/12/34"
    kept.parent.mkdir(parents=True)
    path.rename(kept)
    path.symlink_to(kept)
    assert np.array_equal(load_split(path).names, streamed[1]["train"].names)


def test_every_split_has_an_image_of_a_rare_class(tmp_path):
    """Three are enough, as docs/images.md says, whatever the shares; others stay as drawn."""
    make_folder(tmp_path, ("a",), 300)
    make_folder(tmp_path, ("b",), 3)
    shares = {"test_fraction": 0.1, "validation_fraction": 0.1, "image_size": 8}
    for seed in range(3):
        parts = prepare(source="folder", path=str(tmp_path), seed=seed, **shares)
        ids = torch.cat([part.ids for part in parts.values()])
        assert sorted(ids.tolist()) == list(range(303))
        assert [int((part.labels == 1).sum()) for part in parts.values()] == [1, 1, 1]


@pytest.mark.parametrize("limit", [1346, 1340, 1337, 1336, 1000])
def test_any_number_of_training_images_may_be_kept(limit):
    """Also where so few go that they cannot be of every class; the test split is the same."""
    parts, whole = prepare(train_limit=limit), prepare()
    assert len(parts["train"]) + len(parts["validation"]) == limit
    assert torch.equal(parts["test"].ids, whole["test"].ids)
    used = torch.cat([part.ids for part in parts.values()])
    assert len(used.unique()) == len(used)


def test_a_streamed_split_has_the_images_of_one_in_memory(streamed):
    """Pixel by pixel, in every split; only the names of the files are kept."""
    memory, files = streamed
    for name, whole in memory.items():
        assert isinstance(files[name], Files)
        assert files[name].shape == whole.shape == (3, 8, 8)
        assert_same(files[name].take(torch.arange(len(whole))), whole)


@pytest.mark.parametrize("readers", [0, 1, 2])
def test_batches_come_in_their_order_whoever_reads_them(streamed, readers):
    """Also from the middle, as a resumed training asks for them."""
    memory, files = streamed
    part = files["train"]
    part = Files(part.names, part.labels, part.ids, part.classes, part.shape, readers)
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(3)).split(5)
    cpu = torch.device("cpu")
    expected = list(memory["train"].stream(order, cpu))
    for start in (0, 2):
        batches = list(part.stream(order[start:], cpu))
        for a, b in zip(batches, expected[start:], strict=True):
            assert_same(a, b)
    assert list(part.stream([], cpu)) == []


def test_what_is_too_large_for_the_memory_is_streamed(tmp_path, monkeypatch):
    """auto: by the bytes of the pixels."""
    make_folder(tmp_path / "images")
    there = params(source="folder", path=str(tmp_path / "images"), image_size=8)
    size = 36 * 3 * 8 * 8
    for limit, dimensions in ((size, 4), (size - 1, 1)):
        monkeypatch.setattr(pipeline.data.sources, "IN_MEMORY", limit)
        (images, _), _, _ = read_source(there)
        assert images.ndim == dimensions


def test_a_streamed_archive_is_unpacked_once(tmp_path, monkeypatch):
    """And only where its images are not in memory."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "images")
    with tarfile.open("images.tar", "w") as file:
        file.add("images", "images")
    there = {"source": "folder", "path": "images.tar", "image_size": 8}
    read_source(params(**there, stream=False))
    assert list(Path("data/unpacked").iterdir()) == []
    names = read_source(params(**there, stream=True))[0][0]
    assert all(Path(name).is_file() for name in names)
    monkeypatch.setattr(pipeline.data.archives, "_unpack", None)  # it would fail
    assert np.array_equal(read_source(params(**there, stream=True))[0][0], names)


def test_streamed_files_are_looked_at_before_a_training(tmp_path):
    """A file that is no image, and a missing image_size."""
    root = make_folder(tmp_path / "images")
    there = {"source": "folder", "path": str(root), "stream": True}
    with pytest.raises(DataError, match=r"data\.image_size is null; allowed for the 36 images"):
        prepare(**there)
    (root / "dog" / "3.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"3\.png cannot be read as an image"):
        prepare(**there, image_size=8)


def test_a_file_that_is_gone_is_named_when_it_is_read(streamed):
    """Also where another process reads it."""
    part = streamed[1]["train"]
    Path(part.names[4]).unlink()
    with pytest.raises(DataError, match=Path(part.names[4]).name):
        list(part.stream([torch.arange(8)], torch.device("cpu")))
