"""The verbs of the control endpoints against a real hook and store, without HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Iterator

import pytest
import torch
from hooked import Faulty, fresh_model, publish, scaled
from prometheus_client import generate_latest
from torch import nn

import weightstore
from engine_hooks import EngineHook, State
from engine_hooks.integrations.answers import Answer, generation_refused, status_of
from engine_hooks.integrations.checksums import module_checksum, tensor_checksum, tensor_checksums
from engine_hooks.integrations.controls import Controls
from engine_hooks.integrations.metrics import registry_of
from weightstore.client import Store
from weightstore.errors import (
    DeviceError,
    EngineAsleep,
    EngineBroken,
    EngineBusy,
    StoreGone,
    StoreTimeout,
    TagTorn,
    UsageError,
)


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with weightstore.local_store(capacity="64MiB", window="8MiB") as store:
        yield store


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).eval().requires_grad_(False)


@pytest.fixture
def hook(store: Store) -> Iterator[EngineHook]:
    modules = {"transformer": net(), "vae": net(1)}
    with EngineHook.attach(store, fresh_model(), modules, tag="policy", backend=Faulty()) as hook:
        yield hook


@pytest.fixture
def controls(hook: EngineHook) -> Controls:
    return Controls(hook)


def memory(answer: Answer) -> tuple[int, bool, bool, str]:
    assert answer.body is not None
    return answer.status, *(answer.body[key] for key in ("success", "sleeping", "message"))


# -- what tags mean -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "asleep"),
    [
        (None, {"transformer", "vae"}),
        ([], {"transformer", "vae"}),
        (["weights"], {"transformer", "vae"}),
        (["weights", "kv_cache", "cuda_graph"], {"transformer", "vae"}),
        (["vae"], {"vae"}),
        (["vae", "kv_cache"], {"vae"}),
        (["kv_cache", "cuda_graph"], set()),
    ],
)
def test_tags_choose_components(controls: Controls, tags: list[str] | None, asleep: set[str]) -> None:
    for verb, state in ((controls.release, State.ASLEEP), (controls.resume, State.AWAKE)):
        answer = verb(tags)
        assert answer.ok
        assert answer.body is not None
        assert set(answer.body["components"]) == asleep
        assert answer.body["sleeping"] == (state is State.ASLEEP and bool(asleep))
        assert {name for name, found in controls.hook.states.items() if found is state} >= asleep
        assert (answer.body["message"] == "the tags name nothing that is held here") == (not asleep)


def test_a_tag_nobody_knows_is_refused_and_nothing_happens(controls: Controls) -> None:
    answer = controls.release(["vae", "transfomer"])
    assert memory(answer)[:3] == (400, False, False)
    assert "no component transfomer; attached are transformer, vae" in memory(answer)[3]
    assert controls.hook.state is State.AWAKE
    assert controls.counted() == {("sleep", "refused"): 1}


def test_sleeping_is_said_until_all_are_awake(controls: Controls) -> None:
    controls.release()
    assert memory(controls.resume(["transformer"]))[2] is True
    assert controls.is_sleeping() == (200, {"is_sleeping": True})
    assert memory(controls.release(["vae"])) == (200, True, True, "already sleeping")
    assert memory(controls.resume(["transformer"])) == (200, True, True, "already awake")
    assert memory(controls.resume())[2] is False
    assert controls.is_sleeping() == (200, {"is_sleeping": False})


# -- errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UsageError("x"), 400),
        (TagTorn("x"), 400),
        (EngineBusy("x"), 400),
        (EngineBroken("x"), 400),
        (StoreGone("x"), 503),
        (StoreTimeout("x"), 503),
        (DeviceError("x"), 500),
        (ValueError("x"), 500),
    ],
)
def test_whose_fault_it_is_decides_the_status(error: Exception, status: int) -> None:
    assert status_of(error) == status


def test_a_device_that_fails_is_a_500_that_says_so(
    controls: Controls, caplog: pytest.LogCaptureFixture
) -> None:
    controls.release()
    controls.hook.backend.fail = {"wake": 1}  # type: ignore[attr-defined]
    assert memory(controls.resume()) == (500, False, True, "no memory today")
    assert "Traceback" in caplog.text
    assert memory(controls.resume())[:3] == (200, True, False)
    assert controls.counted() == {("sleep", "done"): 1, ("wake", "failed"): 1, ("wake", "done"): 1}


def test_an_error_that_is_not_ours_names_its_type(controls: Controls) -> None:
    def fails(changed: tuple[str, ...]) -> None:
        raise ValueError("the cache is of another size")

    controls.hook.after_refit(fails)
    controls.release()
    assert memory(controls.resume()) == (500, False, False, "ValueError: the cache is of another size")


def test_generations_that_meet_no_weights() -> None:
    status, body = generation_refused(EngineAsleep("transformer sleeps"))
    assert (status, list(body or ())) == (400, ["detail"])
    assert "resume_memory_occupation" in (body or {})["detail"]
    assert generation_refused(EngineBroken("half"))[0] == 503


# -- updates ------------------------------------------------------------------------------------------


def test_an_update_for_another_model_tag_or_version_is_refused(store: Store, controls: Controls) -> None:
    hook = controls.hook
    publish(store, hook.model, {"transformer": net(2)}, tag="policy", components=["transformer"])
    for asked in ({"model": "other"}, {"tag": "ema"}, {"version": 1}, {"version": 7}):
        status, body = controls.update_from_store(**asked)  # type: ignore[arg-type]
        assert (status, (body or {})["success"]) == (400, False)
        assert hook.version == 1
    status, body = controls.update_from_store(hook.model, "policy", 2)
    assert (status, hook.version) == (200, 2)
    assert body is not None
    assert body["version"] == 2
    assert body["message"] == f"the engine has version 2 of {hook.model!r}: 7 tensors changed"
    assert controls.counted() == {("refit", "refused"): 4, ("refit", "done"): 1}


def test_a_tag_that_moves_back_is_followed(store: Store, controls: Controls) -> None:
    hook = controls.hook
    store.tag(hook.model, "old", version=1)
    publish(store, hook.model, {"transformer": net(2)}, tag="policy", components=["transformer"])
    assert controls.update_from_store(version=2).ok
    store.tag(hook.model, "policy", "old")
    assert controls.update_from_store(version=1).ok
    assert hook.version == 1


def test_several_commits_since_the_last_update_are_one_update(store: Store, controls: Controls) -> None:
    hook = controls.hook
    for seed in (2, 3, 4):
        publish(store, hook.model, {"transformer": net(seed)}, tag="policy", components=["transformer"])
    status, body = controls.update_from_store(version=4)
    assert (status, hook.version) == (200, 4)
    assert {key: (body or {})[key] for key in ("previous", "version")} == {"previous": 1, "version": 4}
    assert controls.last["refit"].version == 4  # type: ignore[union-attr]
    assert module_checksum(hook.modules["transformer"]) == module_checksum(net(4))
    assert hook.verify().ok


def test_an_update_that_was_overtaken_says_so(
    store: Store, controls: Controls, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = controls.hook
    refit = hook.refit

    def overtaken() -> object:
        publish(store, hook.model, {"transformer": net(3)}, tag="policy", components=["transformer"])
        refit()
        return refit()

    publish(store, hook.model, {"transformer": net(2)}, tag="policy", components=["transformer"])
    monkeypatch.setattr(hook, "refit", overtaken)
    status, body = controls.update_from_store(version=2)
    assert status == 400
    assert "names version 3, not 2; the engine has 3" in (body or {})["message"]
    status, body = controls.update_from_store()
    assert status == 400
    assert "moves faster than refits" in (body or {})["message"]
    monkeypatch.setattr(hook, "refit", refit)
    assert controls.update_from_store().ok


# -- checksums ----------------------------------------------------------------------------------------


def test_checksums_are_of_logical_bytes_and_ignore_wrappers() -> None:
    conv = nn.Conv2d(3, 4, 3)
    expected = module_checksum(conv)
    conv.weight.data = conv.weight.data.to(memory_format=torch.channels_last)
    assert module_checksum(conv) == expected
    assert module_checksum(torch.compile(conv, backend="eager")) == expected  # type: ignore[arg-type]
    with torch.no_grad():
        conv.weight[0, 0, 0, 0] += 1
    assert module_checksum(conv) != expected


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64]
)
@pytest.mark.parametrize("shape", [(), (0,), (3, 2)])
def test_tensor_checksums_of_every_kind(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape).to(dtype)
    raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    expected = hashlib.sha256(str(dtype).encode() + repr(shape).encode() + raw).hexdigest()
    assert tensor_checksum(tensor) == expected


def test_ties_and_buffers_can_be_checked_by_any_name() -> None:
    module = net()
    module[0].again = module[0].weight  # type: ignore[index, union-attr]
    names = ["0.weight", "0.again", "1.running_mean", "nothing"]
    found = tensor_checksums(module, names)
    assert list(found) == names[:3]
    assert found["0.weight"] == found["0.again"]


def test_a_check_tells_which_tensors_differ(controls: Controls) -> None:
    module = controls.hook.modules["vae"]
    expected = tensor_checksums(module, ["0.weight", "0.bias"])
    assert controls.check("vae", {name: digest.upper() for name, digest in expected.items()}).ok
    status, body = controls.check("vae", expected | {"0.bias": "0" * 64, "2.weight": "1" * 64})
    assert (status, (body or {})["success"]) == (400, False)
    assert (body or {})["message"] == "vae is not as expected: it has no 2.weight; other bytes in 0.bias"
    assert controls.counted() == {("check", "done"): 1, ("check", "refused"): 1}


# -- generations --------------------------------------------------------------------------------------


def test_a_generation_needs_all_components_or_those_it_names(controls: Controls) -> None:
    controls.release(["vae"])
    with pytest.raises(EngineAsleep), controls.generation():
        pass
    with controls.generation(["transformer"]) as version:
        assert version == 1


def test_a_generation_on_an_event_loop_is_refused_before_it_can_block(controls: Controls) -> None:
    async def serve() -> None:
        with controls.generation():
            pass

    with pytest.raises(UsageError, match="event loop"):
        asyncio.run(serve())


def test_a_sleep_that_waited_in_vain_changes_nothing(controls: Controls) -> None:
    controls.hook.drain_timeout = 0.05
    inside, over = threading.Event(), threading.Event()

    def generate() -> None:
        with controls.generation():
            inside.set()
            over.wait(20)

    thread = threading.Thread(target=generate)
    thread.start()
    assert inside.wait(20)
    refused = controls.release()
    over.set()
    thread.join(20)
    assert memory(refused)[:3] == (400, False, False)
    assert "1 generations were still running" in memory(refused)[3]
    assert memory(controls.release())[:3] == (200, True, True)


# -- metrics ------------------------------------------------------------------------------------------


def samples(controls: Controls) -> dict[str, float]:
    lines = generate_latest(registry_of(controls)).decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name.removeprefix("weightstore_engine_"): float(value) for name, value in pairs}


def test_metrics_say_what_happened(store: Store, controls: Controls) -> None:
    hook = controls.hook
    before = samples(controls)
    assert before[f'info{{device="cpu",model="{hook.model}",tag="policy"}}'] == 1
    assert before['state{component="vae",state="awake"}'] == 1
    assert (before["version"], before["store_connected"]) == (1, 1)
    assert not [name for name in before if name.startswith(("last_", "operations"))]
    controls.release(["vae"])
    controls.release(["vae"])
    controls.resume()
    with store.refit(hook.model, tag="policy", partial=True) as refit:
        refit.put_many(scaled(net(), 2.0, "transformer", only="0.weight"))
    controls.update_from_store()
    controls.release(["vae"])
    after = samples(controls)
    assert after['state{component="vae",state="awake"}'] == 0
    assert after['state{component="vae",state="asleep"}'] == 1
    assert after["version"] == 2
    assert after["last_refit_copied_bytes"] == 8 * 8 * 4
    assert after["last_sleep_residual_bytes"] > 0
    assert after['operations_total{operation="sleep",outcome="done"}'] == 2
    assert after['operations_total{operation="sleep",outcome="repeated"}'] == 1
    assert after['operations_total{operation="refit",outcome="done"}'] == 1
    seconds = [f"last_{operation}_seconds" for operation in ("sleep", "wake", "refit")]
    assert all(after[name] > 0 for name in seconds)
