"""Which density decides between events and dense products, and the command that measures it."""

import json

import pytest
import torch
from torch import nn

import stdb
from stdb import tune
from stdb.kernels import densities
from stdb.kernels.densities import density_limit

BF16 = torch.bfloat16


def row(first):
    """Twelve different densities."""
    rows = iter(range(12))
    return {
        "densities": {
            precision: {
                kind: {size: first + next(rows) / 100 for size in densities.SIZES}
                for kind in ("convolution", "linear")
            }
            for precision in ("float32", "bfloat16")
        }
    }


@pytest.fixture
def table(monkeypatch, tmp_path):
    """A table with two rows in the place of the shipped one."""
    path = tmp_path / "densities.json"
    path.write_text(json.dumps({"avx512_bf16": row(0.1), "avx2": row(0.5)}))
    monkeypatch.setattr(densities, "TABLE", path)
    monkeypatch.setattr(tune, "TABLE", path)
    densities._measured.cache_clear()
    yield path
    densities._measured.cache_clear()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("convolution", (1 << 15) - 1, None, "avx512_bf16"), 0.10),
        (("convolution", 1 << 15, None, "avx512_bf16"), 0.11),
        (("convolution", 1 << 19, torch.float32, "avx512_bf16"), 0.12),
        (("linear", 10, torch.float64, "avx512_bf16"), 0.13),
        (("convolution", 10, BF16, "avx512_bf16"), 0.16),
        (("linear", 1 << 30, BF16, "avx2"), 0.61),
        (("linear", 1 << 30, BF16, "avx512"), 0.61),  # not measured: the next lower
        (("linear", 1 << 30, BF16, "amx"), 0.21),
        (("linear", 1 << 30, BF16, "other"), 0.61),  # nothing lower: the next higher
        (("linear", 10, None, "never"), 0.0),
        (("convolution", 10, BF16, "always"), 2.0),
        (("", 0, None, "always"), 0.0),
    ],
)
@pytest.mark.usefixtures("table")
def test_a_limit_is_that_of_instructions_precision_kind_and_size(arguments, expected):
    """As the table has it."""
    assert density_limit(*arguments) == pytest.approx(expected)


def test_unknown_instructions_are_refused():
    """With what is allowed."""
    with pytest.raises(ValueError, match=r"events is sse; allowed: amx, .*never, or"):
        density_limit("linear", 1, None, "sse")


def test_the_shipped_table_is_whole():
    """All twelve densities in every row, and on what they were measured."""
    table = json.loads(densities.TABLE.read_text())
    assert densities.instruction_set() in densities.INSTRUCTIONS
    for name, found in table.items():
        assert name in densities.INSTRUCTIONS
        assert found["measured"]["processor"]
        for precision in ("float32", "bfloat16"):
            for kind in ("convolution", "linear"):
                limits = found["densities"][precision][kind]
                assert limits.keys() == densities.SIZES.keys()
                assert all(0 <= limit <= 1 for limit in limits.values())


@pytest.mark.usefixtures("table")
def test_what_reads_a_value_decides_its_form():
    """Pooling and flattening make events for the product behind them; neurons for none."""
    ann = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 300, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(1200, 5), nn.ReLU(), nn.Linear(5, 2),
    )  # fmt: skip
    snn = stdb.convert(ann, stdb.DirectEncoder())
    snn.events = "avx512_bf16"
    by_kind = {}
    for node, limit in zip(snn.graph.nodes, snn.density_limits(), strict=True):
        by_kind.setdefault(node.operator.name, []).append(round(limit, 2))
    assert by_kind["convolution"] == [0.1, 0.1]
    assert by_kind["average pooling"] == [0.1]
    assert by_kind["flatten"] == [0.13]
    assert by_kind["linear"] == [0.13, 0.13]
    fires = [node.operator.fires for node in snn.graph.nodes]
    limits = [limit for limit, fire in zip(snn.density_limits(), fires, strict=True) if fire]
    assert limits == pytest.approx([0.1, 0.13, 0.13])  # of the products that read their spikes


def test_tuning_finds_where_the_forms_cross(monkeypatch, table):
    """At 15 % in between, from times that grow as e^(10·density) and not at all."""

    def seconds(_snn, x, events, _rounds):
        return 1.0 if events == "never" else torch.exp(torch.tensor(10 * (x.density - 0.15))).item()

    monkeypatch.setattr(tune, "seconds", seconds)
    monkeypatch.setattr(tune, "STEPS", 1)
    tune.main(["--rounds", "1", "--write"])
    found = json.loads(table.read_text())
    assert found["avx2" if densities.instruction_set() != "avx2" else "avx512_bf16"]
    for kinds in found[densities.instruction_set()]["densities"].values():
        assert kinds["convolution"]["small"] == pytest.approx(0.15, abs=0.01)
        assert kinds["linear"]["large"] == pytest.approx(0.15, abs=0.01)


def test_both_forms_are_timed():
    """The product and the gradient of its weights, with events and without."""
    snn = stdb.convert(
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()), stdb.DirectEncoder()
    )
    for density in (0.02, 0.5):
        x = tune.spikes((8, 6, 6), density)
        assert x.density == pytest.approx(density, abs=0.02)
        assert tune.seconds(snn, x, "always", 1) > 0
        assert tune.seconds(snn, x, "never", 1) > 0
