"""params.yaml: every parameter typed, documented and checked before anything starts."""

import re
from pathlib import Path

import pydantic
import pytest
import yaml

import stdb
from pipeline.params import Params, ParamsError, load_params

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "params.yaml").read_text()


def load(tmp_path, before="", after=""):
    assert before in TEXT, f"{before!r} is not in params.yaml"
    path = tmp_path / "params.yaml"
    path.write_text(TEXT.replace(before, after, 1))
    return load_params(path)


def test_the_defaults_are_valid_and_complete():
    """Each key of params.yaml has one documented field, and each field a key and a comment."""
    load_params(ROOT / "params.yaml")
    for section, keys in yaml.safe_load(TEXT).items():
        fields = Params.model_fields[section].annotation.model_fields
        assert set(keys) == set(fields)
        assert [name for name, field in fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("source: digits", "source: imagenot", "data.source is 'imagenot'; allowed: 'digits'"),
        ("source: digits", "source: folder", "data.path is null"),
        ("validation_fraction: 0.2", "validation_fraction: 1.0", "data.validation_fraction is 1.0"),
        ("resnet12 ", "vgg6 ", "network.architecture is 'vgg6'; allowed: vgg5, vgg9"),
        ("resnet12 ", "torchvision:resnet19 ", "allowed: torchvision:resnet18"),
        ("normalisation: none", "normalisation: layer", "network.normalisation is 'layer'"),
        ("pooling: average", "pooling: min", "network.pooling is 'min'; allowed: 'average' or"),
        ("activation: relu", "activation: gelu", "network.activation is 'gelu'; allowed: 'relu', "),
        (
            "activation: relu",
            "activation: qcfs",
            "network.levels is null with activation: qcfs; allowed: 1 to 65536",
        ),
        (
            "levels: null",
            "levels: 4",
            "network.levels is 4 with activation: relu; allowed: null, or a number with "
            "activation: qcfs",
        ),
        ("levels: null", "levels: 0", "network.levels is 0; allowed: greater than or equal to 1"),
        ("nesterov: false", "nesterov: 1", "train_ann.nesterov is 1; allowed: true, false"),
        (
            "momentum: 0.9\n  nesterov: false",
            "momentum: 0\n  nesterov: true",
            "train_ann.nesterov is true with momentum: 0; allowed: false, or a momentum",
        ),
        (
            "schedule: milestones ",
            "schedule: step ",
            "train_ann.schedule is 'step'; allowed: 'mile",
        ),
        ("label_smoothing: 0.0", "label_smoothing: 1", "train_ann.label_smoothing is 1; allowed: "),
        ("compile: auto", "compile: fast", "train_ann.compile is 'fast'; allowed: true, false or"),
        (
            "workers: auto ",
            "workers: [2, 32] ",
            "stdb.batch_size is 16 with cluster.workers: [2, 32]; allowed: at least an image for "
            "each worker, 32 or more",
        ),
        ("augment: false ", "augment: more ", "train_ann.augment is 'more'; allowed: true, "),
        ("cutout: 0 ", "cutout: -1 ", "train_ann.cutout is -1; allowed: greater than or equal to"),
        ("norm_images: 32", "norm_images: 1", "train_ann.norm_images is 1; allowed: greater than"),
        ("width: 0.25", "width: 0", "network.width is 0; allowed: greater than 0"),
        ("hidden: 128", "hidden: true", "network.hidden is True; allowed: integer"),
        ("epochs: 50", "epochs: 6.5", "train_ann.epochs is 6.5; allowed: integer"),
        ("momentum: 0.9", "momentum: much", "train_ann.momentum is 'much'; allowed: number"),
        (
            "timesteps: [8, 4] ",
            "timesteps: 0 ",
            "stdb.timesteps is 0; allowed: greater than or equal",
        ),
        ("alpha: 0.3", "alpha: 0", "stdb.alpha is 0; allowed: greater than 0"),
        ("alpha: 0.3", "alpha: .inf", "stdb.alpha is inf; allowed: a finite number"),
        ("beta: 0.01", "beta: -1", "stdb.beta is -1; allowed: greater than or equal to 0"),
        ("beta: 0.01", "betta: 0.01", "stdb.betta is no known key; allowed: epochs"),
        ("  beta: 0.01\n", "", "stdb.beta is missing"),
        ("leak: 1.0", "leak: 0", "stdb.leak is 0; allowed: greater than 0"),
        ("leak: 1.0", "leak: 1.1", "stdb.leak is 1.1; allowed: less than or equal to 1"),
        ("threshold_scale: null", "threshold_scale: -0.5", "stdb.threshold_scale is -0.5"),
        ("surrogate: stdb", "surrogate: sigmoid", "or 'rectangle' or 'auto'"),
        (
            "surrogate: stdb ",
            "surrogate: auto ",
            "stdb.alpha is 0.3 with surrogate: auto; allowed: null",
        ),
        ("workers: auto", "workers: 0", "or 'auto'"),
        ("workers: auto", "workers: [2, 1]", "cluster.workers is [2, 1]; allowed: the smaller"),
        ("workers: auto", "workers: [2]", "cluster.workers is [2]"),
        ("restarts: 3", "restarts: -1", "cluster.restarts is -1; allowed: greater than or equal"),
        ("stream: auto", "stream: 1", "data.stream is 1; allowed: true, false or 'auto'"),
        ("use_gpu: auto", "use_gpu: maybe", "cluster.use_gpu is 'maybe'; allowed: true, false or"),
        ("data:\n", "dataset:\n", "dataset is no known key; allowed: data, network"),
        ("data:\n", "data: [\n", "is not valid YAML"),
    ],
)
def test_what_is_not_allowed_is_refused(tmp_path, before, after, message):
    """The message names the key, the value and what is allowed."""
    with pytest.raises(ParamsError) as caught:
        load(tmp_path, before, after)
    assert message in str(caught.value)


