"""vLLM-Omni: sleep, wake and refit of diffusion workers through the store, called with `collective_rpc`.

`WeightstoreWorkerExtension` is named in the engine's ``worker_extension_cls``; vLLM-Omni puts it before its
own worker among the bases of the class it makes. It calls and changes nothing of the engine until the first
``weightstore_…`` method is called, which attaches the modules of ``model_runner.pipeline``.

    extension = "engine_hooks.integrations.vllm_omni.WeightstoreWorkerExtension"
    omni = AsyncOmni(model=…, worker_extension_cls=extension)
    await omni.collective_rpc("weightstore_sleep", stage_ids=[0])

Invariants:
- every rank answers for all: an operation that failed on one rank raises on each, naming the rank;
- after a wake and after a refit all ranks hold one version, though a trainer may commit meanwhile;
- ranks that hold different parts of a model are refused: they would get each other's weights.

Like vLLM-Omni's own sleep, the methods must run on every rank (no ``unique_reply_rank``): they end in a
collective of the host's group. Nothing of vLLM or vLLM-Omni is imported unless there are several ranks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from engine_hooks.hook import EngineHook
from engine_hooks.lifecycle import State
from weightstore.client import Store, connect
from weightstore.errors import AttachError, DeviceError, UsageError, WeightstoreError
from weightstore.types import DEFAULT_TAG

MODEL_VARIABLE: Final = "WEIGHTSTORE_MODEL"
TAG_VARIABLE: Final = "WEIGHTSTORE_TAG"

GIB: Final = 1 << 30
_ROUNDS: Final = 8
"""How often ranks that took different versions try again to have the same."""
_SHARDED: Final = {
    "tensor_parallel_size": "tensor parallelism",
    "pipeline_parallel_size": "pipeline parallelism",
    "text_encoder_tp_size": "a tensor-parallel text encoder",
}
_FLAGS: Final = {
    "enable_sleep_mode": "enable_sleep_mode: its pool would keep the memory that weightstore gives back; "
    "leave it off, weightstore_sleep takes its place",
    "enable_cpu_offload": "enable_cpu_offload moves the weights about",
    "enable_layerwise_offload": "enable_layerwise_offload moves the weights about",
    "enable_distributed_layerwise_offload": "enable_distributed_layerwise_offload moves the weights about",
    "diffusion_offload_config": "diffusion_offload_config moves the weights about",
    "lora_path": "lora_path: a LoRA given at start is part of the engine's modules; publish it as a version "
    "(docs/lora.md)",
}
_TRANSFORMERS: Final = ("transformer", "transformer_2")

_log = logging.getLogger("engine_hooks")

T = TypeVar("T")


class WeightstoreWorkerExtension:
    """To be mixed into vLLM-Omni's `DiffusionWorker`, whose `model_runner`, `od_config`, `device`, `rank` and
    `stage_id` it reads. Configured by ``WEIGHTSTORE_MODEL``, and optionally ``WEIGHTSTORE_TAG`` and
    ``WEIGHTSTORE_SOCKET``, in the workers' environment.

    Answers are plain dicts in the shape of vLLM-Omni's acks: ``status``, ``stage_id``, ``rank`` (who
    answers), ``freed_bytes`` (of all ranks together), ``version``, ``sleeping``, ``seconds`` (of the slowest)
    and ``ranks``, a list with those facts and more of each rank, such as ``residual_gib``.

    Every method raises, on all ranks, what went wrong on any; the engine's executor passes that on.
        UsageError: `WEIGHTSTORE_MODEL` is not set.
        AttachError: the engine is configured in a way that cannot be bound bit-exactly; names every reason.
        whatever the methods of `EngineHook` raise, if there is only one rank; else WeightstoreError with the
        ranks' messages.
    """

    _weightstore_bound: _Bound | None = None

    def weightstore_attach(self) -> dict[str, Any]:
        """Bind the pipeline's modules to the store's model; the first of the other calls does this too.

        If the store lacks the model, one rank publishes it. Idempotent."""

        def work(hook: EngineHook) -> dict[str, Any]:
            report = hook.attached
            return {
                "published": report.published,
                "weight_bytes": report.weight_bytes,
                "tensors": report.tensors,
                "seconds": report.seconds,
            }

        return self._weightstore_do(work)

    def weightstore_sleep(self, tags: Sequence[str] | None = None) -> dict[str, Any]:
        """Give the device memory of all components back, or of those named. Weights are not copied."""

        def work(hook: EngineHook) -> dict[str, Any]:
            report = hook.sleep(tags)
            return {
                "components": list(report.slept),
                "already": list(report.already),
                "freed_bytes": report.freed_bytes,
                "residual_gib": round(report.residual_bytes / GIB, 3),
                "seconds": report.seconds,
            }

        return self._weightstore_do(work)

    def weightstore_wake(self, tags: Sequence[str] | None = None) -> dict[str, Any]:
        """Put all components back on the device, or those named. If everything slept: the newest version."""

        def work(hook: EngineHook) -> dict[str, Any]:
            report = hook.wake(tags)
            return {
                "components": list(report.woken),
                "already": list(report.already),
                "changed": len(report.changed),
                "copied_bytes": report.copied_bytes,
                "seconds": report.seconds,
            }

        return self._weightstore_do(work, same=True)

    def weightstore_refit(self) -> dict[str, Any]:
        """Take the tag's newest version: at once, or, for components that sleep, when they wake."""

        def work(hook: EngineHook) -> dict[str, Any]:
            report = hook.refit()
            return {
                "previous": report.previous,
                "changed": len(report.changed),
                "copied_bytes": report.copied_bytes,
                "seconds": report.seconds,
            }

        return self._weightstore_do(work, same=True)

    def weightstore_verify(self) -> dict[str, Any]:
        """Compare the weights on the device with the store's, bit by bit; ``ok`` is for all ranks."""

        def work(hook: EngineHook) -> dict[str, Any]:
            report = hook.verify()
            return {
                "ok": report.ok,
                "differing": list(report.differing),
                "moved": list(report.moved),
                "compared_bytes": report.compared_bytes,
                "seconds": report.seconds,
            }

        answer = self._weightstore_do(work)
        return {**answer, "ok": all(rank["ok"] for rank in answer["ranks"])}

    def weightstore_status(self) -> dict[str, Any]:
        """What is attached, asleep and held, rank by rank; attaches nothing."""

        def facts() -> dict[str, Any]:
            bound = self._weightstore_bound
            return {"attached": False} if bound is None else {"attached": True, **bound.facts()}

        return self._weightstore_answer(_on_every_rank(lambda: self._weightstore_own(facts())))

    # -- underneath --------------------------------------------------------------------------------

    def _weightstore_do(
        self, work: Callable[[EngineHook], dict[str, Any]], same: bool = False
    ) -> dict[str, Any]:
        """Do it on every rank; with `same`, see to it that all hold one version afterwards."""

        def own() -> dict[str, Any]:
            bound = self._weightstore_attached()
            did = work(bound.hook)
            return self._weightstore_own({"freed_bytes": 0, "seconds": 0.0, **bound.facts(), **did})

        def level() -> dict[str, Any]:
            bound = self._weightstore_attached()
            bound.hook.refit()
            return bound.facts()

        ranks = _on_every_rank(own)
        for _ in range(_ROUNDS):
            if not same or len({rank["version"] for rank in ranks}) == 1:
                return self._weightstore_answer(ranks)
            # A commit came between two ranks' looks at the tag.
            ranks = [{**was, **now} for was, now in zip(ranks, _on_every_rank(level), strict=True)]
        versions = ", ".join(f"rank {rank['rank']}: {rank['version']}" for rank in ranks)
        raise WeightstoreError(
            f"the ranks hold different versions ({versions}): commits come too fast; ask again"
        )

    def _weightstore_own(self, facts: dict[str, Any]) -> dict[str, Any]:
        worker: Any = self
        return {"rank": worker.rank, "stage_id": getattr(worker, "stage_id", 0), **facts}

    def _weightstore_answer(self, ranks: list[dict[str, Any]]) -> dict[str, Any]:
        own = self._weightstore_own({})
        answer = {"status": "SUCCESS", **own, "ranks": ranks}
        if all("version" in rank for rank in ranks):
            answer["version"] = ranks[0]["version"]
            answer["sleeping"] = any(rank["sleeping"] for rank in ranks)
        if all("freed_bytes" in rank for rank in ranks):
            answer["freed_bytes"] = sum(rank["freed_bytes"] for rank in ranks)
            answer["seconds"] = max(rank["seconds"] for rank in ranks)
        return answer

    def _weightstore_attached(self) -> _Bound:
        worker: Any = self
        runner = worker.model_runner
        pipeline = getattr(runner, "pipeline", None)
        bound = self._weightstore_bound
        if bound is not None and bound.pipeline is not pipeline:
            _log.info("the engine has another pipeline than was attached: letting go of that one")
            self._weightstore_bound = None
            bound.close()
            bound = None
        if bound is None:
            bound = self._weightstore_bound = _bind(runner, pipeline, worker.od_config, worker.device)
            self._weightstore_close_at_shutdown()
        return bound

    def _weightstore_close_at_shutdown(self) -> None:
        """An engine in this very process may be followed by another: its memory must not stay behind.

        Set on the instance: a method of that name in this class would be reported as a conflict.
        """
        worker: Any = self
        if "shutdown" in vars(worker):
            return
        shutdown = worker.shutdown

        def closing() -> None:
            bound, self._weightstore_bound = self._weightstore_bound, None
            try:
                if bound is not None:
                    bound.close()
            except WeightstoreError:
                _log.exception("letting go of the store at shutdown")
            finally:
                shutdown()

        worker.shutdown = closing


