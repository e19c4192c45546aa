"""Functions compiled by numba at first use, kept on disk where anything can be written."""

import warnings
from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: ``numba.njit`` that lets other threads run, and keeps what it compiled.

    It is kept beside the source or in the user's cache folder (or ``NUMBA_CACHE_DIR``); where none
    of them can be written it is compiled anew in each process, which is said once.
    """

    def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            kernel: Callable[..., Any] = njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # numba's, of a cache without a place
            warnings.warn(
                "neither the package's folder nor the home's can be written, so kernels are "
                "compiled anew in each process (half a minute); set NUMBA_CACHE_DIR to a folder",
                stacklevel=1,  # this line's, so that it is said once
            )
            kernel = njit(nogil=True, **options)(function)
        return kernel

    return compile_function
