"""Malformed inputs, drawn by seed: door → name → content. A key that is added is tried by itself.

A door is a file that is read, or a network that is built; tests/pipeline/test_malformed.py opens
each as its stage does. Every one of these has to be refused.
"""

import copy
import csv
import io
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).parents[2]
SEED = 17

Content = str | bytes | Any  # a text, bytes, or what torch.save writes

# -- YAML: no file of parameters is any of these ---------------------------------------------------

DEEP = 5000
LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{name}: &{name} [*{before}, *{before}]\n"
    for before, name in zip("abcdefghijkl", "bcdefghijklm", strict=True)
)
NO_PARAMETERS: dict[str, str | bytes] = {
    "empty": "",
    "only a comment": "# nothing\n",
    "null": "null",
    "a list": "[1, 2]",
    "a word": "word",
    "a number": "3",
    "two documents": "--- {}\n--- {}\n",
    "brackets": "[" * DEEP,
    "braces": "{a: " * DEEP,
    "dashes": "- " * DEEP,
    "closed brackets": "a: " + "[" * DEEP + "]" * DEEP,
    "a billion laughs": LAUGHS,
    "an alias to itself": "a: &x [*x]",
    "an undefined alias": "a: *x",
    "an object": "a: !!python/object:os.system {}",
    "an object that is called": "a: !!python/object/apply:os.system [exit]",
    "an unknown tag": "a: !mine 1",
    "an integer that is none": "a: !!int word",
    "a float that is none": "a: !!float word",
    "a date that is none": "a: 2024-13-45",
    "a leap day that is none": "a: 2023-02-29",
    "binary": "a: !!binary YWJj",
    "a merge key": "<<: {a: 1}",
    "a list as key": "? [a]\n: 1",
    "a mapping as key": "? {a: 1}\n: 1",
    "no key": "null: 1",
    "a number as key": "1: 2",
    "a tab": "\ta: 1",
    "a tab before a value": "a:\t1\nb",
    "half a mapping": "a: [1, 2",
    "half a text": "a: 'x",
    "a colon too many": "a: b: c",
    "a directive": "%YAML 9.9\n---\na: 1",
    "no UTF-8": b"\xff\xfe\x80",
    "UTF-16": "stdb: 1".encode("utf-16"),
    "latin-1": "a: café".encode("latin-1"),
    "NUL": "a: \0",
    "an escape sequence": "a: \x1b[2J",
    "a form feed": "a: \x0c1",
    "4,400 digits": "a: " + "1" * 4400,
    "300 KiB": "a: 1\n" + "# filler\n" * 35000,
    "a zip": b"PK\x03\x04" + bytes(range(256)),
    "at": "@a",
    "a backtick": "`a`",
}

# -- values that no parameter takes, whatever its type ---------------------------------------------

NO_VALUE = {
    "a mapping": {"a": 1},
    "a list of lists": [[1]],
    "a list of null": [None],
    "a list of a list of words": [["a", "b"]],
    "an empty mapping": {},
}
NO_NUMBER = {
    "a word": "word",
    "text": "3",
    "NaN": math.nan,
    "infinite": math.inf,
    "minus infinite": -math.inf,
    "negative": -1,
    "huge": 10**40,
    "400 digits": 10**399,
    "true": True,
}
NO_COUNT = {"10^12": 10**12, "a fraction": 1.5, "zero and a half": 0.5}
DRAWN = 3  # of each of the above for each key
NO_IMAGES: dict[str, dict[str, Any]] = {  # of the section data
    "normalise": {
        "an unknown name": "imagenot",
        "a name in capitals": "ImageNet",
        "a number": 0.5,
        "mean alone": {"mean": [0.5]},
        "another key": {"mean": [0.5], "std": [0.5], "min": [0]},
        "no channels": {"mean": [], "std": []},
        "numbers in the place of lists": {"mean": 0.5, "std": 0.5},
        "more means": {"mean": [0.5, 0.5], "std": [0.5]},
        "std zero": {"mean": [0.5], "std": [0]},
        "std negative": {"mean": [0.5], "std": [-0.5]},
        "std NaN": {"mean": [0.5], "std": [math.nan]},
        "std tiny": {"mean": [0.5], "std": [1e-300]},
        "of 0 … 255": {"mean": [123.7], "std": [58.4]},
        "infinite": {"mean": [math.inf], "std": [0.5]},
        "400 digits": {"mean": [10**399], "std": [0.5]},
        "words": {"mean": ["0.5"], "std": ["0.5"]},
        "true": {"mean": [True], "std": [0.5]},
        "null inside": {"mean": [None], "std": [0.5]},
        "lists of lists": {"mean": [[0.5]], "std": [[0.5]]},
    },
    "image_size": {
        "one of a pair": [8],
        "three": [8, 8, 8],
        "a pair with zero": [8, 0],
        "a pair with a word": [8, "8"],
        "a pair with a fraction": [8, 8.5],
        "a pair with true": [8, True],
        "a pair too large": [8, 4097],
        "text of a pair": "8x8",
    },
    "resize": {
        "without image_size": 256,
        "zero": 0,
        "a pair": [256, 256],
        "a word": "256",
        "true": True,
        "huge": 10**40,
    },
}

PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))


def dumped(value: Any) -> str:
    return yaml.dump(value, Dumper=yaml.CSafeDumper, sort_keys=False)


def params_files() -> Iterator[tuple[str, str | bytes]]:
    """What is no params.yaml, and params.yaml with one value wrong."""
    yield from NO_PARAMETERS.items()
    draw = random.Random(SEED)
    for section, keys in PARAMS.items():
        for key, good in keys.items():
            wrong = draw.sample(sorted(NO_VALUE.items()), 2)
            if isinstance(good, int | float) and not isinstance(good, bool):
                wrong += draw.sample(sorted(NO_NUMBER.items()), DRAWN)
            if type(good) is int and key not in ("seed", "decay"):
                wrong += draw.sample(sorted(NO_COUNT.items()), 1)
            for name, value in wrong:
                changed = copy.deepcopy(PARAMS)
                changed[section][key] = value
                yield f"{section}.{key} is {name}", dumped(changed)
    yield from _images_and_networks()
    for section in PARAMS:
        for name, value in {"null": None, "a list": [], "a word": "word"}.items():
            yield f"{section} is {name}", dumped(PARAMS | {section: value})
    text = dumped(PARAMS)
    yield "a key twice", text + "\nstdb: {}\n"
    yield "an unknown section", text + "\nsection: {}\n"
    yield "a key with a line break", text + '\n"a\\nb": 1\n'
    yield "a key of 5,000 letters", text + f"\n? {'k' * 5000}\n: 1\n"


def _images_and_networks() -> Iterator[tuple[str, str]]:
    for key, wrongs in NO_IMAGES.items():
        for name, value in wrongs.items():
            yield f"data.{key}: {name}", dumped(PARAMS | {"data": PARAMS["data"] | {key: value}})
    smaller = {"image_size": [8, 12], "resize": 11}
    yield "data.resize below a side", dumped(PARAMS | {"data": PARAMS["data"] | smaller})
    for name in ("", "resnet19", "../resnet18", "fcn_resnet50", "k" * 5000):
        changed = copy.deepcopy(PARAMS)
        changed["network"]["architecture"] = f"torchvision:{name}"
        yield f"network.architecture is torchvision:{name[:20]}", dumped(changed)


# -- sweeps, overlays, dvc.yaml --------------------------------------------------------------------

SWEEP = yaml.safe_load((ROOT / "sweep/params.yaml").read_text(encoding="utf-8"))
WRONG_BEHIND_MANY = [1.0 + k / 5000 for k in range(5000)]
SPACES: dict[str, dict[str, Any]] = {
    "wrong behind 5,000": {"alpha": {"choice": [*WRONG_BEHIND_MANY, -1.0, 1.0]}},
    "a word behind 5,000": {"alpha": {"choice": [*WRONG_BEHIND_MANY, "x", 1.0]}},
    "scaled, wrong behind 5,000": {"alpha_100": {"choice": [*WRONG_BEHIND_MANY, 0.0, 1.0]}},
    "scaled, a word": {"alpha_100": {"choice": [1.0, "x", 2.0]}},
    "T too large in the middle": {"timesteps": {"choice": [1, 40000, 2]}},
    "T is zero, and scaled": {"timesteps": {"choice": [1, 0, 2]}, "beta_100": {"choice": [1.0]}},
    "T is a fraction": {"timesteps": {"uniform": [1, 5]}},
    "nothing": {},
    "unknown": {"nothing": {"choice": [1]}},
    "epochs": {"epochs": {"choice": [1]}},
    "no values": {"alpha": {"choice": []}},
    "two kinds": {"alpha": {"choice": [1.0], "uniform": [1, 2]}},
    "no kind": {"alpha": {}},
    "an unknown kind": {"alpha": {"normal": [0, 1]}},
    "both ends alike": {"alpha": {"uniform": [1, 1]}},
    "the larger first": {"alpha": {"uniform": [2, 1]}},
    "three ends": {"alpha": {"uniform": [1, 2, 3]}},
    "an infinite end": {"alpha": {"uniform": [1, math.inf]}},
    "NaN as an end": {"alpha": {"uniform": [1, math.nan]}},
    "logarithm of zero": {"alpha": {"log_uniform": [0, 1]}},
    "a grid with optuna": {"alpha": {"grid": [1.0]}},
    "both of a pair": {"alpha": {"choice": [1.0]}, "alpha_100": {"choice": [1.0]}},
    "a mapping as value": {"alpha": {"choice": [{"a": 1}]}},
    "an encoder that is none": {"encoder": {"choice": ["poisson", "rate"]}},
    "a space that is a list": [],  # type: ignore[dict-item]
}


