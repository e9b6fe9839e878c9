"""A second plugin of SGLang Diffusion, for `sglang_engine`: what a worker knows of itself, stock or not.

`list_loras`, which takes nothing and is not needed here, answers with facts. Where `BENCH_TRACE` names a
file that exists, the next release is traced, and the copies in the trace are summed. What stops the capture
of a CUDA graph is kept with all that led to it: SGLang logs the last error alone, which is one of its own
clean-up. Only the standard library is imported at module scope.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from typing import Any

_WORKER = "sglang.multimodal_gen.runtime.managers.gpu_worker.GPUWorker"
_SCHEDULER = "sglang.multimodal_gen.runtime.managers.scheduler.Scheduler"
_RUNNER = "sglang.multimodal_gen.runtime.breakable_cuda_graph.runner.BaseBreakableCudaGraphRunner"
_REFERENCES = "sglang.srt.model_executor.runner_backend_utils.weak_ref_tensor"
TRACE = "BENCH_TRACE"
LINKS = 8
"""Errors of a chain that are kept."""

_traced: dict[str, int] = {}
_failed_captures: list[list[dict[str, str]]] = []
_replays = [0]


def activate() -> None:
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    lend_weak_references()
    HookRegistry.register(f"{_WORKER}.list_loras", _facts, HookType.AROUND)
    HookRegistry.register(f"{_SCHEDULER}._handle_release_memory_occupation", _release, HookType.AROUND)
    HookRegistry.register(f"{_RUNNER}._capture", capture, HookType.AROUND)
    HookRegistry.register(f"{_RUNNER}.replay", _replay, HookType.AROUND)


def lent(tensor: Any) -> Any:
    """A second handle on a tensor's memory. SGLang wants a weak one; a strong one does, and costs memory."""
    return tensor


def lend_weak_references() -> None:
    """A stand-in for sgl_kernel, where the real one cannot be had, lacks what SGLang's graphs need.

    SGLang binds the name when it imports its own module of weak references, at the first capture: that comes
    later than this; if it had come before, that binding is replaced too.
    """
    import sgl_kernel

    if "stub" not in getattr(sgl_kernel, "__version__", ""):
        return
    sgl_kernel.weak_ref_tensor = lent
    if _REFERENCES in sys.modules:
        sys.modules[_REFERENCES].weak_ref_tensor = lent  # type: ignore[attr-defined]


def weak_references() -> str:
    """What SGLang's graphs use, as it is bound: the real one, or the one lent here."""
    import sgl_kernel

    module = sys.modules.get(_REFERENCES)
    bound = getattr(module or sgl_kernel, "weak_ref_tensor", None)
    state = "bound" if module is not None else "not bound yet"
    return f"{'lent' if bound is lent else getattr(bound, '__module__', None)}, {state}"


def chain(error: BaseException | None) -> list[dict[str, str]]:
    """An error, what caused it or was being handled when it came, and so on: the first is the last link."""
    found: list[dict[str, str]] = []
    while error is not None and len(found) < LINKS:
        frames = traceback.extract_tb(error.__traceback__)
        where = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-3:]]
        found.append(
            {"type": type(error).__name__, "message": str(error)[:500], "at": " > ".join(reversed(where))}
        )
        error = error.__cause__ or error.__context__
    return found


def capture(original: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return original(*args, **kwargs)
    except Exception as error:
        _failed_captures.append(chain(error))
        raise


def _replay(original: Any, *args: Any, **kwargs: Any) -> Any:
    _replays[0] += 1
    return original(*args, **kwargs)


def _facts(original: Any, worker: Any) -> Any:
    import torch
    from sglang.multimodal_gen.runtime.breakable_cuda_graph.runner import BaseBreakableCudaGraphRunner
    from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch

    facts: dict[str, Any] = {"pid": os.getpid(), "traced": dict(_traced)}
    facts["captured"] = BaseBreakableCudaGraphRunner.num_captures
    facts["replays"] = _replays[0]
    facts["weak_ref_tensor"] = weak_references()
    if _failed_captures:
        facts["failed_captures"] = list(_failed_captures)
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        facts["device_used"] = total - free
        facts["torch_reserved"] = torch.cuda.memory_reserved()
        facts["torch_allocated"] = torch.cuda.memory_allocated()
    return OutputBatch(output=facts)


def _release(original: Any, scheduler: Any, reqs: Any) -> Any:
    flag = os.environ.get(TRACE, "")
    if not flag or not os.path.exists(flag):
        return original(scheduler, reqs)
    os.unlink(flag)
    import torch
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=kinds) as trace:
        answer = original(scheduler, reqs)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.json")
        trace.export_chrome_trace(path)
        with open(path) as file:
            events = json.load(file)["traceEvents"]
    _traced.clear()
    _traced["events"] = len(events)
    for event in events:
        if event.get("cat") == "gpu_memcpy":
            kind = event["name"].split(" (")[0]
            _traced[kind] = _traced.get(kind, 0) + int(event.get("args", {}).get("bytes", 0))
    return answer