def test_a_surrogate_may_be_left_to_t(tmp_path):
    """With its numbers; those of one that is named may be left to it, too."""
    path = tmp_path / "params.yaml"
    lines = TEXT.splitlines(True)
    null = re.compile(r"^  (alpha|beta|over_threshold): \S+", re.M)
    path.write_text(null.sub(r"  \1: null", "".join(lines)))
    assert load_params(path).stdb.alpha is None
    path.write_text(path.read_text().replace("surrogate: stdb ", "surrogate: auto ", 1))
    params = load_params(path).stdb
    assert (params.surrogate, params.beta, params.over_threshold) == ("auto", None, None)


NEW = [  # keys that 0.1.0 did not have
    f"  {key}: "
    for key in (
        *("normalisation", "pooling", "activation", "levels", "norm_images", "schedule"),
        *("nesterov", "label_smoothing", "cutout", "compile", "distil", "events", "method"),
        *("per", "initial_membrane", "bias_correction"),
    )
]


def test_a_file_of_0_1_0_is_read_as_it_was_meant(tmp_path):
    """Without the keys that came later, which then have the paper's values."""
    path = tmp_path / "params.yaml"
    lines = [line for line in TEXT.splitlines(True) if not line.startswith(tuple(NEW))]
    assert len(TEXT.splitlines()) - len(lines) == len(NEW) + 1  # schedule: of both trainings
    path.write_text("".join(lines))
    assert load_params(path) == load_params(ROOT / "params.yaml")


@pytest.mark.parametrize("name", ["torchvision:resnet18", "my_networks:small"])
def test_activations_are_of_built_in_networks(tmp_path, name):
    """Another network has its own, which the message says."""
    path = tmp_path / "params.yaml"
    text = TEXT.replace("resnet12 ", f"{name} ").replace("activation: relu", "activation: clip")
    path.write_text(text)
    said = f"network.activation is clip with architecture '{name}'; allowed: relu, or one of vgg5"
    with pytest.raises(ParamsError, match=re.escape(said)):
        load_params(path)


def test_all_mistakes_are_said_at_once(tmp_path):
    """A person mends a file in one go."""
    path = tmp_path / "params.yaml"
    path.write_text(TEXT.replace("alpha: 0.3", "alpha: -1").replace("leak: 1.0", "leak: 2"))
    with pytest.raises(ParamsError, match=r"(?s)stdb\.leak.*stdb\.alpha"):
        load_params(path)


def test_scientific_notation_is_a_number(tmp_path):
    """1e-4 is a string in YAML 1.1; people and DVC write it."""
    params = load(tmp_path, "learning_rate: 1.0e-4", "learning_rate: 2e-4")
    assert params.stdb.learning_rate == 2e-4


@pytest.mark.parametrize(("size", "found"), [("null", None), ("7", (7, 7)), ("[7, 9]", (7, 9))])
def test_a_size_is_a_side_or_height_and_width(tmp_path, size, found):
    """None leaves images as they are."""
    assert load(tmp_path, "image_size: null", f"image_size: {size}").data.size == found


def test_normalisation_by_name_or_by_numbers(tmp_path):
    """Or x/127.5 − 1."""
    before = "normalise: null"
    for text, found in {
        "null": stdb.Normalisation(),
        "cifar10": stdb.NORMALISATIONS["cifar10"],
        "{mean: [0, 0.5], std: [1, 0.2]}": stdb.Normalisation([0, 0.5], [1, 0.2]),
    }.items():
        assert load(tmp_path, before, f"normalise: {text}").data.normalisation == found


def test_a_key_that_stands_twice_is_refused(tmp_path):
    """YAML's own rule, the last one wins, would hide a mistake."""
    with pytest.raises(ParamsError, match="alpha stands twice"):
        load(tmp_path, "  alpha: 0.3", "  alpha: 0.3\n  alpha: 0.4")


def test_params_cannot_be_changed():
    """A stage cannot use other parameters than those that are tracked."""
    params = load_params(ROOT / "params.yaml")
    with pytest.raises(pydantic.ValidationError):
        params.stdb.alpha = 1.0


def test_a_missing_file_says_where_to_run(tmp_path):
    """Stages run from the root."""
    with pytest.raises(ParamsError, match="run from the root"):
        load_params(tmp_path / "params.yaml")
