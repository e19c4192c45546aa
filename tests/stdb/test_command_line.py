"""python -m stdb: from a CNN's files to a file, and what one does with that."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import stdb
from stdb import from_files
from stdb.__main__ import main

ROOT = Path(__file__).parents[2]

CNN = """
from torch import nn

def small(num_classes=3, image_size=None):
    torch_sees = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
                  nn.Flatten(), nn.Linear(8 * (image_size // 2) ** 2, num_classes)]
    return nn.Sequential(*torch_sees)

def nothing():
    return 3

def pair(**options):
    class Pair(nn.Sequential):
        def forward(self, x):
            return super().forward(x), x
    return Pair(*small(options["num_classes"], 8))

def grey(num_classes, in_channels, image_size):
    high, wide = (image_size, image_size) if isinstance(image_size, int) else image_size
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3, padding=1), nn.ReLU(), nn.Flatten(),
                         nn.Linear(4 * high * wide, num_classes))
"""
COLOURS = {"blue": 2, "green": 1, "red": 0}


def picture(colour: str, seed: int) -> Image.Image:
    """Noise, and one channel brighter."""
    pixels = np.random.default_rng(seed).integers(0, 128, (8, 8, 3), dtype=np.uint8)
    pixels[..., COLOURS[colour]] += 110
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CNN that tells colours, its weights, images by class, and the spiking network of them."""
    place = tmp_path_factory.mktemp("cnn")
    (place / "colours.py").write_text(CNN)
    for colour in COLOURS:
        (place / "photos" / colour).mkdir(parents=True)
        for seed in range(20):
            picture(colour, seed).save(place / "photos" / colour / f"{seed}.png")
    torch.manual_seed(0)
    namespace: dict = {}
    exec(CNN, namespace)  # the function of the file
    cnn = namespace["small"](3, 8)
    files = sorted((place / "photos").rglob("*.png"))
    pixels = stdb.Normalisation()(
        torch.from_numpy(np.stack([stdb.read_image(f, 3, None) for f in files]))
    )
    labels = torch.arange(3).repeat_interleave(20)
    optimiser = torch.optim.Adam(cnn.parameters(), 0.01)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(cnn(pixels), labels).backward()
        optimiser.step()
    assert (cnn.eval()(pixels).argmax(1) == labels).all()
    torch.save(cnn.state_dict(), place / "cnn.pth")
    return place


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """A command in that folder; its exit status and what it printed."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)

    def run(*arguments):
        status = main([str(a) for a in arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def converted(run, *more, out="snn.safetensors"):
    asked = ["--network", "colours:small", "--images", "photos", "--timesteps", "8", "-o", out]
    return run("convert", "cnn.pth", *asked, "--count", "30", *more)


def test_a_cnn_becomes_a_file_that_classifies(run):
    """What it became, how it decides images that did not calibrate; then images by name."""
    status, told, said = converted(run)
    assert status == 0, said
    assert "converted: 1 Conv2d, 1 BatchNorm2d, 1 ReLU, 1 MaxPool2d, 1 Flatten, 1 Linear" in told
    assert "1 spiking layers, calibrated by mse on 30 images" in told
    assert "100.0% of 30 other images: decided as by the CNN, at T = 8" in told
    assert "on these, right: CNN 100.0%, spiking network 100.0%" in told
    assert "reading 60 of 60 images" in said
    status, told, _ = run("predict", "snn.safetensors", "photos/red/3.png", "photos/blue/1.png")
    assert status == 0
    first, second = (line for line in told.splitlines() if "settled" in line)
    assert first.startswith("photos/red/3.png: red (")
    assert second.startswith("photos/blue/1.png: blue (")
    status, told, _ = run("predict", "snn.safetensors", "photos/red/3.png", "--confidence", "0.4")
    assert "of 8 steps on average" in told


def test_info_says_what_a_file_holds(run):
    """Steps, weights, images, classes, layers."""
    converted(run, "--normalise", "cifar10", out="other.safetensors")
    status, told, _ = run("info", "other.safetensors")
    assert status == 0
    assert "time steps     8\n" in told
    assert f"weights        {3 * 8 * 9 + 8 * 16 * 3}\n" in told
    assert "DirectEncoder, images 3×8×8" in told
    assert "(x/255 − [0.4914, 0.4822, 0.4465])" in told
    assert "classes        3: blue, green, red\n" in told
    assert [line.split()[0] for line in told.splitlines()[9:]] == ["0"]  # of the convolution's relu


def test_names_of_classes_and_sizes_may_be_given(run, folder):
    """A file of names where folders have none; pixels brought to a size and a mean."""
    (folder / "names.txt").write_text("sky\ngrass\nfire\n")
    more = ["--classes", "names.txt", "--normalise", "0.5,0.5,0.5/0.5,0.5,0.5"]
    status, told, said = converted(run, *more, "--image-size", "8", out="named.safetensors")
    assert status == 0, said
    assert "right" not in told  # whose folders are these?
    _, about = stdb.load(folder / "named.safetensors")
    assert about["classes"] == ["sky", "grass", "fire"]
    assert about["normalisation"] == stdb.Normalisation((0.5,) * 3, (0.5,) * 3)


def test_the_file_is_handed_on(run, folder):
    """torch.export's program gives the logits of the engine; NIR its graph."""
    converted(run)
    status, _, said = run("export", "snn.safetensors", "--pt2", "snn.pt2", "--timesteps", "4")
    assert status == 1
    assert "is max pooling, which remembers sums over time" in said
    assert not (folder / "snn.pt2").exists()
    torch.manual_seed(0)
    cnn = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    snn = stdb.convert(cnn.eval(), stdb.DirectEncoder())
    images = {"in_channels": 3, "image_size": 8}
    names = ["a", "b", "c"]
    stdb.save(snn, folder / "plain.safetensors", timesteps=4, classes=names, network=images)
    status, _, said = run("export", "plain.safetensors", "--pt2", "plain.pt2")
    assert status == 0, said
    pixels = torch.rand(5, 3, 8, 8) * 2 - 1
    program = torch.export.load(folder / "plain.pt2").module()
    assert torch.allclose(program(pixels), snn.eval()(pixels, 4), atol=1e-5)
    nir = pytest.importorskip("nir")
    assert run("export", "plain.safetensors", "--nir", "plain.nir")[0] == 0
    assert len(nir.read(folder / "plain.nir").nodes) == 7


