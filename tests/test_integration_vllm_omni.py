"""The vLLM-Omni extension: on a stand-in of the worker always, on vLLM-Omni itself where it is installed."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import omni_engines
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from omni_engines import PUBLISHED, Pipeline, StandIn, extended
from torch import nn

import weightstore as ws
from engine_hooks.integrations.vllm_omni import WeightstoreWorkerExtension, components_of, refusals
from weightstore.errors import AttachError, EngineAsleep, StoreGone, UsageError, WeightstoreError

Kinds = pytest.mark.parametrize(
    "kind",
    [
        "stand-in",
        pytest.param(
            "vllm-omni",
            marks=pytest.mark.skipif(not omni_engines.importable(), reason="vllm-omni is not installed"),
        ),
    ],
)


Start = Callable[..., StandIn]
_models = count()


@pytest.fixture(scope="module")
def store() -> Iterator[ws.Store]:
    with ws.local_store("256MiB", window="16MiB") as store:
        yield store


@pytest.fixture
def model(store: ws.Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The environment of the workers, and the model they are to use."""
    name = f"omni-{next(_models)}"
    monkeypatch.setenv("WEIGHTSTORE_SOCKET", store.socket)
    monkeypatch.setenv("WEIGHTSTORE_MODEL", name)
    monkeypatch.delenv("WEIGHTSTORE_TAG", raising=False)
    yield name
    for known in store.status().models:
        store.remove_model(known.name)


@pytest.fixture
def start(model: str, tmp_path: Path) -> Iterator[Start]:
    """Starts engines, and ends them."""
    started: list[StandIn] = []

    def start(kind: str = "stand-in") -> StandIn:
        started.append(omni_engines.ENGINES[kind](tmp_path))
        return started[-1]

    yield start
    for engine in started:
        engine.close()


def train(store: ws.Store, model: str, state: dict[str, torch.Tensor]) -> int:
    """What a trainer does that knows nothing of the engine."""
    with store.refit(model, components=["transformer"]) as refit:
        refit.put_many(state)
    return refit.report.version


# -- a round of an RL step, on both -------------------------------------------------------------------


@Kinds
def test_images_before_and_after(kind: str, store: ws.Store, model: str, start: Start) -> None:
    """Asleep and awake again: the same image, bit for bit. Refitted: that of an engine given the weights."""
    engine = start(kind)
    state = engine.trained()
    original = {n: t.clone() for n, t in engine.pipeline.transformer.state_dict().items()}
    before = engine.generate()
    engine.load(state)
    after = engine.generate()
    assert not torch.equal(before, after)
    with torch.no_grad():
        for name, parameter in engine.pipeline.transformer.named_parameters():
            parameter.copy_(original[name])

    attached = engine.call("weightstore_attach")
    assert (attached["status"], attached["version"], attached["sleeping"]) == ("SUCCESS", 1, False)
    assert attached["ranks"][0]["published"] and attached["ranks"][0]["weight_bytes"] > 0
    assert torch.equal(engine.generate(), before)
    store.publish_names(model, PUBLISHED)
    places = {n: t.data_ptr() for n, t in engine.pipeline.named_parameters()}

    slept = engine.call("weightstore_sleep")
    assert slept["sleeping"] and slept["freed_bytes"] > 0
    assert set(slept["ranks"][0]["components"]) == set(components_of(engine.pipeline))
    with pytest.raises(EngineAsleep):
        engine.generate()
    woken = engine.call("weightstore_wake")
    assert (woken["version"], woken["sleeping"], woken["ranks"][0]["changed"]) == (1, False, 0)
    assert torch.equal(engine.generate(), before)

    engine.call("weightstore_sleep")
    assert train(store, model, state) == 2
    refitted = engine.call("weightstore_refit")
    assert (refitted["version"], refitted["sleeping"]) == (2, True)
    assert refitted["ranks"][0]["copied_bytes"] == 0
    woken = engine.call("weightstore_wake")
    assert woken["version"] == 2 and woken["ranks"][0]["changed"] > 0
    assert torch.equal(engine.generate(), after)
    assert engine.call("weightstore_verify")["ok"]
    assert {n: t.data_ptr() for n, t in engine.pipeline.named_parameters()} == places

    store.tag(model, "policy", 2)
    assert train(store, model, {name: value * 0.5 for name, value in state.items()}) == 3
    assert engine.call("weightstore_refit")["version"] == 3  # awake
    assert not torch.equal(engine.generate(), after)
    store.tag(model, "latest", "policy")
    assert engine.call("weightstore_refit")["version"] == 2
    assert torch.equal(engine.generate(), after)


