"""A second plugin of SGLang Diffusion, for `sglang_engine`: what a worker knows of itself, stock or not.

`list_loras`, which takes nothing and is not needed here, answers with facts. Where `BENCH_TRACE` names a
file that exists, the next release is traced, and the copies in the trace are summed. Only the standard
library is imported at module scope.
"""

from __future__ import annotations

import json
import os
import tempfile
from typing import Any

_WORKER = "sglang.multimodal_gen.runtime.managers.gpu_worker.GPUWorker"
_SCHEDULER = "sglang.multimodal_gen.runtime.managers.scheduler.Scheduler"
TRACE = "BENCH_TRACE"

_traced: dict[str, int] = {}


def activate() -> None:
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    _lend_weak_references()
    HookRegistry.register(f"{_WORKER}.list_loras", _facts, HookType.AROUND)
    HookRegistry.register(f"{_SCHEDULER}._handle_release_memory_occupation", _release, HookType.AROUND)


def _lend_weak_references() -> None:
    """A stand-in for sgl_kernel, where the real one cannot be had, lacks what SGLang's graphs need: a second
    handle on a tensor's memory. A strong one serves, and costs memory."""
    import sgl_kernel

    if "stub" in getattr(sgl_kernel, "__version__", ""):
        sgl_kernel.weak_ref_tensor = lambda tensor: tensor


def _facts(original: Any, worker: Any) -> Any:
    import torch
    from sglang.multimodal_gen.runtime.breakable_cuda_graph.runner import BaseBreakableCudaGraphRunner
    from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch

    facts: dict[str, Any] = {"pid": os.getpid(), "traced": dict(_traced)}
    facts["captured"] = BaseBreakableCudaGraphRunner.num_captures
    facts["graphs"] = sum(
        len(runner.entries)
        for stage in worker.pipeline.stages
        for runner in getattr(stage, "_bcg_runners", {}).values()
    )
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
