"""Result files of `python -m bench rl-step` and `sglang`, made up: for the report's tests."""

from __future__ import annotations

from typing import Any

GIB = 1 << 30
PHASES = ("drain", "sleep", "memory", "refit", "wake", "image")
TAKES = {
    "1": (0.002, 0.024, 0.03, 0.47, 0.64, 0.6),
    "1s": (0.002, 0.024, 0.03, 0.47, 0.45, 0.6),
    "2": (0.002, 0.3, 0.2, 0.47, 17.0, 3.0),
    "6": (0.002, 18.0, 0.03, 0.4, 6.1, 0.7),
    "4": (0.002, 27.0, 0.05, 28.0, 6.2, 0.7),
    "3": (0.002, 0.3, 0.2, 20.0, 25.0, 3.0),
}
"""Seconds of each way's phases, in the way's steady cycles."""
OWN = 0.55
"""Seconds of a usual image: the median of those that were drawn again, which vary from cycle to cycle."""


def cycle(number: int, takes: tuple[float, ...], scale: float = 1.0) -> dict[str, Any]:
    """One cycle whose phases take that long, with a curve of memory over it."""
    phases = {name: seconds * scale for name, seconds in zip(PHASES, takes, strict=True)}
    spans, at = [], 0.0
    for name, seconds in phases.items():
        spans.append([name, at, at + seconds])
        at += seconds
        if name == "memory":
            spans.append(["step", at, at + 0.5])
            at += 0.5
    times = [at * i / 50 for i in range(51)]
    asleep = [spans[1][2] < t < spans[5][1] for t in times]
    point = {"processes": 9 * GIB, "arena": 54 * GIB, "used": 70 * GIB, "device": 60 * GIB}
    return {
        "number": number,
        "phases": phases,
        "step": 0.5,
        "own_images": [OWN, OWN + (0.4 if number % 2 else -0.4)],
        "image": f"{number:064x}",
        "same": True,
        "differs": None,
        "spread": 0.3,
        "spans": spans,
        "memory": {"asleep": point, "awake": point},
        "curve": {
            "seconds": times,
            "device": [24 * GIB if low else 56 * GIB for low in asleep],
            "host": [(60 if low else 66) * GIB for low in asleep],
        },
    }


def way(title: str, takes: tuple[float, ...], cycles: int = 2) -> dict[str, Any]:
    """A way whose first cycle takes a third longer than the others."""
    return {
        "title": title,
        "what": "what it does",
        "status": "ok",
        "reason": None,
        "notes": {},
        "baseline": {"host": 8 * GIB},
        "setup": {"own_image": OWN},
        "cycles": [cycle(n, takes, 1.3 if n == 1 else 1.0) for n in range(1, cycles + 1)],
    }


def run(**changes: Any) -> dict[str, Any]:
    """A whole run on a GPU, with `changes` of its top level."""
    found = {
        "kind": "rl-step",
        "complete": True,
        "seconds": 500.0,
        "command": "python -m bench rl-step --model flux1-dev --device cuda",
        "machine": {
            "cpu": "A CPU",
            "cores": 16,
            "memory": "126 GiB",
            "kernel": "6.1",
            "python": "3.12.3",
            "torch": "2.11.0+cu130",
            "date": "2030-01-02T03:04:05+00:00",
            "revision": "0123456789abcdef\n",
        },
        "settings": {"model": "flux1-dev", "device": "cuda", "cycles": 2},
        "model": {
            "name": "flux1-dev",
            "pipeline": "FluxPipeline",
            "components": {"transformer": 23_800_000_000, "vae": 10_000_000_000},
            "whole_bytes": 33_800_000_000,
            "trained": "transformer",
            "trained_bytes": 23_800_000_000,
            "trained_tensors": 1160,
            "dtype": "bfloat16",
            "side": 512,
            "steps": 4,
        },
        "limit": {
            "device": {"device": "Some GPU", "driver": "580.1", "torch_cuda": "13.0", "shm": "tmpfs rw"},
            "h2d": {"nbytes": 33_800_000_000, "seconds": [0.62, 0.61, 0.63]},
            "d2h": {"nbytes": 23_800_000_000, "seconds": [0.43, 0.44, 0.42]},
        },
        "trainer_needs": 26 * GIB,
        "sharing": [
            {
                "engines": count,
                "frozen_bytes": 32 << 20,
                "trained_bytes": 96 << 20,
                "one_version": 128 << 20,
                "after_refits": 224 << 20,
            }
            for count in (1, 2, 4, 8)
        ],
        "ways": {
            **{key: way(f"way {key}", takes, 5 if key in ("1", "1s") else 2) for key, takes in TAKES.items()},
            "7": {
                "title": "way 7",
                "what": "what it does",
                "status": "cannot run",
                "reason": "not installed here: zmq\nand more of a log",
                "cycles": [],
            },
        },
    }
    return found | changes


SGLANG = {
    "stock": (0.0, 1.1, 0.05, 6.2, 0.46, 0.7),
    "plugin": (0.0, 0.02, 0.05, 0.45, 0.46, 0.7),
}
"""Seconds of the phases in SGLang's engine, as `TAKES`; a first cycle takes a third longer here too."""


def sglang(device: str = "Some GPU", trained_bytes: int = 23_802_816_640) -> dict[str, Any]:
    """What the other benchmark writes, as far as it is read."""
    handed = {
        "stock": {"bytes": trained_bytes, "tensors": 780, "requests": [0.5] * 12, "error": None},
        "plugin": {"bytes": trained_bytes, "tensors": 780, "version": 2},
    }
    step: dict[str, Any] = {}
    for name, takes in SGLANG.items():
        cycles = way(name, takes, 3)["cycles"]
        step[name] = {
            "status": "ok",
            "reason": None,
            "baseline": {"host": 8 * GIB},
            "cycles": [cycle | {"handed": handed[name]} for cycle in cycles],
        }
    return {
        "command": "python -m bench sglang --model-dir FLUX.1-dev --out sglang.json",
        "machine": {"date": "2030-01-03"},
        "settings": {},
        "model": {"trained_bytes": trained_bytes, "trained_tensors": 780, "whole_bytes": 24_300_000_000},
        "checks": {},
        "complete": True,
        "sections": {"trainer": {"device": {"name": device}}, "stock": {}, "plugin": {}, "step": step},
    }
