"""Processes that a test can stop at a named step, look at, and kill there.

They are forked from one server process that has imported torch and the engine hook, so each costs
milliseconds. A child says where it is and waits for a word of its parent; nobody sleeps.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from processes import PATIENCE, ROOT, eventually

from weightstore.errors import WeightstoreError

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch", "numpy", "weightstore.client", "engine_hooks.hook", "engine_hooks.host"]
)

Step = Callable[..., Any]
"""What a child's function gets first: ``step(name, fact)`` tells the parent and returns its answer."""


class Child:
    """`target(step, *args)` in a process of its own. At the end of the block it is gone.

    `target` must be a function of a module, its arguments plain values.
    """

    def __init__(self, target: Callable[..., Any], *args: Any) -> None:
        _start_server()
        self._pipe, theirs = _context.Pipe()
        self._process = _context.Process(target=_run, args=(target, theirs, args), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def reaches(self, step: str) -> Any:
        """Wait until the child is at `step`, and return the fact it gave."""
        kind, name, fact = self._read()
        if kind == "failed":
            raise AssertionError(f"waiting for {step!r}: {name}\n{fact}")
        assert (kind, name) == ("step", step), (kind, name, fact)
        return fact

    def go(self, answer: Any = None) -> None:
        """Let it go on from its step."""
        self._pipe.send(answer)

    def result(self) -> Any:
        """What its function returned."""
        kind, name, fact = self._read()
        assert kind == "done", (kind, name, fact)
        return fact

    def error(self) -> str:
        """The name of the weightstore error that ended its function, and its message."""
        kind, name, fact = self._read()
        assert kind == "failed", (kind, name, fact)
        return str(name)

    def stop(self) -> None:
        """SIGSTOP, and wait until none of its threads runs any more."""
        os.kill(self.pid, signal.SIGSTOP)
        tasks = Path(f"/proc/{self.pid}/task")
        eventually(
            lambda: all(
                (task / "stat").read_text().rpartition(")")[2].split()[0] == "T" for task in tasks.iterdir()
            ),
            "every thread has stopped",
        )

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and wait until the process is gone."""
        os.kill(self.pid, signal.SIGKILL)
        assert self.exitcode() == -signal.SIGKILL

    def exitcode(self) -> int | None:
        self._process.join(PATIENCE)
        return self._process.exitcode

    def _read(self) -> tuple[str, Any, Any]:
        assert self._pipe.poll(PATIENCE), "the child says nothing"
        try:
            message: tuple[str, Any, Any] = self._pipe.recv()
        except EOFError:
            return "ended", self.exitcode(), None
        return message

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.is_alive():
            self._process.kill()
        self._process.join(PATIENCE)
        self._pipe.close()


def _run(target: Callable[..., Any], pipe: Connection, args: tuple[Any, ...]) -> None:
    def step(name: str, fact: Any = None) -> Any:
        pipe.send(("step", name, fact))
        return pipe.recv()

    try:
        pipe.send(("done", None, target(step, *args)))
    except WeightstoreError as error:
        pipe.send(("failed", f"{type(error).__name__}: {error.message}", traceback.format_exc()))
    except Exception as error:
        pipe.send(("failed", repr(error), traceback.format_exc()))


def _start_server() -> None:
    """The fork server imports what is preloaded only from where its own environment says."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), str(Path(__file__).parent), before]))
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
