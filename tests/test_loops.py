"""docs/loops.md runs as it stands there."""

import re

import pytest
import torch

from tests.pipeline.support import ROOT

PLAIN, LIGHTNING, COMPILED = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs/loops.md").read_text(), re.DOTALL
)


@pytest.fixture(scope="module")
def after_the_loop():
    """What the page's names are after its first block."""
    names: dict = {}
    exec(PLAIN, names)
    return names


def test_a_plain_loop_learns(after_the_loop):
    """Better than its start, and far better than guessing."""
    assert after_the_loop["after"] >= after_the_loop["before"]
    assert after_the_loop["after"] > 0.5


def test_a_network_goes_into_lightning(after_the_loop, tmp_path, monkeypatch):
    """Its trainer steps the weights and the thresholds."""
    pytest.importorskip("lightning", reason="make setup-bench installs Lightning")
    monkeypatch.chdir(tmp_path)
    before = dict(after_the_loop["snn"].thresholds)
    exec(LIGHTNING, after_the_loop)
    after = after_the_loop["snn"].thresholds
    assert after != before
    assert min(after.values()) > 0


def test_a_network_is_left_out_of_what_is_compiled(after_the_loop):
    """The same probabilities."""
    with torch.no_grad():
        exec(COMPILED, after_the_loop)
        snn, images, steps = (after_the_loop[name] for name in ("snn", "images", "T"))
        expected = torch.softmax(snn(2 * images[:4], steps), 1)
    assert torch.allclose(after_the_loop["probabilities"], expected, atol=1e-6)


def test_autocast_gives_about_the_same(after_the_loop):
    """Logits of its type, within what bfloat16 can say."""
    snn, images = after_the_loop["snn"], after_the_loop["images"]
    snn.eval()
    with torch.no_grad():
        whole = snn(images, 4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = snn(images, 4)
    assert half.dtype == torch.bfloat16
    assert (half.argmax(1) == whole.argmax(1)).double().mean() > 0.9
