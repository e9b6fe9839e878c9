"""One engine and one trainer on one GPU: sleep, wake, put and refit, each next to one copy of its bytes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from bench.gpu_common import Limit, random_modules, scramble
from bench.gpu_settings import GpuSettings
from bench.rows import Goal, Row, clock
from bench.shapes import total_bytes
from engine_hooks import EngineHook
from engine_hooks.cuda_image import CudaImage
from engine_hooks.cuda_memory import device_memory
from weightstore.client import Store, connect
from weightstore.local import local_store
from weightstore.types import align_up

H2D = "one pinned H2D copy"
D2H = "one pinned D2H copy"
REFERENCES = {
    H2D: "one cuMemcpyAsync of the same bytes from pinned memory to the GPU, waited for",
    D2H: "one cuMemcpyAsync of the same bytes from the GPU to pinned memory, waited for",
}


def cycle(settings: GpuSettings) -> Iterator[Row]:
    """Rows about a model that is published once and then slept, woken and refitted."""
    specs = settings.specs(whole=True)
    modules = random_modules(specs)
    main = total_bytes(s for s in specs if s.name.startswith(settings.main + "."))
    whole = total_bytes(specs)
    # The model, and a second version of what is trained.
    capacity = align_up(whole + main + 2 * settings.window + 256 * len(specs), settings.window)
    with local_store(capacity, window=settings.window) as store, connect(store.socket) as trainer:
        hook = EngineHook.attach(store, "model", modules, device="cuda:0")
        limit = Limit(whole)
        try:
            yield Row(
                "attach.first",
                "attach that publishes the model from the GPU, with an empty store: commit, pin, put, wake",
                {"measured": [hook.attached.seconds]},
                nbytes=whole,
            )
            yield from _first(hook, main)
            yield from _wakes(settings, hook, limit, main, whole)
            limit.free_device()
            hook.sleep([name for name in hook.states if name != settings.main])  # room for a trainer
            yield from _puts_and_refits(settings, trainer, hook, limit, main)
            limit.free_device()
            hook.wake()
            yield from _verify(hook, limit, whole)
        finally:
            hook.close()
            limit.close()
            modules.clear()
            torch.cuda.empty_cache()


def _first(hook: EngineHook, main: int) -> Iterator[Row]:
    slept = hook.sleep()
    yield Row("sleep.first", "the first sleep of all", {"measured": [slept.seconds]})
    yield Row("wake.first", "the first wake of all", {"measured": [hook.wake().seconds]}, nbytes=main)


def _wakes(settings: GpuSettings, hook: EngineHook, limit: Limit, main: int, whole: int) -> Iterator[Row]:
    everything = list(hook.states)
    sleeps: dict[str, list[float]] = {"main": [], "whole": []}
    freed: list[float] = []
    for name, tags, nbytes in (("main", [settings.main], main), ("whole", everything, whole)):
        for when, wait, least in (("later", settings.asleep, 0.97), ("now", 0.0, 0.92)):
            seconds: dict[str, list[float]] = {H2D: [], "measured": []}
            for _ in range(settings.rounds):
                hook.wake()
                seconds[H2D].append(limit.h2d(nbytes))
                report = hook.sleep(tags)
                sleeps[name].append(report.seconds)
                if tags is everything:
                    freed.append(report.freed_bytes / nbytes)
                time.sleep(wait)
                seconds["measured"].append(clock(hook.wake, tags))
            what = f"{settings.main} of" if name == "main" else "all of"
            asleep = f"after {wait:g} s asleep" if wait else "immediately after the sleep"
            yield Row(
                f"wake.{name}.{when}",
                f"wake {what} {settings.model} {asleep}: hook.wake(), until kernels may run",
                seconds,
                reference=H2D,
                references=REFERENCES,
                nbytes=nbytes,
                goal=Goal(least, True),
            )
    for name, what in (("main", settings.main), ("whole", f"all of {settings.model}")):
        yield Row(
            f"sleep.{name}",
            f"sleep {what}: hook.sleep(), nothing copied",
            {"measured": sleeps[name]},
            goal=Goal(0.030, False),
        )
    yield Row(
        "sleep.freed",
        "share of the weights' bytes that mem_get_info has back after a sleep",
        {"measured": sleeps["whole"]},
        value=min(freed),
        unit="",
        goal=Goal(0.999, True),
        notes={"residual": _residual(hook)},
    )
    yield from _after_another(settings, hook, limit, whole)


def _residual(hook: EngineHook) -> dict[str, int]:
    """What is left on the device while everything sleeps, by name, in bytes."""
    hook.sleep()
    torch.cuda.empty_cache()
    images = [part.image for part in hook._components.choose(None) if isinstance(part.image, CudaImage)]
    left = device_memory(0, images)
    hook.wake()
    return {
        "in_use": left.in_use,
        "images": left.images,
        "torch_allocated": left.torch_allocated,
        "torch_cached": left.torch_cached,
        "torch_graph_pools": left.torch_graph_pools,
        "contexts_and_others": left.elsewhere,
    }


PATIENCE = 3.0
"""Seconds the driver has to take back the memory of a process that was killed."""

OTHER = """
import sys, torch
held = torch.empty(int(sys.argv[1]), dtype=torch.uint8, device="cuda").fill_(1)
torch.cuda.synchronize()
print("ready", flush=True)
sys.stdin.read()
"""


def _after_another(settings: GpuSettings, hook: EngineHook, limit: Limit, whole: int) -> Iterator[Row]:
    """Another process holds the GPU's memory while the engine sleeps, and ends just before it wakes."""
    limit.free_device()
    seconds: dict[str, list[float]] = {H2D: [], "measured": []}
    for _ in range(min(settings.rounds, 3)):
        seconds[H2D].append(limit.h2d(whole))
        limit.free_device()
        hook.sleep()
        other = subprocess.Popen(
            [sys.executable, "-c", OTHER, str(whole)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert other.stdout is not None
        other.stdout.readline()
        in_use = hook.backend.memory_in_use()
        other.kill()
        # Its memory is there again a while after the signal, and only then can anybody use it.
        deadline = time.perf_counter() + PATIENCE
        while hook.backend.memory_in_use() > in_use - whole and time.perf_counter() < deadline:
            pass
        seconds["measured"].append(clock(hook.wake))
        other.communicate()
    yield Row(
        "wake.whole.after_another",
        f"wake all of {settings.model} right after another process's memory of that size was freed",
        seconds,
        reference=H2D,
        references=REFERENCES,
        nbytes=whole,
        goal=Goal(0.92, True),
    )


def _puts_and_refits(
    settings: GpuSettings, store: Store, hook: EngineHook, limit: Limit, main: int
) -> Iterator[Row]:
    trainer = random_modules(settings.specs(whole=False))[settings.main]
    put: dict[str, list[float]] = {D2H: [], "measured": [], "first": []}
    refit: dict[str, list[float]] = {H2D: [], "measured": []}
    phases: dict[str, list[float]] = {"open": [], "put_module": [], "commit": []}
    limit.h2d(main)
    for number in range(settings.rounds + 2):
        scramble(trainer.parameters())
        torch.cuda.synchronize()
        limited = limit.d2h(main)
        took = clock(_put, store, trainer, settings.main, None, phases)
        # The first two write to extents that were never pinned; from then on two take turns.
        if number < 2:
            put["first"].append(took)
        else:
            put[D2H].append(limited)
            put["measured"].append(took)
        limited = limit.h2d(main)
        took = clock(hook.refit)
        if number >= 2:
            refit[H2D].append(limited)
            refit["measured"].append(took)
    first = put.pop("first")
    yield Row(
        "put",
        f"refit of the {settings.main} from the GPU: open, put_module, commit",
        put,
        reference=D2H,
        references=REFERENCES,
        nbytes=main,
        goal=Goal(0.95, True),
        notes={"first": first, "phases": phases},
    )
    yield Row(
        "refit.all",
        f"awake engine takes a version in which all of the {settings.main} changed: hook.refit()",
        refit,
        reference=H2D,
        references=REFERENCES,
        nbytes=main,
        goal=Goal(0.95, True),
    )
    yield from _some(
        settings, store, hook, limit, trainer, sorted(refit["measured"])[len(refit["measured"]) // 2]
    )


def _some(
    settings: GpuSettings, store: Store, hook: EngineHook, limit: Limit, trainer: nn.Module, full: float
) -> Iterator[Row]:
    """One tensor in a hundred changed."""
    chosen = [name for i, (name, _) in enumerate(trainer.named_parameters()) if i % 100 == 50]
    nbytes = sum(trainer.get_parameter(name).nbytes for name in chosen)
    seconds: dict[str, list[float]] = {H2D: [], "measured": []}
    copied = 0
    for _ in range(settings.rounds):
        scramble(trainer.get_parameter(name) for name in chosen)
        _put(store, trainer, settings.main, chosen)
        seconds[H2D].append(limit.h2d(nbytes))
        began = time.perf_counter()
        copied = hook.refit().copied_bytes
        seconds["measured"].append(time.perf_counter() - began)
    yield Row(
        "refit.some",
        f"awake engine takes a version in which {len(chosen)} tensors changed: hook.refit()",
        seconds,
        reference=H2D,
        references=REFERENCES,
        nbytes=nbytes,
        goal=Goal(0.95, True),
        notes={
            "copied_bytes": copied,
            "share_of_bytes": copied / sum(p.nbytes for p in trainer.parameters()),
            "share_of_time": sorted(seconds["measured"])[len(seconds["measured"]) // 2] / full,
        },
    )


def _put(
    store: Store,
    trainer: nn.Module,
    component: str,
    names: Iterable[str] | None,
    phases: dict[str, list[float]] | None = None,
) -> None:
    torch.cuda.synchronize()
    times = [time.perf_counter()]
    with store.refit("model", components=[component], partial=names is not None) as refit:
        times.append(time.perf_counter())
        if names is None:
            refit.put_module(trainer, prefix=f"{component}.")
        else:
            refit.put_many((f"{component}.{name}", trainer.get_parameter(name)) for name in names)
        times.append(time.perf_counter())
        refit.commit()
        times.append(time.perf_counter())
    for phase, start, end in zip(phases or (), times, times[1:], strict=False):
        (phases or {})[phase].append(end - start)


def _verify(hook: EngineHook, limit: Limit, whole: int) -> Iterator[Row]:
    seconds: dict[str, list[float]] = {H2D: [], "measured": []}
    torch.cuda.empty_cache()
    for _ in range(2):
        report = hook.verify()
        assert not report.differing, report.differing[:3]
        seconds["measured"].append(report.seconds)
        seconds[H2D].append(limit.h2d(whole // 4) * 4)
    yield Row(
        "verify",
        "hook.verify(): every byte on the GPU compared with the arena, on the GPU",
        seconds,
        reference=H2D,
        references=REFERENCES,
        nbytes=whole,
        goal=Goal(0.9, True),
    )
