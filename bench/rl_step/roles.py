"""What both kinds of child process share: their start, their end, and the lines they answer with.

A role is started as ``python -m bench.rl_step.ROLE MODEL``, imports what it will need, and then reads its
configuration, one line of JSON, from its standard input; so a role can be started ahead of its use. It ends
with its standard input, whatever it is doing: nothing of it outlives the command.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Any, Final

import torch

PATIENCE: Final = 120.0
"""Seconds to try for device memory that another process is giving back."""


class Answers:
    """Lines of JSON on what was standard output; whatever else prints goes to standard error."""

    def __init__(self) -> None:
        self._file: IO[str] = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, **values: Any) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()


def configuration() -> dict[str, Any]:
    """The first line of standard input."""
    line = sys.stdin.readline()
    if not line:
        os._exit(0)  # started ahead, and not needed
    found: dict[str, Any] = json.loads(line)
    return found


def end_with_input() -> None:
    """Have the process end when its standard input does: for a role that reads no more of it."""

    def watch() -> None:
        sys.stdin.read()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def prepare(device: str) -> None:
    """The same arithmetic in every process: one thread on a CPU, deterministic kernels on a GPU."""
    if device == "cpu":
        torch.set_num_threads(1)
    else:
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        torch.zeros(1, device=device)


def wait_for_device(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def give_back(device: str) -> None:
    """Have torch's allocator return what it keeps for later."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def taken(nbytes: int, device: str, more: Callable[[], None]) -> torch.Tensor:
    """Memory of the device, as soon as it is there: another process is giving it back, and `more` gives back
    what this one keeps for later."""
    began = time.perf_counter()
    while True:
        try:
            found = torch.empty(nbytes, dtype=torch.uint8, device=device)
            break
        except torch.OutOfMemoryError:
            more()
            if time.perf_counter() - began > PATIENCE:
                free, total = torch.cuda.mem_get_info()
                raise RuntimeError(
                    f"it did not get {nbytes} bytes in {PATIENCE:g} s: {free} of {total} are free"
                ) from None
            time.sleep(0.002)
    wait_for_device(device)
    return found


@contextlib.contextmanager
def clocked(seconds: dict[str, float], what: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[what] = time.perf_counter() - began