@pytest.mark.skipif(not omni_engines.importable(), reason="vllm-omni is not installed")
def test_the_class_that_vllm_omni_makes() -> None:
    """What the stand-in takes for granted of the real one."""
    omni_engines.use_cpu()
    from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
    from vllm_omni.diffusion.worker.diffusion_model_runner import DiffusionModelRunner
    from vllm_omni.diffusion.worker.diffusion_worker import DiffusionWorker, WorkerWrapperBase

    wrapper = object.__new__(WorkerWrapperBase)
    wrapper.__dict__.update(
        base_worker_class=DiffusionWorker,
        worker_extension_cls=omni_engines.EXTENSION,
        uses_custom_pipeline=False,
    )
    made = wrapper._prepare_worker_class()
    assert made.__mro__[1:3] == (WeightstoreWorkerExtension, DiffusionWorker)
    ours = [name for name in dir(WeightstoreWorkerExtension) if not name.startswith("__")]
    assert not [name for name in ours if hasattr(DiffusionWorker, name)], (
        "a warning of a conflict in every log"
    )
    for method in ("release_captured_graphs", "clear_prompt_embed_cache"):
        assert callable(getattr(DiffusionModelRunner, method))
    from engine_hooks.integrations import vllm_omni as module

    for field in module._FLAGS:
        assert field in OmniDiffusionConfig.__dataclass_fields__, field
    for field in (*module._SHARDED, "use_hsdp", "enable_expert_parallel"):
        assert hasattr(DiffusionParallelConfig(), field), field
    assert refusals(SimpleNamespace(parallel_config=DiffusionParallelConfig()), None, Pipeline()) == []


# -- answers ------------------------------------------------------------------------------------------


def test_repeated_calls_and_single_components(store: ws.Store, model: str, start: Start) -> None:
    engine = start()
    image = engine.generate()
    assert engine.call("weightstore_status")["ranks"] == [{"rank": 0, "stage_id": 1, "attached": False}]
    first = engine.call("weightstore_sleep", ["text_encoder", "vae"])  # attaches
    own = first["ranks"][0]
    assert own["components"] == ["text_encoder", "vae"] and own["states"]["transformer"] == "awake"
    assert first["sleeping"] and own["residual_gib"] >= 0
    again = engine.call("weightstore_sleep")["ranks"][0]
    assert (again["components"], again["already"]) == (["transformer"], ["text_encoder", "vae"])
    nothing = engine.call("weightstore_sleep")
    assert (nothing["freed_bytes"], nothing["ranks"][0]["components"]) == (0, [])
    assert engine.call("weightstore_status")["sleeping"]
    engine.call("weightstore_wake", tags=["transformer"])
    engine.call("weightstore_wake")
    assert engine.call("weightstore_wake")["ranks"][0]["components"] == []
    assert torch.equal(engine.generate(), image)
    refit = engine.call("weightstore_refit")["ranks"][0]
    assert (refit["previous"], refit["version"], refit["changed"]) == (1, 1, 0)
    status = engine.call("weightstore_status")
    assert status["ranks"][0]["attached"] and status["version"] == 1 and not status["sleeping"]
    engine.close()
    assert not store.status().leases


def test_answers_travel(store: ws.Store, model: str, start: Start) -> None:
    """vLLM-Omni pickles them, and adds a key of its own."""
    engine = start()
    for method in ("attach", "sleep", "refit", "wake", "verify", "status"):
        answer = engine.call(f"weightstore_{method}")
        assert type(answer) is dict
        assert pickle.loads(pickle.dumps(answer)) == answer == json.loads(json.dumps(answer))
        assert not {"wave_id", "error", "dp_rank", "output"} & answer.keys()
        answer["ranks"][0]["states"]["transformer"] = "changed by the caller"
        answer.clear()
    assert engine.call("weightstore_status")["ranks"][0]["states"]["transformer"] == "awake"


def test_what_the_engine_derives_from_weights(store: ws.Store, model: str, start: Start) -> None:
    engine = start()
    runner = engine.worker.model_runner
    engine.call("weightstore_attach")
    engine.call("weightstore_attach")
    assert runner.graphs_released == 1  # those captured before the weights moved
    store.publish_names(model, PUBLISHED)
    train(store, model, engine.trained())
    engine.call("weightstore_refit")
    assert runner.prompts_cleared == 0  # the encoders are as they were
    with store.refit(model, components=["text_encoder"], names=ws.NameMap()) as refit:
        refit.put("text_encoder.weight", torch.randn(256, 8))
    engine.call("weightstore_refit")
    assert (runner.prompts_cleared, runner.graphs_released) == (1, 1)


