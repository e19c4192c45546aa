"""Archives of images: one line for each that cannot be used, and nothing is written elsewhere."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from pipeline.data import DataError
from pipeline.data.sources import read_source
from pipeline.params import load_params
from tests.pipeline.archives import pack
from tests.pipeline.support import ROOT


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), shade).save(file, "PNG")
    return file.getvalue()


IMAGES = {f"{name}/{k}.png": png(k) for name in ("cat", "dog") for k in range(4)}


@pytest.fixture
def read(tmp_path, monkeypatch):
    """What is in an archive of these bytes, in a repository of its own."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))

    def read(content: bytes, **changes):
        (tmp_path / "images").write_bytes(content)
        changes = {"source": "folder", "path": "images", "image_size": 8} | changes
        return read_source(load_params(ROOT / "params.yaml").data.model_copy(update=changes))

    return read


@pytest.fixture
def refusal(tmp_path, read):
    """Why it is refused, in one line; nothing stays behind."""

    def refusal(content: bytes, **changes) -> str:
        with pytest.raises(DataError) as caught:
            read(content, **changes)
        unpacked = tmp_path / "data/unpacked"
        assert not unpacked.exists() or list(unpacked.iterdir()) == []
        said = str(caught.value)
        assert "\n" not in said
        assert len(said) < 600
        return said

    return refusal


KINDS = pytest.mark.parametrize("kind", ["zip", "", "gz"])


@KINDS
def test_an_empty_archive_is_said_to_be_empty(tmp_path, refusal, kind):
    """So is one that is no archive to be none."""
    assert refusal(pack(kind, {})) == (
        f"{tmp_path}/images is empty; allowed: an archive of class folders"
    )
    assert "cannot be unpacked (it is neither a tar nor a zip file" in refusal(b"")


@KINDS
def test_an_archive_in_an_archive_is_named(refusal, kind):
    """An uncompressed zip at the end of a tar, too, which looks like a zip from behind."""
    said = refusal(pack(kind, {"inner.zip": pack("zip", IMAGES)}))
    assert said.endswith("has 0 class folders; allowed: one folder per class, two or more; "
                         "unpack inner.zip first")  # fmt: skip
    assert "unpack cat.tar, dog.zip first" in refusal(pack(kind, {"dog.zip": b"", "cat.tar": b""}))


@KINDS
@pytest.mark.parametrize("name", ["/etc/x.png", "../x.png", "cat/../../x.png", "//x.png"])
def test_a_name_that_leads_elsewhere_is_refused(refusal, kind, name):
    """Also where an unpacker would take the harm out of it."""
    said = refusal(pack(kind, IMAGES | {name: png(0)}))
    assert f"it would write to {name}, outside its folder" in said


@KINDS
@pytest.mark.parametrize("name", ["cat/" + "n" * 4000, "cat/" + "n/" * 2000 + "n"])
def test_a_name_of_4000_characters_is_refused(refusal, kind, name):
    """Without telling all of it."""
    said = refusal(pack(kind, IMAGES | {name: png(0)}))
    assert f"a name in it has {len(name)} characters; allowed: 255 bytes" in said


def test_an_archive_larger_than_the_disk_is_refused(refusal):
    """By what its heads say, before it is written."""
    member = tarfile.TarInfo("cat/huge.png")
    member.size = 10**15
    assert "larger than what is free on the disk" in refusal(member.tobuf() + bytes(4096))


def test_a_zip_of_windows_has_folders(read):
    """Some separate them by backslashes; those are no way out either."""
    (images, labels), _, classes = read(
        pack("zip", {name.replace("/", "\\"): content for name, content in IMAGES.items()})
    )
    assert classes == ["cat", "dog"]
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2, 3] * 2
    assert labels.tolist() == [0] * 4 + [1] * 4
    with pytest.raises(DataError, match="outside its folder"):
        read(pack("zip", {"..\\x.png": png(0)}))


@KINDS
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_file_in_an_archive_is_named_as_it_is_there(tmp_path, read, kind, stream):
    """Not by the folder that it was unpacked to, which is gone."""
    bad = {"cat/1.png": b"no image", "dog/two\nlines.png": b"no image"}
    with pytest.raises(DataError) as caught:
        read(pack(kind, IMAGES | bad), stream=stream)
    assert str(caught.value).splitlines() == [
        f"2 faults in {tmp_path}/images:",
        f"  {tmp_path}/images/cat/1.png cannot be read as an image (it is in no known format)",
        f"  {tmp_path}/images/dog/two\\nlines.png cannot be read as an image (it is in no known "
        "format)",
    ]


@KINDS
def test_splits_in_an_archive(read, refusal, kind, capsys):
    """A single split around everything is not taken for a folder around everything."""
    parts = {f"{part}/{n}": c for part in ("train", "valid", "test") for n, c in IMAGES.items()}
    train, held, classes = read(pack(kind, {f"mine/{n}": c for n, c in parts.items()}))
    assert classes == ["cat", "dog"]
    assert [len(labels) for labels in (train[1], held.labels, held.validation[1])] == [8, 8, 8]
    assert "images: train/ is the train split" in capsys.readouterr().out
    alone, held, _ = read(pack(kind, {f"train/{n}": c for n, c in IMAGES.items()}))
    assert (len(alone[1]), held) == (8, None)
    assert "holds valid/" in refusal(pack(kind, {f"valid/{n}": c for n, c in IMAGES.items()}))


def test_names_in_an_old_tar_need_not_be_utf8(read):
    """Labels stay where they are."""
    (images, labels), _, _ = read(pack("gz", IMAGES | {"cat/caf\udce9.png": png(9)}))
    assert np.bincount(labels).tolist() == [5, 4]
    assert images[labels == 0, 0, 0, 0].tolist() == [0, 1, 2, 3, 9]