class _Bound:
    """A pipeline that is attached, and what that needs: owns its connection and its hook."""

    def __init__(self, pipeline: nn.Module, store: Store, hook: EngineHook) -> None:
        self.pipeline = pipeline
        self.store = store
        self.hook = hook

    def facts(self) -> dict[str, Any]:
        hook = self.hook
        states = hook.states
        return {
            "model": hook.model,
            "tag": hook.tag,
            "version": hook.version,
            "state": hook.state.value,
            "sleeping": State.ASLEEP in states.values(),
            "states": {name: state.value for name, state in states.items()},
            "residual_gib": round(hook.backend.memory_in_use() / GIB, 3),
        }

    def close(self) -> None:
        try:
            self.hook.close()
        finally:
            self.store.close()


def _bind(runner: Any, pipeline: Any, config: Any, device: torch.device | str) -> _Bound:
    """Attach a pipeline. Raises UsageError, AttachError, and what connecting and attaching raise."""
    model = os.environ.get(MODEL_VARIABLE)
    if not model:
        raise UsageError(
            f"set {MODEL_VARIABLE} in the workers' environment to the model's name in the store, and "
            "WEIGHTSTORE_SOCKET if the store is not at its default place"
        )
    reasons = refusals(config, runner, pipeline)
    if reasons:
        raise AttachError(
            f"this engine cannot be attached to {model!r}: {'; '.join(reasons)}", reasons=reasons
        )
    store = connect()
    try:
        modules = components_of(pipeline)
        hook = EngineHook.attach(
            store, model, modules, device=device, tag=os.environ.get(TAG_VARIABLE) or DEFAULT_TAG
        )
    except BaseException:
        store.close()
        raise
    # Graphs captured so far read memory that is no longer the weights'; later ones stay valid for good.
    release = getattr(runner, "release_captured_graphs", None)
    if callable(release):
        release()
    hook.after_refit(lambda changed: _forget_prompts(runner, pipeline, changed))
    _log.info("attached %s of %r, version %d", ", ".join(modules), model, hook.version)
    return _Bound(pipeline, store, hook)