def test_a_tag_of_its_own(store: ws.Store, model: str, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTSTORE_TAG", "policy")
    engine = start()
    assert engine.call("weightstore_attach")["ranks"][0]["tag"] == "policy"
    assert store.tags(model) == {"policy": 1}


def test_a_second_engine_gets_the_weights_of_the_first(store: ws.Store, model: str, start: Start) -> None:
    first, second = start(), start()
    with torch.no_grad():
        for parameter in second.pipeline.parameters():
            parameter.zero_()
    first.call("weightstore_attach")
    assert not second.call("weightstore_attach")["ranks"][0]["published"]
    assert torch.equal(first.generate(), second.generate())


# -- another pipeline, the end ------------------------------------------------------------------------


def test_another_pipeline_is_attached_anew(store: ws.Store, model: str, start: Start) -> None:
    engine = start()
    engine.call("weightstore_sleep")
    image = start().generate()
    engine.worker.model_runner.pipeline = Pipeline()
    assert engine.call("weightstore_wake")["ranks"][0]["already"] == ["text_encoder", "vae", "transformer"]
    assert torch.equal(engine.generate(), image)
    assert len(store.status().leases) == 1


def test_a_shutdown_lets_go_of_the_store(store: ws.Store, model: str, start: Start) -> None:
    for asleep in (False, True):
        engine = start()
        engine.call("weightstore_attach")
        pipeline = engine.pipeline
        if asleep:
            engine.call("weightstore_sleep")
        assert len(store.status().leases) == 1
        engine.close()
        assert engine.worker.shut_down == 1 and engine.worker.model_runner is None
        assert not store.status().leases
        assert all(parameter.is_meta for parameter in pipeline.parameters())
        engine.worker.shutdown()
    never = start()
    never.close()
    assert never.worker.shut_down == 1


# -- refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"enable_sleep_mode": True}, "enable_sleep_mode"),
        ({"enable_cpu_offload": True}, "enable_cpu_offload"),
        ({"enable_layerwise_offload": True}, "enable_layerwise_offload"),
        ({"enable_distributed_layerwise_offload": True}, "enable_distributed_layerwise_offload"),
        ({"diffusion_offload_config": {"dit": {}}}, "diffusion_offload_config"),
        ({"lora_path": "/a/lora"}, "lora_path"),
        ({"parallel_config": SimpleNamespace(tensor_parallel_size=2)}, r"tensor_parallel_size=2"),
        ({"parallel_config": SimpleNamespace(pipeline_parallel_size=4)}, r"pipeline_parallel_size=4"),
        ({"parallel_config": SimpleNamespace(text_encoder_tp_size=2)}, r"text_encoder_tp_size=2"),
        ({"parallel_config": SimpleNamespace(use_hsdp=True)}, "use_hsdp"),
        ({"parallel_config": SimpleNamespace(enable_expert_parallel=True)}, "enable_expert_parallel"),
    ],
)
def test_engines_that_cannot_be_bound(store: ws.Store, model: str, config: dict[str, Any], says: str) -> None:
    worker = extended(**config)
    for method in ("attach", "sleep", "wake", "refit", "verify"):
        with pytest.raises(AttachError, match=says) as refused:
            getattr(worker, f"weightstore_{method}")()
        assert len(refused.value.details["reasons"]) == 1
    assert worker.weightstore_status()["ranks"][0]["attached"] is False
    assert store.models() == [] and not store.status().leases


def test_all_reasons_at_once(store: ws.Store, model: str) -> None:
    worker = extended(enable_sleep_mode=True, lora_path="x", parallel_config=SimpleNamespace(use_hsdp=True))
    worker.model_runner.offload_backend = SimpleNamespace()
    worker.model_runner.pipeline.lora_is_fused = True
    with pytest.raises(AttachError) as refused:
        worker.weightstore_sleep()
    assert len(refused.value.details["reasons"]) == 5


def test_nothing_to_attach(store: ws.Store, model: str) -> None:
    worker = extended()
    for pipeline, says in [
        (None, "not loaded yet"),
        (nn.Module(), "no modules with weights"),
        (nn.Sequential(nn.Identity()), "no modules with weights"),
    ]:
        worker.model_runner.pipeline = pipeline
        with pytest.raises(AttachError, match=says):
            worker.weightstore_sleep()


