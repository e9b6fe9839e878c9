"""An engine process of `python -m bench sglang` seen from outside, what was found, and what was asked for."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import click

from bench.record import ROOT, machine

MODEL: Final = "sglang-bench"


class Found:
    """Results so far, on disk after every step."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        self._began = time.perf_counter()
        self.all: dict[str, Any] = {
            "machine": machine(),
            "settings": settings,
            "complete": False,
            "checks": {},
            "sections": {},
        }

    def add(self, section: str, what: str, value: Any) -> None:
        self.all["sections"].setdefault(section, {})[what] = value
        self._say(f"{section}: {what}: {json.dumps(value)[:300]}")
        self._write()

    def check(self, section: str, what: str, holds: bool) -> None:
        self.all["checks"][f"{section}: {what}"] = holds
        self._say(f"{section}: {'ok' if holds else 'WRONG'}: {what}")
        self._write()

    def complete(self) -> None:
        self.all["complete"] = True
        self._write()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    @property
    def wrong(self) -> list[str]:
        return [what for what, holds in self.all["checks"].items() if not holds]

    def _say(self, line: str) -> None:
        print(f"{time.perf_counter() - self._began:7.1f} s  {line}", flush=True)

    def _write(self) -> None:
        self.all["seconds"] = round(time.perf_counter() - self._began, 1)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self._path.with_suffix(".tmp")
        scratch.write_text(json.dumps(self.all, indent=1) + "\n")
        scratch.replace(self._path)


class Engine:
    """One engine process, from its start to its end."""

    def __init__(
        self, found: Found, section: str, options: Options, socket: str | None, **arguments: Any
    ) -> None:
        self.found, self.section = found, section
        self._folder = tempfile.mkdtemp(prefix="sglang-bench-")
        self._flag = os.path.join(self._folder, "trace")
        self._log = found._path.parent / f"sglang-{section}.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        config = {
            "cpu": options.cpu,
            "model": str(options.model_dir),
            "side": options.side,
            "steps": options.steps,
            "arguments": arguments,
        }
        paths = [self._folder, str(ROOT), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "BENCH_TRACE": self._flag}
        env.pop("WEIGHTSTORE_MODEL", None)
        if socket is not None:
            env |= {"WEIGHTSTORE_SOCKET": socket, "WEIGHTSTORE_MODEL": MODEL}
        _describe(self._folder)
        began = time.perf_counter()
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.sglang_role", json.dumps(config)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=env,
            )
        started = self._answer()["started"]
        found.add(section, "start", {**started, "process": time.perf_counter() - began})

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def do(self, what: str, command: str, **arguments: Any) -> dict[str, Any]:
        """Ask, and note the answer."""
        answer = self.ask(command, **arguments)
        self.found.add(self.section, what, answer)
        return answer

    def image(self, what: str) -> tuple[str, str]:
        answer = self.do(f"image {what}", "generate")
        return answer.get("pixels", ""), answer.get("latents", "")

    def trace_next_release(self) -> None:
        Path(self._flag).touch()

    def log_has(self, text: str) -> bool:
        return text in self._log.read_text(errors="replace")

    def end(self) -> None:
        if self._process.poll() is None:
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            try:
                self._process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = self._log.read_text(errors="replace").splitlines()[-40:]
            raise click.ClickException("the engine ended; its log ends with\n" + "\n".join(tail))
        answer: dict[str, Any] = json.loads(line)
        return answer


class Options:
    """What the command line says."""

    def __init__(self, **options: Any) -> None:
        self.model_dir: Path = options["model_dir"]
        self.out: Path = options["out"]
        self.cpu: bool = options["cpu"]
        self.side: int = options["side"]
        self.steps: int = options["steps"]
        self.rounds: int = options["rounds"]
        self.checksum: bool = options["checksum"]
        self.until: float = options["until"]
        self.capacity: str = options["capacity"]
        self.window: str = options["window"]
        self.device = "cpu" if self.cpu else "cuda"


@contextlib.contextmanager
def engine(
    found: Found, section: str, options: Options, socket: str | None, **arguments: Any
) -> Iterator[Engine]:
    running = Engine(found, section, options, socket, **arguments)
    try:
        yield running
    finally:
        running.end()


def _describe(folder: str) -> None:
    """Make both plugins known to SGLang without installing anything."""
    for name, target in (
        ("weightstore", "engine_hooks.integrations.sglang_diffusion:activate"),
        ("bench-probe", "bench.sglang_probe:activate"),
    ):
        info = Path(folder) / f"{name.replace('-', '_')}-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
        (info / "entry_points.txt").write_text(f"[sglang.multimodal_gen.plugins]\n{name} = {target}\n")
