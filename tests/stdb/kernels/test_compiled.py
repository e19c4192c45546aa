"""Kernels are compiled once and kept; where nothing can be kept, they are compiled all the same."""

import subprocess
import sys

PROGRAM = """
import warnings
from numba.core.caching import CacheImpl
CacheImpl._locator_classes = []  # as where neither the package nor the home can be written
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("default")
    import stdb
    import torch
    from stdb import kernels
    packed = kernels.fire(torch.full((3, 9), 0.4), torch.zeros(9), 0.5, 1.0)
assert packed.tolist() == [[0, 0], [255, 1], [255, 1]], packed
print(*(w.message for w in said if "compiled" in str(w.message)), sep="\\n")
"""


def test_nothing_can_be_written():
    """It works, and is said once."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("neither the package's folder nor the home's can be written") == 1
    assert "set NUMBA_CACHE_DIR" in done.stdout