def test_without_configuration(
    store: ws.Store, model: str, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WEIGHTSTORE_MODEL")
    with pytest.raises(UsageError, match="set WEIGHTSTORE_MODEL"):
        start().call("weightstore_sleep")
    monkeypatch.setenv("WEIGHTSTORE_MODEL", "omni")
    monkeypatch.setenv("WEIGHTSTORE_SOCKET", "/tmp/nobody-here")
    engine = start()
    image = engine.generate()
    with pytest.raises(StoreGone, match="nobody-here"):
        engine.call("weightstore_sleep")
    assert torch.equal(engine.generate(), image)
    monkeypatch.setenv("WEIGHTSTORE_SOCKET", store.socket)
    engine.call("weightstore_sleep")  # the store is there now


def test_a_model_of_another_kind(store: ws.Store, model: str, start: Start) -> None:
    with store.refit(model) as refit:
        refit.put("transformer.something.else", torch.zeros(3))
    engine = start()
    image = engine.generate()
    with pytest.raises(AttachError, match=r"something\.else"):
        engine.call("weightstore_sleep")
    assert torch.equal(engine.generate(), image)
    assert not store.status().leases


def test_unknown_components(store: ws.Store, model: str, start: Start) -> None:
    engine = start()
    with pytest.raises(UsageError, match="unet"):
        engine.call("weightstore_sleep", ["unet"])
    assert not engine.call("weightstore_status")["sleeping"]


def test_components() -> None:
    pipeline = Pipeline()
    pipeline.transformer_2 = pipeline.transformer
    assert list(components_of(pipeline)) == ["text_encoder", "vae", "transformer"]


# -- several ranks ------------------------------------------------------------------------------------


def as_rank(rank: int, rendezvous: str, socket: str, results: str) -> None:
    """One of two workers, in a process of its own."""
    os.environ.update(WEIGHTSTORE_SOCKET=socket, WEIGHTSTORE_MODEL="ranks")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    worker = extended(rank=rank)
    told: dict[str, Any] = {}
    # One rank cannot: both say so, and neither waits for ever.
    if rank == 1:
        del os.environ["WEIGHTSTORE_MODEL"]
    try:
        worker.weightstore_attach()
    except WeightstoreError as error:
        told["refused"] = [type(error).__name__, str(error), sorted(error.details.get("ranks", {}))]
    os.environ["WEIGHTSTORE_MODEL"] = "ranks"
    told["attach"] = worker.weightstore_attach()
    told["sleep"] = worker.weightstore_sleep()
    # A commit after rank 0 has looked at the tag, and before rank 1 does.
    hook = worker._weightstore_bound.hook
    wake = hook.wake

    def late(tags: Any = None) -> Any:
        if rank == 0:
            report = wake(tags)
            dist.barrier()
        else:
            dist.barrier()
            with ws.connect(socket) as store, store.refit("ranks", partial=True) as refit:
                refit.put("vae.0.bias", torch.full((12,), 7.0))
            report = wake(tags)
        told["woke on"] = report.version
        return report

    hook.wake = late
    told["wake"] = worker.weightstore_wake()
    told["bias"] = worker.model_runner.pipeline.vae[0].bias.tolist()
    worker.shutdown()
    Path(results, str(rank)).write_text(json.dumps(told))
    dist.destroy_process_group()


def test_ranks_answer_for_each_other(store: ws.Store, tmp_path: Path) -> None:
    mp.start_processes(  # type: ignore[no-untyped-call]
        as_rank,
        args=(str(tmp_path / "rendezvous"), store.socket, str(tmp_path)),
        nprocs=2,
        start_method="spawn",
    )
    zero, one = (json.loads((tmp_path / str(rank)).read_text()) for rank in range(2))
    for told in (zero, one):
        kind, message, ranks = told["refused"]
        assert (kind, ranks) == ("WeightstoreError", ["1"])
        assert message.startswith("rank 1: UsageError: set WEIGHTSTORE_MODEL")
        assert [rank["rank"] for rank in told["attach"]["ranks"]] == [0, 1]
        assert told["sleep"]["freed_bytes"] == sum(rank["freed_bytes"] for rank in told["sleep"]["ranks"])
        assert told["sleep"]["sleeping"]
        assert [rank["version"] for rank in told["wake"]["ranks"]] == [2, 2]
        assert told["bias"] == [7.0] * 12
    assert (zero["woke on"], one["woke on"]) == (1, 2)
    assert (zero["sleep"]["rank"], one["sleep"]["rank"]) == (0, 1)
    assert zero["sleep"]["ranks"] == one["sleep"]["ranks"]
    assert sum(rank["published"] for rank in zero["attach"]["ranks"]) <= 1
    store.remove_model("ranks")
