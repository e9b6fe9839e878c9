"""The command's handles on its children: an engine asked over HTTP, a trainer asked by lines of JSON.

Invariants:
- every wait has an end: a child that takes longer than the run has time for is a `WayFailed`, not a hang;
- a `WayFailed` says what the child said last.
"""

from __future__ import annotations

import http.client
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from bench.record import ROOT

TAIL: Final = 15
"""Lines of a child's log that are quoted."""
ENDING: Final = 20.0
"""Seconds that a child has to end by itself."""


class WayFailed(Exception):
    """A way cannot run, or did not get to its end; the message is what the report says."""


Remaining = Callable[[], float]
"""Seconds that a wait may take."""


class Child:
    """A role's process, from its start (perhaps ahead of its use) to its end."""

    def __init__(self, role: str, model: str, log: Path, remaining: Remaining) -> None:
        self.role = role
        self.remaining = remaining
        self._log = log
        self._unread = b""
        self._imports: float | None = None
        with open(log, "ab") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"bench.rl_step.{role}", model],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                cwd=ROOT,
                env=_environment(),
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def imported(self) -> float:
        """Wait until it has imported all it needs; the seconds that took it."""
        if self._imports is None:
            self._imports = float(self.read()["imports"])
        return self._imports

    def write(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self.failed("ended") from None

    def read(self) -> dict[str, Any]:
        """The next line it answers with."""
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        deadline = time.monotonic() + self.remaining()
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(deadline - time.monotonic(), 0)):
                    raise self.failed("did not answer in the time there was")
                part = os.read(fd, 1 << 16)
                if not part:
                    self._process.wait()
                    raise self.failed(f"ended with {self._process.returncode}")
                self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def failed(self, how: str) -> WayFailed:
        lines = self._log.read_text(errors="replace").splitlines()
        said = "\n".join(line[:300] for line in lines[-TAIL:])
        return WayFailed(f"the {self.role} {how}" + (f"; its log ends with\n{said}" if said else ""))

    def kill(self) -> None:
        """End it as SIGKILL does, and wait until it has gone."""
        self._process.kill()
        self._process.wait()
        self._close_pipes()

    def end(self) -> None:
        if self._process.poll() is None:
            assert self._process.stdin is not None
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                self._process.kill()
            try:
                self._process.wait(timeout=ENDING)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._close_pipes()

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue  # it ended before it read all

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


class Engine(Child):
    """An image server; `start` it, then ask it over HTTP."""

    def __init__(self, model: str, log: Path, remaining: Remaining) -> None:
        super().__init__("engine", model, log, remaining)
        self.port = 0

    def start(self, config: dict[str, Any]) -> None:
        self.write(config)

    def ready(self) -> dict[str, Any]:
        """Wait until it serves; what its start took."""
        imports = self.imported()
        found = self.read()
        self.port = found.pop("port")
        return {"imports": imports, **found}

    def post(self, path: str, message: dict[str, Any] | None = None) -> dict[str, Any]:
        _, body = self._request("POST", path, message)
        found: dict[str, Any] = json.loads(body)
        return found

    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._request("GET", "/facts")[1])
        return found

    def image(self) -> tuple[dict[str, str], bytes]:
        """What it says of the picture, by header, and the pixels."""
        return self._request("POST", "/generate")

    def _request(
        self, method: str, path: str, message: dict[str, Any] | None = None
    ) -> tuple[dict[str, str], bytes]:
        sent = None if message is None else json.dumps(message).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=max(self.remaining(), 1.0))
        try:
            connection.request(method, path, sent)
            answer = connection.getresponse()
            body = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise self.failed(f"did not answer {path}: {type(error).__name__}: {error}") from error
        finally:
            connection.close()
        if answer.status != 200:
            raise self.failed(f"answered {path} with {answer.status} {body[:1000].decode(errors='replace')}")
        return dict(answer.headers), body


class Trainer(Child):
    def __init__(self, model: str, log: Path, remaining: Remaining) -> None:
        super().__init__("trainer", model, log, remaining)

    def start(self, config: dict[str, Any]) -> None:
        self.write(config)

    def ready(self) -> dict[str, Any]:
        imports = self.imported()
        return {"imports": imports, **self.read()}

    def do(self, command: str, **arguments: Any) -> dict[str, Any]:
        self.write({"do": command, **arguments})
        found = self.read()
        if "failed" in found:
            raise WayFailed(f"the trainer's {command}: {found['failed']}")
        return found


def _environment() -> dict[str, str]:
    """This process's, with nothing that asks a network, and with kernels whose results do not vary."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    kept = {key: value for key, value in os.environ.items() if not key.endswith("ALLOC_CONF")}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "TOKENIZERS_PARALLELISM": "false",
    }
