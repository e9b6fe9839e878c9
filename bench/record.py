"""Where results go: one JSON file, whole after every row, and one table."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Collection
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.rows import Goal, Row
from weightstore.sizes import format_size

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PLAIN_WIDTH = 140


class Record:
    """Collects rows; `path` is replaced as a whole each time, None keeps them in memory only."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path = path
        self.rows: list[Row] = []
        self._machine = machine()
        self._settings = settings
        self._began = os.getloadavg()

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.write(complete=False)

    def write(self, complete: bool) -> None:
        if self.path is None:
            return
        found = {
            "machine": self._machine,
            "settings": self._settings,
            "load": {"before": self._began, "after": os.getloadavg()},
            "complete": complete,
            "rows": [row.to_json() for row in self.rows],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text(_compact(json.dumps(found, indent=1)) + "\n")
        scratch.replace(self.path)

    def print_table(self) -> None:
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=PLAIN_WIDTH)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("what", overflow="fold", ratio=1)
        for title in ("measured", "reference", "ratio", "goal"):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("met")
        for row in self.rows:
            table.add_row(*cells(row))
        console.print(table)


def cells(row: Row) -> list[str]:
    reference = "" if row.reference is None else _amount(row, row.reference)
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    met = {None: "", True: "[green]yes[/]", False: "[red]no[/]"}[row.met]
    return [row.what, _amount(row, "measured"), reference, ratio, _goal(row, row.goal), met]


def _amount(row: Row, way: str) -> str:
    if way == "measured":
        value = row.measured
    else:
        ordered = sorted(row.seconds[way])
        value = ordered[len(ordered) // 2]
    if row.unit != "s":
        return f"{value:g} {row.unit}"
    if row.nbytes:
        return f"{row.nbytes / value / 1e9:.2f} GB/s"
    return _duration(value)


def _duration(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"


def _goal(row: Row, goal: Goal | None) -> str:
    if goal is None:
        return ""
    plain = row.reference is not None or row.unit != "s"
    bound = f"{goal.bound:g}" if plain else _duration(goal.bound)
    return f"{'≥' if goal.at_least else '≤'} {bound}"


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    import torch

    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": format_size(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")),
        "kernel": platform.release(),
        "huge_pages": {
            name: _selected(Path("/sys/kernel/mm/transparent_hugepage") / name)
            for name in ("enabled", "shmem_enabled")
        },
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "revision": _git("rev-parse", "HEAD").strip(),
        "changed_files": _git("status", "--porcelain", "--", "weightstore", "engine_hooks").count("\n"),
    }


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def command_line(name: str, paths: Collection[Path]) -> str:
    """`python -m bench NAME` as it was asked for; of `paths` only what says nothing of this machine."""
    words = []
    for word in sys.argv[2:]:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        words.append(f"{option}{equals}{_shown(Path(value))}" if Path(value) in paths else word)
    return shlex.join(["python", "-m", "bench", name, *words])


def _shown(path: Path) -> Path:
    """Relative to the repository if it is in there, else its name."""
    if path.is_absolute() and path.is_relative_to(ROOT):
        return path.relative_to(ROOT)
    return Path(path.name) if path.is_absolute() or ".." in path.parts else path


def slug(name: str) -> str:
    """A device's name as a part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _selected(path: Path) -> str:
    """The value in brackets, as in ``always [madvise] never``."""
    if not path.exists():
        return "unsupported"
    return path.read_text().partition("[")[2].partition("]")[0]


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _compact(text: str) -> str:
    """Lists of numbers on one line each: a file of samples stays readable and small in a diff."""
    return re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text)
