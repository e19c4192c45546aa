"""A stage whose accuracy is at chance level ends with a diagnosis of its layers."""

import pytest
from scipy.stats import binom

from pipeline.learning.evaluation import chance, collapse
from tests.pipeline.support import copy_of

ROWS = [
    {"layer": "conv1", "threshold": 0.5, "rate": 0.2, "correlation": 0.9, "dead": 0.1,
     "saturated": 0.0, "residual": 0.3, "hint": ""},
    {"layer": "conv2", "threshold": 90.0, "rate": 0.0, "correlation": 0.0, "dead": 1.0,
     "saturated": 0.0, "residual": 0.1, "hint": "conv2 fires 0.00% of the steps: lower it"},
    {"layer": "conv3", "threshold": 1.0, "rate": 0.0, "correlation": 0.0, "dead": 1.0,
     "saturated": 0.0, "residual": 0.0, "hint": "conv3 fires 0.00% of the steps: lower it"},
]  # fmt: skip


@pytest.mark.parametrize(("classes", "images"), [(10, 450), (100, 10_000), (2, 60)])
def test_guessing_rarely_gets_above_chance_level(classes, images):
    """Against the binomial distribution: about once in forty times."""
    level = chance(classes, images)
    above = binom.sf(int(level * images), images, 1 / classes)
    assert 0.005 < above < 0.04


def test_the_first_layer_that_is_ill_is_named():
    """All layers are shown; those above it only pass its silence on."""
    said = collapse(0.11, 10, 450, ROWS)
    assert said.startswith("test accuracy 11.0% is at chance level for 10 classes")
    assert all(row["layer"] in said for row in ROWS)
    assert said.endswith("the first layer that is ill: conv2 fires 0.00% of the steps: lower it")
    assert collapse(0.2, 10, 450, ROWS) == ""


def test_a_stage_that_falls_to_chance_level_says_where(finished, tmp_path):
    """Thresholds out of reach: every layer is silent, the lowest one is named."""
    repository = copy_of(finished, tmp_path / "repository")
    repository.set(evaluate_converted={"scales": [1.0e6]})
    said = repository.run("python", "-m", "pipeline.evaluate_converted").stdout
    assert "is at chance level for 10 classes; layer by layer" in said
    assert "the first layer that is ill: conv1 fires 0.00% of the steps" in said
