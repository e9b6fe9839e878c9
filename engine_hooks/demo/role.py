"""A process that answers commands, seen from both ends: `Role` starts and asks, `serve` answers.

Commands, answers and progress are lines of JSON on the child's stdin and stdout. The child moves its
real stdout out of the way first, so that a library that prints cannot break the protocol. It ends
when its stdin does, so a driver that dies takes its roles with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from weightstore.errors import CircumstanceError, WeightstoreError, from_wire

Emit = Callable[[dict[str, Any]], None]
Handler = Callable[..., dict[str, Any]]
"""Called with `emit` (for progress) and the command's keyword arguments; returns the answer."""


class Role:
    """A child process running ``python -m module`` with one JSON argument, its configuration."""

    def __init__(self, name: str, module: str, config: Mapping[str, Any]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # OpenMP's threads spin at a barrier by default. Where several processes share few cores, each
            # then burns the time the others need: drawing took five times as long.
            env={"OMP_WAIT_POLICY": "passive", **os.environ},
            # Ctrl-C is the driver's to handle: it ends its roles.
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, command: str, progress: Emit | None = None, **arguments: Any) -> dict[str, Any]:
        """Send a command and return its answer; progress lines that precede it go to `progress`.

        Raises:
            WeightstoreError: the one the child raised.
            CircumstanceError: the child ended.
        """
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps({"command": command, "arguments": arguments}) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise self._ended(command) from None
        for line in process.stdout:
            message = json.loads(line)
            if "progress" in message:
                if progress is not None:
                    progress(message["progress"])
            elif "error" in message:
                raise from_wire(message["error"], f"{self.name}: {message['message']}", message["details"])
            else:
                answer: dict[str, Any] = message["answer"]
                return answer
        raise self._ended(command)

    def close(self) -> None:
        """End the child and wait for it: politely by closing its stdin, else by SIGKILL."""
        process = self._process
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                pass  # the child went first, with a command unread
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def __enter__(self) -> Role:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._process.terminate()  # whatever it was doing, nobody waits for the answer now
        self.close()

    def _ended(self, command: str) -> CircumstanceError:
        code = self._process.wait()
        return CircumstanceError(
            f"the {self.name} process ended with code {code} before it answered {command!r}; what it said "
            "is above"
        )


@contextmanager
def _commands() -> Iterator[tuple[Iterator[str], Callable[[dict[str, Any]], None]]]:
    """The child's ends of the pipes: lines to read, and a function that writes one."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)

        def write(message: dict[str, Any]) -> None:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

        yield iter(sys.stdin.readline, ""), write


def serve(start: Callable[[dict[str, Any]], Mapping[str, Handler]]) -> None:
    """Run a role: `start` turns the configuration into handlers, then commands are answered in order.

    A WeightstoreError of a handler travels to the driver and the role goes on. Any other exception is
    a bug: it ends the process, with its traceback on stderr.
    """
    with _commands() as (commands, write):
        handlers = start(json.loads(sys.argv[1]))
        for line in commands:
            request = json.loads(line)
            try:
                answer = handlers[request["command"]](
                    emit=lambda progress: write({"progress": progress}), **request["arguments"]
                )
            except WeightstoreError as error:
                write({"error": type(error).__name__, "message": error.message, "details": error.details})
            else:
                write({"answer": answer})