REFUSED = {
    "no such function": (["--network", "colours:large"], "--network colours:large: AttributeError"),
    "no module": (["--network", "colours"], "allowed: MODULE:FUNCTION"),
    "no network": (["--network", "colours:nothing"], "gives a int; allowed: an nn.Module"),
    "no folder": (["--images", "cnn.pth"], "cnn.pth is no folder"),
    "no images": (["--images", "empty"], "has 0 image files; allowed: two or more"),
    "nowhere to write": (["-o", "no/snn.safetensors"], "no is no folder"),
    "a normalisation": (["--normalise", "grey"], "--normalise is 'grey'; allowed: imagenet"),
    "a resize of no size": (["--resize", "16"], "--resize is 16 with --image-size not given"),
    "a small resize": (["--resize", "4", "--image-size", "8"], "4 with --image-size 8x8; allowed"),
    "its own input": (["-o", "cnn.pth"], "cnn.pth is the file that is read"),
    "a folder as output": (["-o", "photos"], "photos cannot be written"),
    "two outputs": (["--network", "colours:pair"], "colours:pair gives tuple for 2 images"),
    "names that are no text": (["--classes", "cnn.pth"], "cnn.pth cannot be read as UTF-8 text"),
    "another number of classes": (["--classes", "two.txt"], "was built for 2 classes, a, b"),
    "other weights": (["--image-size", "4"], "belong to another network"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_a_line(run, folder, case):
    """With what is allowed; nothing is written."""
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "two.txt").write_text("a\nb\n")
    weights = (folder / "cnn.pth").read_bytes()
    more, message = REFUSED[case]
    status, _, said = converted(run, *more, out="refused.safetensors")
    assert status == 1
    assert message in said
    assert said.strip().count("\n") == said.count("reading")
    assert not (folder / "refused.safetensors").exists()
    assert (folder / "cnn.pth").read_bytes() == weights


@pytest.mark.parametrize(
    "more",
    [
        ["--grayscale", "--image-size", "8"],
        ["--image-size", "6x8", "--resize", "9", "--normalise", "imagenet"],
        ["--encoder", "poisson", "--normalise", "imagenet"],
    ],
    ids=lambda more: " ".join(more),
)
def test_predict_sees_what_calibrated(run, folder, more):
    """Pixel by pixel; the same prepared images, and the encoder's limits fit them."""
    taken = more[more.index("--image-size") + 1] if "--image-size" in more else "8"
    high, _, wide = taken.partition("x")
    channels = 1 if "--grayscale" in more else 3
    namespace: dict = {}
    exec(CNN, namespace)
    side = int(high) if not wide else (int(high), int(wide))
    torch.save(namespace["grey"](3, channels, side).state_dict(), folder / "other.pth")
    asked = ["--network", "colours:grey", "--images", "photos", "--timesteps", "4", "--count", "9"]
    calibrated = []
    read = from_files.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(from_files, "read", lambda *a: calibrated.append(read(*a)) or calibrated[-1])
        status, _, said = run("convert", "other.pth", *asked, "-o", "other.safetensors", *more)
    assert status == 0, said
    files = sorted((folder / "photos").rglob("*.png"))
    seen = stdb.Classifier(folder / "other.safetensors", "cpu").read(files)
    for image in calibrated[-1]:
        assert any(torch.equal(image, other) for other in seen)
    status, told, said = run("predict", "other.safetensors", *files[:2])
    assert status == 0, said
    assert told.count("settled") == 2


def test_hidden_folders_are_no_classes_and_links_are_followed(run, folder, tmp_path):
    """As the pipeline reads folders."""
    for colour in COLOURS:
        (tmp_path / colour).symlink_to(folder / "photos" / colour, target_is_directory=True)
    (tmp_path / ".hidden").mkdir()
    picture("red", 0).save(tmp_path / ".hidden/red.png")
    status, told, said = converted(run, "--images", tmp_path, out="linked.safetensors")
    assert status == 0, said
    assert "spiking network 100.0%" in told


def test_a_file_for_other_images_is_refused(run, folder):
    """Whose weights do not take what it says, or whose names are not one for each logit."""
    cnn = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    snn = stdb.convert(cnn.eval(), stdb.DirectEncoder())
    for side, names, message in (
        (9, list("abc"), "which its weights do not take"),
        (8, ["a"], "gives 3 logits; allowed: a name, as text, for each"),
    ):
        seen = {"in_channels": 3, "image_size": side}
        stdb.save(snn, folder / "odd.safetensors", timesteps=4, classes=names, network=seen)
        status, _, said = run("predict", "odd.safetensors", "photos/red/3.png")
        assert status == 1
        assert message in said


def test_a_terminal_without_our_letters_gets_what_it_can_show(folder, run):
    """As on Windows, where output goes into a file."""
    converted(run)
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(ROOT)}
    for command in (["info"], ["predict"]):
        more = ["photos/red/3.png"] if command == ["predict"] else []
        ended = subprocess.run(
            [sys.executable, "-m", "stdb", *command, "snn.safetensors", *more],
            cwd=folder, env=environment, capture_output=True,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr


def test_onnx_is_written(run, folder):
    """onnxruntime gives the engine's logits."""
    pytest.importorskip("onnxscript", reason="make setup-bench installs onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="make setup-bench installs onnxruntime")
    cnn = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    snn = stdb.convert(cnn.eval(), stdb.DirectEncoder()).eval()
    seen = {"in_channels": 3, "image_size": 8}
    stdb.save(snn, folder / "o.safetensors", timesteps=2, classes=list("abc"), network=seen)
    assert run("export", "o.safetensors", "--onnx", "o.onnx")[0] == 0
    session = runtime.InferenceSession(str(folder / "o.onnx"))
    pixels = torch.rand(2, 3, 8, 8) * 2 - 1
    (logits,) = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
    assert torch.allclose(torch.from_numpy(logits), snn(pixels, 2), atol=1e-4)


def test_images_of_several_sizes_want_one(run, folder, tmp_path):
    """Both are named, and what to do."""
    for name, side in (("a", 8), ("b", 9)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{name}.png")
    status, _, said = converted(run, "--images", tmp_path, out="refused.safetensors")
    assert status == 1
    assert "--image-size N brings all to one size" in said


def test_help_is_for_people():
    """In a process of its own, without what the pipeline needs."""
    command = [sys.executable, "-m", "stdb"]
    root = ROOT
    whole = subprocess.run([*command, "--help"], cwd=root, capture_output=True, text=True)
    assert whole.returncode == 0
    for name in ("convert", "info", "predict", "export"):
        assert f"\n    {name} " in whole.stdout
        one = subprocess.run([*command, name, "--help"], cwd=root, capture_output=True, text=True)
        assert one.returncode == 0
    none = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert none.returncode == 2
    assert "the following arguments are required: COMMAND" in none.stderr


def test_without_pillow_it_is_named(run, monkeypatch):
    """Which installs with the extra."""
    monkeypatch.setattr(stdb.images, "find_spec", lambda _: None)
    status, _, said = converted(run, out="refused.safetensors")
    assert status == 1
    assert "pip install 'stdb[images]'" in said
