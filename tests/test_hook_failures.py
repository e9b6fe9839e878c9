"""The hook when something fails: devices, stores, callers; against a real store service."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence

import pytest
import tiny_models
import torch
from hooked import PATIENCE, Faulty, X, fresh_model, net, publish
from torch import nn

import weightstore
from engine_hooks import EngineHook, State
from engine_hooks.backend import Image
from weightstore.client import Store
from weightstore.errors import (
    AttachError,
    DeviceError,
    DeviceMemoryError,
    EngineAsleep,
    EngineBroken,
)


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with weightstore.local_store(capacity="256MiB", window="16MiB") as store:
        yield store


@pytest.fixture
def model() -> str:
    return fresh_model()


@pytest.mark.parametrize(("fault", "version"), [("update", 1), ("landing", 2)])
def test_a_refit_that_fails_half_way_is_broken_until_woken(
    store: Store, model: str, fault: str, version: int
) -> None:
    """What was copied for is what the lease had moved to by then."""
    backend = Faulty()
    modules = {"a": net(0), "b": net(1), "c": net(2)}
    with EngineHook.attach(store, model, modules, backend=backend) as hook:
        modules["a"](X)
        with store.refit(model, components=["a", "b"]) as refit:
            refit.put_module(net(3), prefix="a.")
            refit.put_module(net(4), prefix="b.")
        backend.fail[fault] = 1
        with pytest.raises(DeviceError, match="stopped"):
            hook.refit()
        assert hook.states == {"a": State.BROKEN, "b": State.BROKEN, "c": State.AWAKE}
        assert hook.state is State.BROKEN
        for broken in (lambda: modules["a"](X), hook.refit, hook.verify):
            with pytest.raises(EngineBroken, match="wake"):
                broken()
        with pytest.raises(EngineBroken), hook.running():
            raise AssertionError("let in")
        backend.fail["wake"] = 1
        with pytest.raises(DeviceMemoryError):
            hook.wake()
        assert hook.state is State.BROKEN
        report = hook.wake()
        assert (report.woken, report.version) == (("a", "b"), version)
        assert len(report.changed) == 8
        assert hook.verify().ok
        assert hook.refit().version == 2
        assert hook.verify().ok
        assert int(modules["a"].steps) == 1
        for name, seed in (("a", 3), ("b", 4), ("c", 2)):
            assert torch.equal(modules[name](X), net(seed)(X))


def test_one_refit_takes_an_engine_past_several_versions(store: Store, model: str) -> None:
    modules = {"a": net(0), "b": net(1)}
    with EngineHook.attach(store, model, modules) as hook:
        told: list[tuple[str, ...]] = []
        hook.after_refit(told.append)
        for seed in (3, 4, 5):
            with store.refit(model, components=["a"]) as refit:
                refit.put_module(net(seed), prefix="a.")
        with store.refit(model, components=["b"], partial=True) as refit:
            refit.put("b.first.bias", net(6).first.bias)
        report = hook.refit()
        assert (report.version, report.previous, hook.version) == (5, 1, 5)
        assert len(report.changed) == 5 and told == [report.changed]
        assert torch.equal(modules["a"](X), net(5)(X))
        assert torch.equal(modules["b"].first.bias, net(6).first.bias)
        assert not hook.refit().changed and len(told) == 1
        assert hook.verify().ok


def test_callbacks_hear_of_what_changed_before_a_version_that_does_not_fit(store: Store, model: str) -> None:
    engine = net()
    with EngineHook.attach(store, model, {"net": engine}) as hook:
        told: list[tuple[str, ...]] = []
        hook.after_refit(told.append)
        publish(store, model, {"net": net(1)})
        with store.refit(model, extend=True, partial=True) as refit:
            refit.put("net.extra", torch.ones(3))
        with pytest.raises(AttachError, match=r"net\.extra is new"):
            hook.refit()
        assert hook.version == 2 and hook.state is State.AWAKE
        assert [len(names) for names in told] == [4]
        assert torch.equal(engine(X), net(1)(X))


def test_a_broken_engine_can_be_put_to_sleep(store: Store, model: str) -> None:
    backend = Faulty()
    engine = net()
    with EngineHook.attach(store, model, {"net": engine}, backend=backend) as hook:
        engine(X)
        publish(store, model, {"net": net(1)})
        backend.fail["update"] = 1
        with pytest.raises(DeviceError):
            hook.refit()
        assert hook.sleep().slept == ("net",)
        assert hook.wake().version == 2
        assert int(engine.steps) == 1
        assert torch.equal(engine(X), net(1)(X))


def test_a_failed_wake_stays_asleep_holds_nothing_and_can_be_retried(store: Store, model: str) -> None:
    backend = Faulty()
    engine = net()
    with EngineHook.attach(store, model, {"net": engine}, backend=backend) as hook:
        engine(X)
        hook.sleep()
        for seed in (1, 2):
            backend.fail["wake"] = 1
            with pytest.raises(DeviceMemoryError):
                hook.wake()
            assert hook.state is State.ASLEEP
            with pytest.raises(EngineAsleep):
                engine(X)
            publish(store, model, {"net": net(seed)})  # parked again: takes this at once
            assert hook.version == seed + 1
        assert [v.number for m in store.status().models if m.name == model for v in m.versions] == [3]
        assert hook.wake().version == 3
        assert int(engine.steps) == 1
        assert torch.equal(engine(X), net(2)(X))


def test_state_that_cannot_be_restored_fails_the_wake_whole(
    store: Store, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine_hooks.state import EngineState

    engine = net()
    backend = Faulty()
    with EngineHook.attach(store, model, {"net": engine}, backend=backend) as hook:
        engine(X)
        hook.sleep()

        def fail(self: EngineState, image: torch.Tensor) -> int:
            raise RuntimeError("out of memory")

        with monkeypatch.context() as patch:
            patch.setattr(EngineState, "restore", fail)
            with pytest.raises(RuntimeError):
                hook.wake()
        assert hook.state is State.ASLEEP
        assert not any(image.mapped for image in backend._images)
        hook.wake()
        assert int(engine.steps) == 1


def test_state_that_cannot_be_saved_keeps_everything_awake(
    store: Store, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine_hooks.state import EngineState

    modules = {"a": net(0), "b": net(1)}
    with EngineHook.attach(store, model, modules) as hook:
        saved = []
        save = EngineState.save

        def fail_second(self: EngineState, image: torch.Tensor) -> int:
            if saved:
                raise RuntimeError("out of memory")
            saved.append(save(self, image))
            return saved[0]

        with monkeypatch.context() as patch:
            patch.setattr(EngineState, "save", fail_second)
            with pytest.raises(RuntimeError):
                hook.sleep()
        assert hook.state is State.AWAKE
        modules["a"](X)  # later than what was saved of it
        hook.sleep()
        hook.wake()
        assert int(modules["a"].steps) == 1


def test_an_unmap_that_fails_half_way_leaves_what_is_true(store: Store, model: str) -> None:
    backend = Faulty()
    modules = {"a": net(0), "b": net(1)}
    with EngineHook.attach(store, model, modules, backend=backend) as hook:
        modules["b"](X)
        backend.fail["unmap"] = 1
        with pytest.raises(DeviceError):
            hook.sleep()
        assert hook.states == {"a": State.ASLEEP, "b": State.BROKEN}
        hook.wake()
        assert hook.verify().ok
        assert int(modules["b"].steps) == 1
        assert torch.equal(modules["b"](X), net(1)(X))


def test_forwards_are_refused_before_the_memory_goes(store: Store, model: str) -> None:
    class Watching(Faulty):
        def unmap(self, images: Sequence[Image]) -> None:
            if not refused:  # closing unmaps as well, when the modules have left
                with pytest.raises(EngineAsleep):
                    engine(X)
                refused.append(len(images))
            super().unmap(images)

    engine, refused = net(), []
    with EngineHook.attach(store, model, {"net": engine}, backend=Watching()) as hook:
        hook.sleep()
        assert refused == [1]
        hook.wake()
        engine(X)


def test_no_generation_begins_before_the_callbacks_are_done(store: Store, model: str) -> None:
    entered = threading.Event()

    def generate() -> None:
        with hook.running():
            entered.set()

    with EngineHook.attach(store, model, {"net": net()}) as hook:
        hook.sleep()

        @hook.after_refit
        def slow(changed: tuple[str, ...]) -> None:
            assert hook.state is State.AWAKE
            thread.start()
            assert not entered.wait(0.05)  # held back: only the end of this callback can let it in

        thread = threading.Thread(target=generate, daemon=True)
        hook.wake()
        assert entered.wait(PATIENCE)
        thread.join(PATIENCE)


def test_verify_names_the_differing_tensor(store: Store, model: str) -> None:
    modules = tiny_models.build("transformer")
    with EngineHook.attach(store, model, modules) as hook:
        name, parameter = list(modules["transformer"].named_parameters())[7]
        parameter.data.view(-1)[-1] += 1
        report = hook.verify()
        assert report.differing == (f"transformer.{name}",)
        assert not report.ok
        assert report.compared_bytes >= sum(p.numel() * 4 for p in modules["transformer"].parameters())
        hook.sleep()
        hook.wake()
        assert hook.verify().ok


def test_weights_replaced_behind_the_hooks_back_are_not_left_stale(store: Store, model: str) -> None:
    engine = net()
    with EngineHook.attach(store, model, {"net": engine}) as hook:
        engine.first.weight = nn.Parameter(torch.zeros(32, 32))
        assert hook.verify().moved == ("net.first.weight",)
        publish(store, model, {"net": net(1)})
        with pytest.raises(AttachError, match=r"net\.first\.weight"):
            hook.refit()
        with pytest.raises(AttachError, match="close the hook and attach again"):
            hook.sleep()
        assert hook.state is State.AWAKE  # and not asleep with no way back
        engine(X)


def test_a_refused_refit_past_a_version_that_did_not_fit_changes_no_version(store: Store, model: str) -> None:
    engine = net()
    with EngineHook.attach(store, model, {"net": engine}) as hook:
        with store.refit(model, extend=True, partial=True) as refit:
            refit.put("net.extra", torch.ones(3))
        with pytest.raises(AttachError, match=r"net\.extra is new"):
            hook.refit()
        publish(store, model, {"net": net(1)}, fresh=True)
        kept, engine.first.weight = engine.first.weight, nn.Parameter(torch.zeros(32, 32))
        for _ in range(2):
            with pytest.raises(AttachError, match=r"net\.first\.weight"):
                hook.refit()
            assert hook.version == 1
            assert torch.equal(engine.second.weight, net().second.weight)
        engine.first.weight = kept
        assert hook.refit().version == 3
        assert torch.equal(engine(X), net(1)(X)) and hook.verify().ok


def test_weights_replaced_while_asleep_fail_the_wake(store: Store, model: str) -> None:
    engine = net()
    with EngineHook.attach(store, model, {"net": engine}) as hook:
        hook.sleep()
        kept, engine.first.weight = engine.first.weight, nn.Parameter(torch.zeros(32, 32))
        with pytest.raises(AttachError, match=r"net\.first\.weight"):
            hook.wake()
        assert hook.state is State.ASLEEP
        engine.first.weight = kept
        hook.wake()
        assert torch.equal(engine(X), net()(X))


def test_weights_that_only_changed_their_memory_order_come_back(store: Store, model: str) -> None:
    """As engines do that turn a decoder to channels_last at its first use."""
    torch.manual_seed(0)
    engine = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 3))
    expected, x = copy.deepcopy(engine), torch.randn(1, 8, 9, 9)
    with EngineHook.attach(store, model, {"vae": engine}) as hook:
        addresses = [parameter.data_ptr() for parameter in engine.parameters()]
        for _ in range(2):
            engine.to(memory_format=torch.channels_last)
            assert set(hook.verify().moved) == {"vae.0.weight", "vae.1.weight"}
            hook.sleep()
            hook.wake()
            assert [parameter.data_ptr() for parameter in engine.parameters()] == addresses
            assert torch.equal(engine(x), expected(x))
        engine.to(memory_format=torch.channels_last)
        with store.refit(model, partial=True) as refit:
            refit.put("vae.0.weight", expected[0].weight * 2)
        hook.refit()
        assert torch.equal(engine[0].weight, expected[0].weight * 2) and hook.verify().ok
        engine.to(memory_format=torch.channels_last)
        with torch.no_grad():
            engine[1].weight.mul_(2)
        with pytest.raises(AttachError, match=r"changed after attach.*vae\.1\.weight"):
            hook.sleep()
