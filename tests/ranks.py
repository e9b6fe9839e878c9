"""Trainers of several ranks, each a real process with torch.distributed, for tests to command and to kill."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

from weightstore.errors import WeightstoreError

PATIENCE = 60.0


class RankFailed(Exception):
    """What a rank raised; `error` is the class's name."""

    def __init__(self, error: str, message: str, details: dict[str, Any]) -> None:
        super().__init__(f"{error}: {message}")
        self.error, self.message, self.details = error, message, details


class Rank:
    """One process. `ask` for an answer, or `tell` now and `hear` later."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._link.settimeout(PATIENCE)
        self._stream = link.makefile("rw")
        self.pid = 0

    def tell(self, do: str, **options: Any) -> None:
        self._stream.write(json.dumps({"do": do, **options}) + "\n")
        self._stream.flush()

    def hear(self) -> Any:
        """The answer to the last `tell`. Raises RankFailed, or EOFError if the process has gone."""
        line = self._stream.readline()
        if not line:
            raise EOFError("the rank's process has ended")
        answer = json.loads(line)
        if "error" in answer:
            assert answer["error"] in WeightstoreError.registry
            raise RankFailed(**answer)
        return answer["value"]

    def ask(self, do: str, **options: Any) -> Any:
        self.tell(do, **options)
        return self.hear()

    def kill(self) -> None:
        """SIGKILL, and wait until it has gone."""
        os.kill(self.pid, signal.SIGKILL)
        with suppress(ConnectionResetError):
            assert self._stream.readline() == ""

    def close(self) -> None:
        self._stream.close()
        self._link.close()


class Zygote:
    """The process that ranks are forked from."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._numbers = count()
        path = [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("rank_process.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdout is not None and self._process.stdout.readline() == "ready\n"

    def spawn(self) -> Rank:
        path = self._directory / f"rank{next(self._numbers)}"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(1)
            listener.settimeout(PATIENCE)
            assert self._process.stdin is not None
            self._process.stdin.write(f"{path}\n")
            self._process.stdin.flush()
            link, _ = listener.accept()
        path.unlink()
        return Rank(link)

    @contextmanager
    def group(self, world_size: int, store: str, device: str = "cpu") -> Iterator[Group]:
        """A process group of that many ranks, all connected to a store; on ``cuda`` each has its own GPU."""
        ranks = [self.spawn() for _ in range(world_size)]
        try:
            meeting = str(self._directory / f"meeting{next(self._numbers)}")
            for number, rank in enumerate(ranks):
                rank.tell("start", path=meeting, rank=number, world_size=world_size, device=device)
            for rank in ranks:
                rank.pid = rank.hear()
            group = Group(ranks)
            group.all("connect", store=store)
            yield group
        finally:
            for rank in ranks:
                rank.close()

    def __enter__(self) -> Zygote:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate(timeout=PATIENCE)


class Group:
    def __init__(self, ranks: list[Rank]) -> None:
        self.ranks = ranks

    def all(self, do: str, **options: Any) -> list[Any]:
        """Have every rank do it at the same time; their answers. Raises the first failure."""
        for rank in self.ranks:
            rank.tell(do, **options)
        outcomes = [self._outcome(rank) for rank in self.ranks]
        for outcome in outcomes:
            if isinstance(outcome, RankFailed):
                raise outcome
        return outcomes

    def each(self, do: str, **options: Any) -> list[Any]:
        """As `all`, with failures among the answers."""
        for rank in self.ranks:
            rank.tell(do, **options)
        return [self._outcome(rank) for rank in self.ranks]

    @staticmethod
    def _outcome(rank: Rank) -> Any:
        try:
            return rank.hear()
        except RankFailed as failure:
            return failure