def refusals(config: Any, runner: Any, pipeline: Any) -> list[str]:
    """Why an engine that is configured like this cannot be attached; empty if it can."""
    if not isinstance(pipeline, nn.Module):
        return [
            f"model_runner.pipeline is {type(pipeline).__name__}, not a module: the model is not loaded yet"
        ]
    reasons = [reason for flag, reason in _FLAGS.items() if getattr(config, flag, None)]
    if getattr(runner, "offload_backend", None) is not None and not any("offload" in r for r in reasons):
        reasons.append(f"{type(runner.offload_backend).__name__} moves the weights about")
    if getattr(pipeline, "lora_is_fused", False):
        reasons.append(
            "a LoRA was fused into the weights while they were loaded, which the store's version lacks"
        )
    parallel = getattr(config, "parallel_config", None)
    sharded = [
        f"{what} ({field}={size})"
        for field, what in _SHARDED.items()
        if (size := getattr(parallel, field, 1) or 1) > 1
    ]
    sharded += [flag for flag in ("use_hsdp", "enable_expert_parallel") if getattr(parallel, flag, False)]
    if sharded:
        reasons.append(
            f"ranks hold different parts of the weights under {', '.join(sharded)}; each would get another's"
        )
    if not reasons and not components_of(pipeline):
        reasons.append(f"{type(pipeline).__name__} has no modules with weights")
    return reasons


def components_of(pipeline: nn.Module) -> dict[str, nn.Module]:
    """The pipeline's own modules that have weights, by attribute name; one with two names by the first."""
    return {
        name: module
        for name, module in pipeline.named_children()
        if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None
    }


def _forget_prompts(runner: Any, pipeline: Any, changed: Iterable[str]) -> None:
    """Prompt embeddings that the engine keeps are right only as long as the encoders are."""
    denoisers = tuple(getattr(pipeline, "_dit_modules", None) or _TRANSFORMERS)
    clear = getattr(runner, "clear_prompt_embed_cache", None)
    if callable(clear) and any(name.partition(".")[0] not in denoisers for name in changed):
        clear()


# -- ranks --------------------------------------------------------------------------------------------


def _on_every_rank(work: Callable[[], T]) -> list[T]:
    """The results of all ranks, in their order. What one raises, all raise, and no rank waits for ever."""
    try:
        own: tuple[T | None, Exception | None] = (work(), None)
    except Exception as error:
        own = (None, error)
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        result, failure = own
        if failure is not None:
            raise failure
        return [result]  # type: ignore[list-item]
    message = None if own[1] is None else f"{type(own[1]).__name__}: {own[1]}"
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (own[0], message), group=_host_group())
    failures = {rank: text for rank, (_, text) in enumerate(gathered) if text is not None}
    if failures:
        raise _failed(failures) from own[1]
    return [result for result, _ in gathered]


def _failed(failures: Mapping[int, str]) -> WeightstoreError:
    told = "; ".join(f"rank {rank}: {text}" for rank, text in failures.items())
    return WeightstoreError(told, ranks={str(rank): text for rank, text in failures.items()})


def _host_group() -> dist.ProcessGroup | None:
    """A group over the host's network: the device may be full, or its memory gone."""
    if dist.get_backend() == "gloo":
        return None
    from vllm_omni.diffusion.distributed.parallel_state import get_world_group  # a worker of it runs this

    group: dist.ProcessGroup = get_world_group().cpu_group
    if group is None:
        raise DeviceError("vLLM-Omni's world group has no group on the host")
    return group