def sweep_files() -> Iterator[tuple[str, str | bytes]]:
    """What is no sweep/params.yaml."""
    names = ("a billion laughs", "brackets", "empty", "a list", "NUL", "no UTF-8")
    yield from ((name, NO_PARAMETERS[name]) for name in names)
    for name, space in SPACES.items():
        yield name, dumped(SWEEP | {"space": space})
    draw = random.Random(SEED)
    for key in SWEEP:
        name, value = draw.choice(sorted(NO_VALUE.items())[:-1])
        yield f"{key} is {name}", dumped(SWEEP | {key: value})
    yield "grace is more than epochs", dumped(SWEEP | {"asha": {"grace": 9, "reduction": 3}})


OVERLAYS: dict[str, str | bytes] = {
    **{n: v for n, v in NO_PARAMETERS.items() if n not in ("a number as key",)},
    "a section that is a word": "stdb: word",
    "a section that is null": "stdb:",
    "a section that is a list": "stdb: [1]",
    "a value that is a mapping": "stdb: {alpha: {a: 1}}",
    "a mapping deeper": "stdb: {milestones: {a: {b: 1}}}",
    "an unknown key": "stdb: {alhpa: 1}",
    "an unknown section": "section: {}",
    "not allowed": "stdb: {alpha: -1}",
    "no number": "stdb: {alpha: .nan}",
    "a key twice": "stdb: {alpha: 1, alpha: 2}",
}
STAGES: dict[str, str | bytes] = {
    **NO_PARAMETERS,
    "no stages": "stages: {}",
    "stages that are a list": "stages: []",
    "another stage": "stages: {other: {cmd: x}}",
    "a stage that is null": "stages: {train_ann: }",
    "a stage that is a list": "stages: {train_ann: [1]}",
    "deps that are a word": "stages: {train_ann: {deps: word}}",
    "outs that are numbers": "stages: {train_ann: {outs: [1]}}",
    "params that are numbers": "stages: {train_ann: {params: [1.5]}}",
}

# -- what stages wrote -----------------------------------------------------------------------------

