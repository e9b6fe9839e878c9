"""What a run has found so far: one JSON file, whole after every cycle, whatever then ends the run."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any


class Found:
    """Results on disk. `path` is replaced as a whole each time; None keeps them in memory only."""

    def __init__(self, path: Path | None, **known: Any) -> None:
        self._path = path
        self._began = time.perf_counter()
        self.all: dict[str, Any] = {"kind": "rl-step", "complete": False, **known, "ways": {}}

    def to(self, path: Path | None) -> None:
        """Where to write, from now on."""
        self._path = path
        self.write()

    def note(self, what: str, value: Any) -> None:
        self.all[what] = value
        self.write()

    def way(self, key: str, **values: Any) -> None:
        self.all["ways"].setdefault(key, {}).update(values)
        self.write()

    def cycle(self, key: str, cycle: dict[str, Any]) -> None:
        self.all["ways"][key]["cycles"].append(cycle)
        self.write()

    def complete(self) -> None:
        self.all["complete"] = True
        self.write()

    def write(self) -> None:
        self.all["seconds"] = round(time.perf_counter() - self._began, 1)
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self._path.with_suffix(".tmp")
        text = json.dumps(_rounded(self.all), indent=1)
        scratch.write_text(re.sub(r"\[[^\[\]{}]*\]", lambda m: " ".join(m[0].split()), text) + "\n")
        scratch.replace(self._path)


def _rounded(value: Any) -> Any:
    """Microseconds are enough."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return value
