"""`python -m pipeline.convert`: the table, the file, and what is refused."""

import re
import shutil

import pytest
import torch

import stdb
from pipeline import convert
from pipeline.learning.networks import build_ann, load_weights, save_weights
from pipeline.overlays import apply
from tests.pipeline.support import NORMED, ROOT, make_files


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Prepared images, the weights of a network with batch norm, and params.yaml with its name."""
    _, parts = make_files(tmp_path)
    torch.manual_seed(3)
    ann = build_ann(NORMED, parts["train"])
    with torch.no_grad():
        ann.conv1_norm.running_mean.uniform_(-1, 1)
    save_weights(ann.state_dict(), tmp_path / "models/ann.safetensors")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text(
        "network: {architecture: vgg5, width: 0.1, hidden: 16, normalisation: batch, pooling: max}"
    )
    apply(tmp_path / "own.yaml")
    return tmp_path, ann, parts


def test_the_table_has_a_row_for_each_place(here, capsys):
    """In columns; no file is written where none is asked for."""
    folder, _, _ = here
    before = sorted(folder.rglob("*"))
    assert convert.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [tuple(re.split(r" {2,}", line)) for line in lines]
    assert rows[0] == ("layer", "found", "became")
    assert ("conv1", "Conv2d", "convolution conv1") in rows
    assert [row[0] for row in rows].count("output") == 1
    assert len({line.index(row[1]) for line, row in zip(lines, rows, strict=True)}) == 1
    assert sorted(folder.rglob("*")) == before


def test_the_file_is_the_converted_network(here, capsys):
    """As stdb.load reads it: the ANN's weights, norms folded, thresholds 1."""
    folder, ann, parts = here
    assert convert.main(["-o", "snn.safetensors"]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == "snn.safetensors: 5 spiking layers, thresholds 1; stdb.load reads it"
    snn, about = stdb.load(folder / "snn.safetensors")
    assert set(snn.thresholds.values()) == {1.0}
    assert about["classes"] == parts["train"].classes
    assert about["network"]["normalisation"] == "batch"
    expected = stdb.convert(ann, stdb.PoissonEncoder(0)).eval()
    images = parts["test"].pixels()[:5]
    assert torch.equal(snn(images, 6), expected(images, 6))


def test_weights_of_ones_own(here):
    """Another file than models/ann.safetensors."""
    folder, _, parts = here
    other = build_ann(NORMED, parts["train"])
    torch.save(other.state_dict(), "other.pt")
    assert convert.main(["--weights", "other.pt", "-o", "snn"]) == 0
    found, _ = stdb.load(folder / "snn")
    load_weights(other, folder / "other.pt")
    assert torch.equal(found.net.fc1.weight, other.fc1.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "models/ann.safetensors").unlink(), "-m pipeline.train_ann makes it"),
        (lambda f: shutil.rmtree(f / "data"), "python -m pipeline.prepare_data makes it"),
        (lambda f: (f / "params.yaml").unlink(), "params.yaml is missing"),
        (lambda f: (f / "models/ann.safetensors").write_bytes(b"x"), "cannot be read"),
    ],
)  # fmt: skip
def test_what_is_missing_is_one_line(here, capsys, change, message):
    """Exit status 1, no file."""
    folder, _, _ = here
    change(folder)
    assert convert.main(["-o", "snn"]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (folder / "snn").exists()


def test_what_has_no_spiking_form_is_refused_all_at_once(here, capsys, monkeypatch):
    """Every place, as stdb.convert says it."""
    folder, _, _ = here
    (folder / "mine_refused.py").write_text(
        "from torch import nn\n"
        "def build(in_channels, image_size, num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.GELU(), nn.Linear(8, 8), "
        "nn.SiLU(), nn.Linear(8, num_classes))\n"
    )
    monkeypatch.syspath_prepend(folder)
    (folder / "own.yaml").write_text("network: {architecture: 'mine_refused:build'}")
    apply(folder / "own.yaml")
    import mine_refused

    torch.save(mine_refused.build(1, 8, 10).state_dict(), "mine.pt")
    assert convert.main(["--weights", "mine.pt"]) == 1
    said = capsys.readouterr().err
    assert "2 places have no spiking form" in said
    assert "GELU" in said
    assert "SiLU" in said


def test_help_says_what_it_does(capsys):
    """And does nothing."""
    with pytest.raises(SystemExit) as caught:
        convert.parse(["--help"])
    assert caught.value.code == 0
    assert "what each place of it became" in capsys.readouterr().out