THRESHOLDS = {
    "architecture": "vgg5",
    "layers": [
        {"layer": name, "threshold": value, "balanced": True}
        for name, value in {
            "conv1": 2.0,
            "conv2": 0.7,
            "conv3": 0.6,
            "fc1": 0.5,
            "fc2": 0.4,
        }.items()
    ],
}
JSON_FILES: dict[str, Any] = {
    "models/thresholds.json": THRESHOLDS,
    "models/conversion.json": {"timesteps": 8, "scale": 0.3},
    ".results/runs.json": {"train_ann": {"seconds": 1.0, "ended": "now", "machine": "here"}},
    **{
        f"metrics/{name}.json": json.loads((ROOT / f"metrics/{name}.json").read_text("utf-8"))
        for name in ("data", "train_ann", "evaluate_converted", "finetune_stdb")
    },
}
OPEN = ("ended", "machine", "architecture", "classes")  # any text is right there
NO_LEAF = {"a mapping": {"a": 1}, "a list": [[1]]}
NO_JSON_NUMBER = {
    "a word": "word",
    "true": True,
    "NaN": math.nan,
    "infinite": math.inf,
    "below −1": -5,
    "a list": [1],
}


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the scalars are."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs:
        if isinstance(inner, dict | list) and inner:
            yield from leaves(inner, (*path, key))
        else:
            yield (*path, key)


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with another scalar; without it where ``new`` is ``...``."""
    changed = copy.deepcopy(value)
    place = changed
    for key in path[:-1]:
        place = place[key]
    if new is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = new
    return changed


def json_files(good: Any) -> Iterator[tuple[str, str | bytes]]:
    """What is not this file: no JSON, and JSON with one thing wrong."""
    text = json.dumps(good)
    yield from {
        "empty": "",
        "half": text[: len(text) // 2],
        "a list": "[]",
        "null": "null",
        "a number": "1",
        "brackets": "[" * 100_000,
        "NUL": text + "\0",
        "no UTF-8": text.encode() + b"\xff",
        "a key twice": '{"a": 1, ' * 1 + f'"a": 2, {text[1:]}',
        "an unknown key": json.dumps(good | {"unknown": 1}),
        "something behind it": text + "x",
        "400 digits": '{"timesteps": ' + "9" * 4400 + "}",
    }.items()
    draw = random.Random(SEED)
    for path in leaves(good):
        name = ".".join(map(str, path))
        old = good
        for key in path:
            old = old[key]
        wrong = dict(NO_LEAF if isinstance(old, str) else NO_JSON_NUMBER)
        if isinstance(old, bool):
            wrong = {"a word": "yes", "a number": 1, "null": None}
        for kind in draw.sample(sorted(wrong), 2):
            yield f"{name} is {kind}", json.dumps(replaced(good, path, wrong[kind]))
        of_model = isinstance(path[-1], str) and path[-1] != "architecture" and len(path) < 3
        if of_model and path[0] != "spikes_per_neuron":
            yield f"{name} is missing", json.dumps(replaced(good, path, ...))


def more_thresholds() -> Iterator[tuple[str, str]]:
    """Thresholds whose form is right."""
    layers = THRESHOLDS["layers"]
    for name, rows in {
        "a layer twice": [*layers, layers[0]],
        "a layer missing": layers[:-1],
        "an unknown layer": [*layers[:-1], {**layers[-1], "layer": "fc9"}],
        "a layer without a name": [*layers[:-1], {**layers[-1], "layer": ""}],
        "no layers": [],
        "V is zero": [*layers[:-1], {**layers[-1], "threshold": 0}],
        "V is negative": [*layers[:-1], {**layers[-1], "threshold": -1.0}],
        "V overflows": [*layers[:-1], {**layers[-1], "threshold": 1e39}],
    }.items():
        if name != "V overflows":
            yield name, json.dumps({**THRESHOLDS, "layers": rows})


CSV_FILES = (
    *("train_ann", "finetune_stdb", "converted_accuracy", "finetuned_accuracy"),
    *("converted_diagnosis", "finetuned_diagnosis", "finetuned_confusion", "finetuned_exits"),
)


def csv_files(text: str) -> Iterator[tuple[str, str | bytes]]:
    """What is not this table."""
    rows = list(csv.reader(io.StringIO(text)))
    number = max(k for k, value in enumerate(rows[1]) if value.replace(".", "").isdigit())

    def written(changed: list[list[str]]) -> str:
        return "".join(",".join(row) + "\n" for row in changed)

    def with_value(value: str) -> str:
        return written([rows[0], [*rows[1][:number], value, *rows[1][number + 1 :]], *rows[2:]])

    yield from {
        "empty": "",
        "no rows": written(rows[:1]),
        "a short row": written([*rows, rows[1][:-1]]),
        "a long row": written([*rows, [*rows[1], "1"]]),
        "a word": with_value("word"),
        "NaN": with_value("nan"),
        "infinite": with_value("inf"),
        "nothing": with_value(""),
        "NUL": with_value("\0"),
        "no UTF-8": text.encode() + b"\xff",
    }.items()


# -- networks and weights --------------------------------------------------------------------------

NETWORKS = {
    "no such function": "",
    "a syntax error": "def build(:\n",
    "an import error": "import no_such_module\n",
    "raises at import": "raise RuntimeError('mine')\n",
    "ends Python at import": "import sys\nsys.exit(3)\n",
    "other names": "def build(channels, size, classes):\n    return None\n",
    "no arguments": "def build():\n    return None\n",
    "no function": "build = 3\n",
    "returns None": "def build(**_):\n    pass\n",
    "returns a number": "def build(**_):\n    return 3\n",
    "returns a class": "from torch import nn\ndef build(**_):\n    return nn.ReLU\n",
    "raises": "def build(**_):\n    raise KeyError('mine')\n",
    "asserts": "def build(num_classes, **_):\n    assert num_classes == 3, 'three\\nonly'\n",
    "divides by zero": "def build(**_):\n    return 1 / 0\n",
    "ends Python": "def build(**_):\n    exit()\n",
    "recurses": "def build(**k):\n    return build(**k)\n",
}
FORWARD = {  # of a module
    "seven logits": "return x.flatten(1)[:, :7]",
    "maps": "return x.flatten(1)[:, :10, None]",
    "one image": "return x[:1].flatten(1)[:, :10]",
    "nothing": "return None",
    "two values": "return x.flatten(1)[:, :10], x",
    "a list": "return x.flatten(1)[:, :10].tolist()",
    "NaN": "return x.flatten(1)[:, :10] * float('nan')",
    "infinite": "return x.flatten(1)[:, :10] + float('inf')",
    "integers": "return x.flatten(1)[:, :10].long()",
    "complex": "return x.flatten(1)[:, :10] * 1j",
    "three channels": "return torch.conv2d(x, torch.zeros(4, 3, 3, 3))",
    "raises": "raise ValueError('mine')",
    "ends Python": "sys.exit()",
    "needs more": "return self.missing(x)",
}
MODULE = """
import sys
import torch
from torch import nn
class Mine(nn.Module):
    def forward(self, x):
        {}
