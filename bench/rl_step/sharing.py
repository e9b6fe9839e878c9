"""Host memory by the number of engines: real processes on one store, the arena's pages counted by PSS.

Every engine holds the whole model and has taken every version; a trainer has refitted the transformer until
nothing grows. Engines are on the host backend, asleep, so that what they map is the arena alone. The kernel
divides a page among those that map it, so the shares sum to the pages that there are.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from bench.record import ROOT
from bench.rl_step.memory import mapped_share

MIB: Final = 1 << 20
TRAINED_BYTES: Final = 96 * MIB
FROZEN_BYTES: Final = 32 * MIB
WINDOW: Final = 4 * MIB
REFITS: Final = 3

ROLE: Final = """
import sys, torch, weightstore
from bench.rl_step.sharing import modules
from engine_hooks import EngineHook

torch.set_num_threads(1)
store = weightstore.connect(sys.argv[1])
hook = EngineHook.attach(store, "model", modules("meta"), device="cpu")
hook.sleep()
print("ready", flush=True)
for line in sys.stdin:
    hook.wake()
    held = {int(tensor.data.view(torch.uint8)[0, 0]) for tensor in hook.modules["transformer"].parameters()}
    hook.sleep()
    print(*held, flush=True)
"""


def modules(device: str) -> dict[str, Any]:
    from bench.shapes import modules_of
    from weightstore.types import TensorSpec

    rows = TRAINED_BYTES // (8 * MIB)
    specs = [TensorSpec(f"transformer.{i}.weight", "float32", (2048, 1024), (1024, 1)) for i in range(rows)]
    specs += [
        TensorSpec(f"text_encoder.{i}.weight", "float32", (2048, 1024), (1024, 1))
        for i in range(FROZEN_BYTES // (8 * MIB))
    ]
    return modules_of(specs, device)


def sharing(counts: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """For each number of engines: bytes of the arena before and after refits, over all processes."""
    import torch

    from weightstore.local import local_store
    from weightstore.paths import arena_name

    for count in counts:
        capacity = FROZEN_BYTES + 2 * TRAINED_BYTES + 4 * WINDOW
        with ExitStack() as held:
            store = held.enter_context(local_store(capacity, window=WINDOW))
            weights = modules("cpu")
            with store.refit("model") as refit:
                for name, module in weights.items():
                    refit.put_module(module, prefix=f"{name}.")
            engines = [held.enter_context(_engine(store.socket)) for _ in range(count)]
            for engine in engines:
                _line(engine)
            arena = f"/dev/shm/{arena_name(store.socket)}"
            everyone = [*(engine.pid for engine in engines), service_of(store.socket), os.getpid()]
            once = mapped_share(everyone, arena) - _records(arena)
            for number in range(REFITS):
                with torch.no_grad():
                    for parameter in weights["transformer"].parameters():
                        parameter.view(torch.uint8).fill_(100 + number)
                with store.refit("model", components=["transformer"]) as refit:
                    refit.put_module(weights["transformer"], prefix="transformer.")
                for engine in engines:
                    engine.stdin.write("wake\n")
                    engine.stdin.flush()
                    if _line(engine) != str(100 + number):
                        raise RuntimeError("an engine does not have the version that was committed")
            twice = mapped_share(everyone, arena) - _records(arena)
        yield {
            "engines": count,
            "frozen_bytes": FROZEN_BYTES,
            "trained_bytes": TRAINED_BYTES,
            "one_version": once,
            "after_refits": twice,
        }


def _records(arena: str) -> int:
    """The arena's own header and records, which are no weights: pages below its data."""
    from weightstore.layout import DATA_OFFSET

    handle = os.open(arena, os.O_RDONLY)
    try:
        there, at = 0, 0
        while at < DATA_OFFSET:
            try:
                start = os.lseek(handle, at, os.SEEK_DATA)
            except OSError:
                break
            end = min(os.lseek(handle, start, os.SEEK_HOLE), DATA_OFFSET)
            if start >= DATA_OFFSET:
                break
            there += end - start
            at = end
        return there
    finally:
        os.close(handle)


@contextmanager
def _engine(socket: str) -> Iterator[Any]:
    process = subprocess.Popen(
        [sys.executable, "-c", ROLE, socket],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        yield process
    except BaseException:
        process.kill()  # it may be far from reading that its input has ended
        raise
    finally:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _line(process: Any) -> str:
    line: str = process.stdout.readline()
    if not line:
        raise RuntimeError(f"an engine ended with {process.wait()}")
    return line.strip()


def service_of(socket: str) -> int:
    """The pid of the service's process: our child that serves this socket."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"serve" in words and socket.encode() in words:
            return int(path.parent.name)
    raise RuntimeError("the store's process is not to be found")


def _stop_with_input() -> None:
    """Have the main thread interrupted, and so everything it started ended, when standard input ends."""

    def watch() -> None:
        while os.read(0, 1):
            continue
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # it may have been started to ignore it
    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    _stop_with_input()
    for found in sharing(tuple(map(int, sys.argv[1].split(",")))):
        print(json.dumps(found), flush=True)
