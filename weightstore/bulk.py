"""Work on large ranges of host memory, spread over a few threads: copying them, above all.

Not left to torch, whose threads meet at a barrier after every tensor: on a host that is busy with something
else the barrier waits for a thread that was put aside, and hundreds of tensors wait hundreds of times
(measured on two busy cores: 0.3 GB/s instead of 6).

Invariant: when a function here returns or raises, none of its threads touches the memory any more.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

BATCH_BYTES: Final = 16 << 20
"""Bytes of one task: long enough to hide the hand-over, short enough to spread over threads."""
SMALL_BYTES: Final = 128 << 10
"""Copies below this are over before another thread could have taken them."""
MAX_THREADS: Final = 8
"""A few cores saturate memory; the others belong to the training or the engine."""


class Span(NamedTuple):
    """`nbytes` bytes at two addresses of this process, and the number of the copy they are a part of."""

    number: int
    target: int
    source: int
    nbytes: int


def batches(spans: Iterable[Span], nbytes: int = BATCH_BYTES) -> list[list[Span]]:
    """Cut and group spans, in order, into batches of `nbytes` bytes each but the last. Pure."""
    found: list[list[Span]] = []
    room = 0
    for number, target, source, left in spans:
        while left:
            if not room:
                found.append([])
                room = nbytes
            step = min(left, room)
            found[-1].append(Span(number, target, source, step))
            target, source, left, room = target + step, source + step, left - step, room - step
    return found


def each(spans: Iterable[Span], work: Callable[[Span], object], threads: int | None = None) -> None:
    """Do `work` on every span, those that are large in pieces, on `threads` threads (None: by the cores), of
    which the caller's is one.

    `work` runs at the same time on several threads, so it should let go of the interpreter lock. Of several
    errors one is raised, after all threads have ended.
    """
    todo = batches(spans)
    helpers = min(threads or default_threads(), len(todo)) - 1
    left = iter(todo)

    def run() -> None:
        for batch in left:  # one iterator for all threads: each takes what is next
            for span in batch:
                work(span)

    if helpers <= 0:
        run()
        return
    with ThreadPoolExecutor(helpers, thread_name_prefix="weightstore-bulk") as pool:
        helping = [pool.submit(run) for _ in range(helpers)]
        run()
    for helper in helping:
        helper.result()


def copy_spans(
    spans: Iterable[Span], threads: int | None = None, before: Callable[[Span], object] | None = None
) -> None:
    """Copy each span from its source to its target address; the ranges must not overlap.

    `before` is called with every piece of a large span just before it is copied, on the thread that does so.
    """

    def copy(span: Span) -> None:
        if before is not None:
            before(span)
        ctypes.memmove(span.target, span.source, span.nbytes)

    large = []
    for span in spans:
        if span.nbytes < SMALL_BYTES:
            _move_small(span.target, span.source, span.nbytes)
        else:
            large.append(span)
    each(large, copy, threads)


def default_threads() -> int:
    return min(MAX_THREADS, len(os.sched_getaffinity(0)))


# Keeps the interpreter lock, which takes longer to hand over and get back than a small copy.
_move_small: Final = ctypes.PyDLL(None).memmove
_move_small.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_move_small.restype = ctypes.c_void_p
