"""Matrix products on the host by all of its cores.

BLAS divides a product by its rows and columns; of a Gram matrix there are few, and the sum is long. Dividing the sum
over threads that call BLAS on one core each is up to twice as fast (benchmarks/ntk.py).
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from threadpoolctl import ThreadpoolController

_limiting = threading.Lock()
"""BLAS's limit is the process's: callers take turns, or the last would not find the limit that the first found."""

_Part = TypeVar("_Part")
_Result = TypeVar("_Result")


@functools.cache
def num_threads() -> int:
    """Returns how many threads `in_parallel` uses: the cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _pool() -> tuple[ThreadPoolExecutor, ThreadpoolController]:
    return ThreadPoolExecutor(num_threads(), thread_name_prefix="jaxlin"), ThreadpoolController()


def in_parallel(function: Callable[[_Part], _Result], parts: Sequence[_Part]) -> list[_Result]:
    """Calls a function, which must not call `in_parallel` itself, for every part; BLAS uses one thread in each call.

    Args:
        function: Of one part.
        parts: Of the work.

    Returns:
        The results, in the order of the parts.
    """
    pool, blas = _pool()
    # Also for one part: threads of BLAS's own that have nothing to do would spin for a while, in the way of ours.
    with _limiting, blas.limit(limits=1, user_api="blas"):
        if len(parts) < 2:
            return [function(part) for part in parts]
        futures = [pool.submit(function, part) for part in parts]
        wait(futures)  # also if one fails: what the others write into may be used again
        return [future.result() for future in futures]


def split(size: int, parts: int) -> list[range]:
    """Returns the numbers below `size` as at most `parts` ranges of about equal length, none of them empty."""
    parts = max(1, min(parts, size))
    bounds = [size * i // parts for i in range(parts + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(bounds)]
