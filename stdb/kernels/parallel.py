"""Threads for the CPU's kernels: each gets a range of a kernel's outermost index.

Each output belongs to one range, so results do not depend on the number of threads.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch

WORK_PER_THREAD = 1 << 16  # elements; a second thread is not worth its start for less


def run(kernel: Callable[..., None], count: int, work: int, *arguments: Any) -> None:
    """``kernel(first, last, *arguments)`` over [0, count), shared by torch's number of threads.

    ``work`` is about how many elements are touched; a little of it is not worth a second thread.
    """
    threads = min(torch.get_num_threads(), count, work // WORK_PER_THREAD)
    if threads <= 1:
        kernel(0, count, *arguments)
        return
    edges = [count * k // threads for k in range(threads + 1)]
    tasks = [_pool(threads).submit(kernel, a, b, *arguments) for a, b in pairwise(edges)]
    for task in tasks:
        task.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that wait for work; a process makes them once."""
    return ThreadPoolExecutor(threads, "stdb")
