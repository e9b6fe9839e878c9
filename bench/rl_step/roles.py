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
from collections.abc import Iterator
from typing import IO, Any

import torch


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


@contextlib.contextmanager
def clocked(seconds: dict[str, float], what: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[what] = time.perf_counter() - began