def build(in_channels, image_size, num_classes):
    return Mine()
"""


def networks() -> Iterator[tuple[str, str]]:
    """Modules whose ``build`` is no network for ten classes of (1, 8, 8)."""
    yield from NETWORKS.items()
    for name, forward in FORWARD.items():
        yield f"gives {name}", MODULE.format(forward)


class Pickled:
    """An object that no weights file may hold."""


def weights_files(good: dict[str, torch.Tensor]) -> Iterator[tuple[str, Content]]:
    """What torch.save writes, or bytes, of no weights of the network that ``good`` are of."""
    first, *others = good
    rest = {name: good[name] for name in others}
    shape = good[first].shape
    for name, tensor in {
        "NaN": torch.full(shape, math.nan),
        "infinite": torch.full(shape, math.inf),
        "beyond float32": torch.full(shape, 1e300, dtype=torch.float64),
        "complex": torch.zeros(shape, dtype=torch.complex64),
        "integers": torch.zeros(shape, dtype=torch.int64),
        "bytes": torch.zeros(shape, dtype=torch.uint8),
        "booleans": torch.zeros(shape, dtype=torch.bool),
        "quantised": torch.quantize_per_tensor(torch.zeros(shape), 0.1, 0, torch.qint8),
        "sparse": torch.zeros(shape).to_sparse(),
        "meta": torch.zeros(shape, device="meta"),
        "another shape": torch.zeros(7),
        "a scalar": torch.tensor(1.0),
    }.items():
        yield f"a tensor that is {name}", {first: tensor, **rest}
    yield from {
        "a tensor missing": rest,
        "a tensor more": {**good, "more": torch.zeros(1)},
        "other names": {f"other.{name}": value for name, value in good.items()},
        "mixed prefixes": {first: good[first], **{f"module.{n}": v for n, v in rest.items()}},
        "an empty dict": {},
        "a list": list(good.values()),
        "a tensor": good[first],
        "a number": 3,
        "None": None,
        "numbers": dict.fromkeys(good, 1.0),
        "no names": dict(enumerate(good.values())),
        "an object": {**good, "object": Pickled()},
        "an object alone": Pickled(),
        "an empty container": {"state_dict": {}},
        "a container of a container": {"model": {"model": {"model": {"model": {"model": good}}}}},
        "a number beside": {**good, "epoch": 3},
        "bytes: empty": b"",
        "bytes: text": b"weights",
        "bytes: a zip": b"PK\x03\x04" + bytes(100),
        "bytes: a pickle": b"\x80\x04\x95",
    }.items()


SAFETENSORS: dict[str, bytes] = {
    "empty": b"",
    "text": b"weights of a network",
    "a huge header": (2**62).to_bytes(8, "little") + b"{}",
    "a header that is none": (5).to_bytes(8, "little") + b"{{{{{",
    "a tensor beyond the end": (58).to_bytes(8, "little")
    + b'{"a": {"dtype": "F32", "shape": [9], "data_offsets":[0,36]}}'[:58],
}

# -- all of them -----------------------------------------------------------------------------------


def cases() -> Iterator[tuple[str, str, Content]]:
    """(door, name, content) of all that is a file of text."""
    doors: dict[str, Callable[[], Iterator[tuple[str, Content]]]] = {
        "params.yaml": params_files,
        "sweep.yaml": sweep_files,
        "overlay.yaml": lambda: iter(OVERLAYS.items()),
        "dvc.yaml": lambda: iter(STAGES.items()),
        "network.py": networks,
        "weights.safetensors": lambda: iter(SAFETENSORS.items()),
    }
    for door, contents in doors.items():
        for name, content in contents():
            yield door, name, content
    for door, good in JSON_FILES.items():
        for name, content in json_files(good):
            yield door, name, content
    for name, content in more_thresholds():
        yield "models/thresholds.json", name, content
    for table in CSV_FILES:
        door = f"plots/{table}.csv"
        for name, content in csv_files((ROOT / door).read_text(encoding="utf-8")):
            yield door, name, content
