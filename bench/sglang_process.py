"""The processes of `python -m bench sglang` seen from outside, what was found, and what was asked for."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import click

from bench.record import ROOT, machine
from bench.rl_step.memory import Sampler
from weightstore.sizes import parse_size

MODEL: Final = "sglang-bench"
PARTS: Final = ("proj_out", "x_embedder", "transformer_blocks.0.", "single_transformer_blocks.0.")
"""What an update of a part changes: beginnings of names in the checkpoint."""
TAIL: Final = 40
"""Lines of a log that are quoted."""


class Found:
    """Results so far, on disk after every step."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self._began = time.perf_counter()
        self.all: dict[str, Any] = {
            "machine": machine(),
            "settings": settings,
            "complete": False,
            "checks": {},
            "left_out": {},
            "sections": {},
        }

    def add(self, section: str, what: str, value: Any) -> None:
        self.all["sections"].setdefault(section, {})[what] = value
        self.say(f"{section}: {what}: {json.dumps(value)[:300]}")
        self.write()

    def check(self, section: str, what: str, holds: bool) -> None:
        self.all["checks"][f"{section}: {what}"] = holds
        self.say(f"{section}: {'ok' if holds else 'WRONG'}: {what}")
        self.write()

    def leave_out(self, section: str, why: str) -> None:
        self.all["left_out"][section] = why
        self.say(f"{section}: left out: {why}")
        self.write()

    def complete(self) -> None:
        self.all["complete"] = True
        self.write()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    @property
    def wrong(self) -> list[str]:
        return [what for what, holds in self.all["checks"].items() if not holds]

    def say(self, line: str) -> None:
        print(f"{time.perf_counter() - self._began:7.1f} s  {line}", flush=True)

    def write(self) -> None:
        self.all["seconds"] = round(time.perf_counter() - self._began, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".tmp")
        text = json.dumps(self.all, indent=1)
        scratch.write_text(re.sub(r"\[[^\[\]{}]*\]", lambda m: " ".join(m[0].split()), text) + "\n")
        scratch.replace(self.path)


class Child:
    """One process that is told what to do in lines of JSON, from its start to its end."""

    def __init__(self, module: str, config: dict[str, Any], log: Path, env: dict[str, str]) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        self._module = module
        with open(log, "w") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, json.dumps(config)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                env=env,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = self._log.read_text(errors="replace").splitlines()[-TAIL:]
            raise click.ClickException(f"{self._module} ended; its log ends with\n" + "\n".join(tail))
        answer: dict[str, Any] = json.loads(line)
        return answer

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


class Trainer(Child):
    """The trainer's process (`sglang_trainer`)."""

    def __init__(self, options: Options, socket: str) -> None:
        config = {"cpu": options.cpu, "model": str(options.model_dir), "socket": socket, "name": MODEL}
        log = options.out.parent / "sglang-trainer.log"
        super().__init__("bench.sglang_trainer", config, log, _environment())
        self.started = self.answer()["started"]

    def do(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Ask for what must succeed."""
        answer = self.ask(command, **arguments)
        if "failed" in answer:
            raise RuntimeError(f"the trainer's {command}: {answer['failed']}")
        return answer

    @property
    def on_device(self) -> int:
        """Bytes of the GPU's memory that are this process's."""
        own: int = self.do("facts")["own"]
        return own


class Engine(Child):
    """One engine's process (`sglang_role`); `section` is where its answers are noted."""

    def __init__(self, run: Run, section: str, *, stored: bool, name: str, **arguments: Any) -> None:
        self.found, self.section = run.found, section
        self._trainer = run.trainer
        options = run.options
        self._folder = tempfile.TemporaryDirectory(prefix="sglang-bench-")
        self._flag = os.path.join(self._folder.name, "trace")
        config = {
            "cpu": options.cpu,
            "model": str(options.model_dir),
            "side": options.side,
            "steps": options.steps,
            "arguments": arguments,
            "folder": self._folder.name,
        }
        env = _environment(self._folder.name) | {"BENCH_TRACE": self._flag}
        if stored:
            env |= {"WEIGHTSTORE_SOCKET": run.socket, "WEIGHTSTORE_MODEL": MODEL}
        _describe(self._folder.name)
        began = time.perf_counter()
        super().__init__("bench.sglang_role", config, options.out.parent / f"sglang-{name}.log", env)
        started = self.answer()["started"]
        self.endpoint: str = started["endpoint"]
        self.has_slept = False
        what = "start" if name == section else f"{name} start"
        self.found.add(section, what, {**started, "process": time.perf_counter() - began})

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        self.has_slept |= command == "release"
        return super().ask(command, **arguments)

    def do(self, what: str, command: str, **arguments: Any) -> dict[str, Any]:
        """Ask, and note the answer."""
        answer = self.ask(command, **arguments)
        self.found.add(self.section, what, answer)
        return answer

    def facts(self, what: str) -> dict[str, Any]:
        """What the worker says of itself, noted; beside what is in use of the GPU, the trainer's part."""
        answer = self.ask("facts")
        if "device_used" in answer:
            answer["trainer_device"] = self._trainer.on_device
        self.found.add(self.section, what, answer)
        return answer

    def image(self, what: str) -> tuple[str, str]:
        return pixels_of(self.do(f"image {what}", "generate"))

    def trace_next_release(self) -> None:
        Path(self._flag).touch()

    def end(self) -> None:
        super().end()
        self._folder.cleanup()


def pixels_of(answer: dict[str, Any]) -> tuple[str, str]:
    """An image's two hashes; empty ones if it was refused."""
    return answer.get("pixels", ""), answer.get("latents", "")


class Options:
    """What the command line says."""

    def __init__(self, **options: Any) -> None:
        self.model_dir: Path = options["model_dir"]
        self.out: Path = options["out"]
        self.cpu: bool = options["cpu"]
        self.side: int = options["side"]
        self.steps: int = options["steps"]
        self.rounds: int = options["rounds"]
        self.cycles: int = options["cycles"]
        self.bucket: int = parse_size(options["bucket"])
        self.checksum: bool = options["checksum"]
        self.budget: float = options["budget"]
        self.capacity: str = options["capacity"]
        self.window: str = options["window"]


@dataclass
class Run:
    """What all sections share.

    Attributes:
        socket, arena, service: the store's socket, its segment, its process.
        known: pictures and facts of sections before, for comparison.
    """

    found: Found
    options: Options
    sections: list[str]
    trainer: Trainer
    sampler: Sampler
    socket: str
    arena: Path
    service: int
    known: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def engine(
    run: Run, section: str, *, stored: bool, name: str | None = None, **arguments: Any
) -> Iterator[Engine]:
    """An engine with SGLang's `arguments`; `stored` is whether the plugin is switched on."""
    running = Engine(run, section, stored=stored, name=name or section, **arguments)
    try:
        yield running
    finally:
        running.end()


def _environment(*folders: str) -> dict[str, str]:
    paths = [*folders, str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    env.pop("WEIGHTSTORE_MODEL", None)
    return env


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
