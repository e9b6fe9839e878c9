"""What the link between host and device can do: one copy of the same bytes, in a process of its own.

    python -m bench.rl_step.limit DEVICE TRAINED_BYTES WHOLE_BYTES ROUNDS WARM_BYTES

prints one line of JSON. On a CPU it is one copy between two buffers.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch


def on_gpu(trained: int, whole: int, rounds: int, warm: int) -> dict[str, Any]:
    from bench.gpu_common import Limit, device_facts, touch_memory

    found: dict[str, Any] = {"touched_seconds": touch_memory(warm) if warm else 0.0}
    torch.zeros(1, device="cuda")
    found["device"] = device_facts()
    limit = Limit(whole)
    try:
        found["d2h"] = {"nbytes": trained, "seconds": [limit.d2h(trained) for _ in range(rounds)]}
        found["h2d"] = {"nbytes": whole, "seconds": [limit.h2d(whole) for _ in range(rounds)]}
    finally:
        limit.close()
    return found


def on_cpu(trained: int, whole: int, rounds: int) -> dict[str, Any]:
    from bench.rows import clock

    source = torch.ones(whole, dtype=torch.uint8)
    target = torch.ones(whole, dtype=torch.uint8)
    return {
        "device": {"device": "cpu"},
        "d2h": {
            "nbytes": trained,
            "seconds": [clock(target[:trained].copy_, source[:trained]) for _ in range(rounds)],
        },
        "h2d": {"nbytes": whole, "seconds": [clock(target.copy_, source) for _ in range(rounds)]},
    }


def main() -> None:
    device = sys.argv[1]
    trained, whole, rounds, warm = map(int, sys.argv[2:])
    found = on_cpu(trained, whole, rounds) if device == "cpu" else on_gpu(trained, whole, rounds, warm)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
