"""The check of a device's kernels: it passes where they are right, and finds where they are not."""

import pytest

import stdb
from stdb.kernels import neurons


def test_this_cpus_kernels_agree_with_plain_torch():
    """All surrogates, over U and over U/V, in all forms."""
    found = stdb.check_kernels("cpu", 3)
    assert found["shapes"] == 3
    assert found["largest difference"] < 1e-4
    assert {"constant", "bfloat16", "pooled", "masked"} < {*found["forms"]}


@pytest.mark.parametrize("name", ["fire", "backpropagate"])
def test_a_kernel_that_is_wrong_is_named(monkeypatch, name):
    """A spike more; gradients of twice the size."""
    right = getattr(neurons, name)

    def wrong(*arguments, **options):
        found = right(*arguments, **options)
        if name == "fire":
            return found ^ 1
        found.current.mul_(2)
        return found

    monkeypatch.setattr(neurons, name, wrong)
    what = "spikes" if name == "fire" else "gradients"
    with pytest.raises(RuntimeError, match=f"^{what} of "):
        stdb.check_kernels("cpu", 1)
