"""`python -m pipeline.predict` on image files."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import stdb
from pipeline.predict import main
from tests.pipeline.support import ROOT

NETWORK = {"architecture": "vgg5", "in_channels": 1, "image_size": 8, "num_classes": 3,
           "width": 0.1, "hidden": 8}  # fmt: skip
CLASSES = ["cat", "dog", "hen"]


@pytest.fixture
def network(tmp_path):
    """A network whose classes differ, and its file."""
    torch.manual_seed(3)
    snn = stdb.convert(stdb.build_network(**NETWORK), stdb.PoissonEncoder(1)).eval()
    stdb.balance_thresholds(snn, torch.rand(8, 1, 8, 8) * 2 - 1, 10, percentile=90)
    stdb.save(snn, tmp_path / "snn", network=NETWORK, timesteps=12, classes=CLASSES)
    return snn


@pytest.fixture
def images(tmp_path):
    """Files of different kinds and sizes, one as the network sees it."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "exact.png")
    Image.new("RGB", (40, 30), (200, 30, 90)).save(tmp_path / "wide.jpg")
    return pixels, [str(tmp_path / "exact.png"), str(tmp_path / "wide.jpg")]


def test_each_image_gets_its_class_and_when_it_settled(network, images, tmp_path, capsys):
    """What the network says of the pixels; a line of probabilities by step."""
    pixels, files = images
    assert main(["--model", str(tmp_path / "snn"), *files]) == 0
    said = capsys.readouterr().out.splitlines()
    image = stdb.Normalisation()(torch.from_numpy(pixels)[None, None])
    decision = stdb.decide(network, image, 12, sample_ids=torch.zeros(1, dtype=torch.int64))
    best = int(decision.final.argmax())
    expected = f"{files[0]}: {CLASSES[best]} ({float(decision.final.max()):.1%}), settled at step "
    assert said[0] == expected + f"{int(decision.settled)} of 12"
    assert said[1].startswith("  t = 1 |")
    assert len(said[1].split("|")[1]) == 12
    assert said[2].startswith(f"{files[1]}: ")


def test_leaving_early_saves_steps_and_says_how_many(network, images, tmp_path, capsys):
    """The mean over the images, and its share of T."""
    _, files = images
    assert main(["--model", str(tmp_path / "snn"), "--confidence", "0.34", *files]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    steps = float(last.split()[0])
    assert last == f"{steps:.1f} of 12 steps on average, {1 - steps / 12:.0%} saved"
    assert steps < 12


def test_pictures_of_the_probabilities(network, images, tmp_path, capsys):
    """One for each image, also where two have the same name."""
    _, files = images
    folder = tmp_path / "plots"
    arguments = ["--model", str(tmp_path / "snn"), "--plot", str(folder), "--timesteps", "3"]
    assert main([*arguments, files[0], files[0]]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["1-exact.png", "2-exact.png"]
    assert Image.open(folder / "1-exact.png").size[0] > 300
    assert f"see {folder / '1-exact.png'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.png"], "none.png cannot be read as an image"),
        (["--model", "none", "none.png"], "none is missing; make repro makes it"),
    ],
)
def test_what_cannot_be_read_is_said(network, tmp_path, arguments, message, capsys):
    """By name, without a traceback."""
    model = [] if "--model" in arguments else ["--model", str(tmp_path / "snn")]
    assert main([*model, *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--confidence", "1.5"], "1.5; allowed: above 0, at most 1"),
        (["--timesteps", "0"], "0; allowed: 1 to 32767"),
        (["--timesteps", "x"], "x; allowed: 1 to 32767"),
    ],
)
def test_impossible_wishes_are_refused(arguments, message, capsys):
    """With what is allowed, before anything is read."""
    with pytest.raises(SystemExit):
        main([*arguments, "x.png"])
    assert message in capsys.readouterr().err


def test_the_pipelines_own_network_decides_on_its_own_images(finished, tmp_path, capsys):
    """models/snn.safetensors is all that it takes."""
    images = load_file(finished.root / "data/prepared/test.safetensors")["images"]
    Image.fromarray(images[0, 0].numpy()).save(tmp_path / "digit.png")
    model = str(finished.root / "models/snn.safetensors")
    assert main(["--model", model, str(tmp_path / "digit.png")]) == 0
    assert "of 3" in capsys.readouterr().out.splitlines()[0]


def test_a_network_that_does_not_say_its_images(tmp_path, capsys):
    """The engine saves any network; what its images are the caller has to have said."""
    snn = stdb.convert(stdb.build_network(**NETWORK), stdb.PoissonEncoder(1))
    stdb.save(snn, tmp_path / "snn", timesteps=12, classes=CLASSES)
    assert main(["any.png", "--model", str(tmp_path / "snn")]) == 1
    said = capsys.readouterr().err
    assert "does not say what images it is for: in_channels is None" in said


def test_the_network_of_cifar10_names_what_is_on_a_photo(tmp_path, monkeypatch, capsys):
    """Photos of the test split that the repository has; one larger, not square, as JPEG."""
    zoo = ROOT / "models/zoo"
    with Image.open(zoo / "cat.webp") as photo:
        wide = Image.new("RGB", (160, 128), "grey")
        wide.paste(photo.convert("RGB").resize((128, 128), Image.Resampling.BICUBIC), (16, 0))
        wide.save(tmp_path / "photo.jpg", quality=90)
    monkeypatch.chdir(ROOT)
    photos = [zoo / "cat.webp", zoo / "ship.webp", tmp_path / "photo.jpg"]
    assert main(["--network", "cifar10", *map(str, photos)]) == 0
    *told, steps = capsys.readouterr().out.splitlines()
    named = [line.split(": ")[1].split(" (")[0] for line in told if "settled" in line]
    assert named == ["cat", "ship", "cat"]
    assert steps.endswith("saved")
    assert (zoo / "cifar10.safetensors").stat().st_size <= 4 * 2**20
    assert "| T = 1 |" in (zoo / "cifar10.md").read_text()


def test_a_network_that_comes_with_the_repository(network, images, tmp_path, monkeypatch, capsys):
    """By its name, leaving at a probability of 0.9; where it is unknown, others are named."""
    zoo = tmp_path / "models/zoo"
    zoo.mkdir(parents=True)
    (tmp_path / "snn").rename(zoo / "animals.safetensors")
    monkeypatch.chdir(tmp_path)
    _, files = images
    assert main(["--network", "animals", *files]) == 0
    named = capsys.readouterr().out
    assert main(["--model", "models/zoo/animals.safetensors", "--confidence", "0.9", *files]) == 0
    assert capsys.readouterr().out == named
    assert main(["--network", "cars", *files]) == 1
    assert "there is no network 'cars' in models/zoo; allowed: animals" in capsys.readouterr().err
