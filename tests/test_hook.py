"""The hook against a real store service, with real modules: what an engine sees."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import tiny_models
import torch
from hooked import Faulty, addresses, fresh_model, publish, scaled
from processes import Service, eventually
from torch import nn
from torch._dynamo.testing import CompileCounter

import weightstore
from engine_hooks import EngineHook, State
from engine_hooks.backend import Image, Meanwhile, Run
from engine_hooks.host import HostBackend
from weightstore.client import Store
from weightstore.errors import (
    AttachError,
    DependencyMissing,
    DeviceError,
    DeviceMemoryError,
    EngineAsleep,
    EngineBroken,
    EngineBusy,
    LeaseLost,
    TagTorn,
    UsageError,
)
from weightstore.mapping import ArenaMapping

PATIENCE = 20.0


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with weightstore.local_store(capacity="256MiB", window="16MiB") as store:
        yield store


@pytest.fixture
def model() -> str:
    return fresh_model()


class Net(nn.Module):
    """Two layers as weights, a step counter and a cache as engine state."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=False)
        self.cache = [torch.zeros(3, dtype=torch.complex64)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        return self.second(torch.relu(self.first(x)))


def net(seed: int = 0, width: int = 32) -> Net:
    torch.manual_seed(seed)
    return Net(width).eval().requires_grad_(False)


X = torch.linspace(-1, 1, 64).reshape(2, 32)


def leases(store: Store, model: str) -> list[int]:
    return [lease.version for lease in store.status().leases if lease.model == model]


# -- cycles --------------------------------------------------------------------------------------------


def test_twenty_cycles_of_real_models_bit_for_bit(store: Store, model: str) -> None:
    modules = tiny_models.build("transformer", "vae", "text_encoder", "qwen")
    expected = tiny_models.outputs(modules)
    strides = {n: t.stride() for n, t in modules["vae"].state_dict().items()}
    with EngineHook.attach(store, model, modules) as hook:
        assert hook.attached.published
        assert hook.attached.restrided == ()
        where = addresses(modules)
        freqs = modules["qwen"].pos_embed.pos_freqs
        for _ in range(20):
            assert hook.sleep().slept == tuple(modules)
            assert hook.state is State.ASLEEP
            report = hook.wake()
            assert report.copied_bytes == hook.attached.copied_bytes
            assert addresses(modules) == where
        assert hook.verify().ok
        for name, output in tiny_models.outputs(modules).items():
            assert torch.equal(output, expected[name]), name
        encoder = modules["text_encoder"]
        assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
        assert {n: t.stride() for n, t in modules["vae"].state_dict().items()} == strides
        assert modules["qwen"].pos_embed.pos_freqs is freqs


def test_a_second_engine_fills_empty_modules_from_the_arena(store: Store, model: str) -> None:
    modules = tiny_models.build("transformer", "text_encoder")
    publish(store, model, modules)
    with torch.device("meta"):
        empty = {name: tiny_models.BUILDERS[name]().eval() for name in modules}
    with EngineHook.attach(store, model, empty) as hook:
        assert not hook.attached.published
        for name, output in tiny_models.outputs(empty).items():
            assert torch.equal(output, tiny_models.RUNNERS[name](modules[name])), name
        assert not any(t.device.type == "meta" for m in empty.values() for t in m.parameters())


def test_engine_state_survives_sleep_and_is_nobody_elses(store: Store, model: str) -> None:
    engine = net()
    with EngineHook.attach(store, model, {"net": engine}) as hook:
        assert hook.attached.state_bytes > 0
        for cycle in range(3):
            engine(X)
            engine.cache[0].add_(1 + 2j)
            assert hook.sleep().saved_bytes == hook.attached.state_bytes
            assert hook.wake().restored_bytes == hook.attached.state_bytes
            assert int(engine.steps) == cycle + 1
            assert engine.cache[0].tolist() == [(1 + 2j) * (cycle + 1)] * 3
        publish(store, model, {"net": net(1)})
        hook.refit()
        assert int(engine.steps) == 3


def test_sleeping_really_lowers_the_resident_set(store: Store, model: str) -> None:
    engine = net(width=2048)  # 32 MiB
    nbytes = sum(p.numel() * 4 for p in engine.parameters())
    with EngineHook.attach(store, model, {"net": engine}) as hook:
        slept, woken = [], []
        for _ in range(3):
            slept.append(hook.sleep())
            woken.append(hook.wake())
        assert all(report.image_bytes >= nbytes for report in slept)
        # A kernel that is short of memory takes pages of libraries away meanwhile, which are counted, too.
        freed = sorted(report.freed_bytes for report in slept)
        assert 0.99 * nbytes < freed[-1] and freed[0] < 1.05 * nbytes
        assert max(report.mapped_bytes for report in woken) > 0.99 * nbytes


def test_sleep_and_wake_are_idempotent(store: Store, model: str) -> None:
    with EngineHook.attach(store, model, {"net": net()}) as hook:
        assert (hook.wake().woken, hook.wake().already) == ((), ("net",))
        assert hook.sleep().slept == ("net",)
        again = hook.sleep()
        assert (again.slept, again.already, again.freed_bytes) == ((), ("net",), 0)
        assert hook.wake().woken == ("net",)


# -- refits --------------------------------------------------------------------------------------------


def test_a_refit_copies_what_changed_into_an_awake_engine(store: Store, model: str) -> None:
    engine, trainer = net(), net()
    told: list[tuple[str, ...]] = []
    with EngineHook.attach(store, model, {"net": engine}) as hook:
        hook.after_refit(told.append)
        where = addresses({"net": engine})
        versions = {n: p._version for n, p in engine.named_parameters()}
        with store.refit(model, partial=True) as refit:
            refit.put_many(scaled(trainer, 2.0, "net", only="second.weight"))
        report = hook.refit()
        assert (report.previous, report.version, hook.version) == (1, 2, 2)
        assert report.changed == ("net.second.weight",)
        assert report.copied_bytes == 32 * 32 * 4
        assert told == [("net.second.weight",)]
        assert addresses({"net": engine}) == where
        assert hook.verify().ok
        assert torch.equal(engine.second.weight, trainer.second.weight * 2)
        assert torch.equal(engine.first.weight, trainer.first.weight)
        risen = {n for n, p in engine.named_parameters() if p._version > versions[n]}
        assert risen == {"second.weight"}
        assert leases(store, model) == [2]
        assert hook.refit().changed == ()
        assert len(told) == 1


def test_a_sleep_that_was_interrupted_is_finished_by_the_next(
    store: Store, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the store would keep the version for an engine that reads nothing."""
    with EngineHook.attach(store, model, {"net": net()}) as hook:
        monkeypatch.setattr(hook._following, "park", interrupt)
        with pytest.raises(KeyboardInterrupt):
            hook.sleep()
        monkeypatch.undo()
        assert hook.state is State.ASLEEP and not hook._following.parked
        assert hook.sleep().already == ("net",)
        (lease,) = [lease for lease in store.status().leases if lease.model == model]
        assert lease.parked
        publish(store, model, {"net": net(1)})
        assert leases(store, model) == [2]
        assert hook.wake().version == 2


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_sleeping_engine_wakes_on_the_newest_version(store: Store, model: str) -> None:
    engine = net()
    told: list[tuple[str, ...]] = []
    with EngineHook.attach(store, model, {"net": engine}) as hook:
        hook.after_refit(told.append)
        hook.sleep()
        for seed in (1, 2, 3):
            publish(store, model, {"net": net(seed)})
        report = hook.refit()
        assert (report.asleep, report.version, report.copied_bytes) == (True, 4, 0)
        assert hook.version == 4
        assert leases(store, model) == [4]
        woken = hook.wake()
        assert woken.version == 4
        assert set(woken.changed) == {f"net.{n}" for n in engine.state_dict()}
        assert torch.equal(engine(X), net(3)(X))
        hook.sleep()
        assert hook.wake().changed == ()  # same bytes again
        assert [len(names) for names in told] == [4, 0]


def test_a_version_that_was_committed_is_never_missed(
    store: Store, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, model, {"net": net()})
    asked = threading.Event()
    with (
        weightstore.connect(store.socket) as engine_store,
        # Told before the hook's lease, on the same thread: the hook's offer is on its way, and stays there.
        engine_store.lease(model, follow=True, on_offer=lambda _: asked.wait(PATIENCE)),
        EngineHook.attach(engine_store, model, {"net": net()}) as hook,
    ):
        wait_for = engine_store.wait_for

        def ask(*args: object, **how: object) -> int:
            asked.set()
            return wait_for(*args, **how)  # type: ignore[arg-type]

        monkeypatch.setattr(engine_store, "wait_for", ask)
        assert publish(store, model, {"net": net(1)}) == 2
        assert hook.refit().version == 2


def test_versions_never_mix(store: Store, model: str) -> None:
    modules = {"a": net(0), "b": net(1)}
    with EngineHook.attach(store, model, modules) as hook:
        hook.sleep(tags=["b"])
        publish(store, model, {"a": net(2), "b": net(3)})
        assert hook.wake(tags=["b"]).version == 1  # as `a` still holds
        assert torch.equal(modules["b"](X), net(1)(X))
        assert hook.refit().version == 2
        assert torch.equal(modules["a"](X), net(2)(X))
        assert torch.equal(modules["b"](X), net(3)(X))
        assert hook.verify().ok


def test_components_sleep_apart_and_learn_what_they_missed(store: Store, model: str) -> None:
    modules = {"a": net(0), "b": net(1)}
    with EngineHook.attach(store, model, modules) as hook:
        hook.sleep(tags=["b"])
        assert hook.states == {"a": State.AWAKE, "b": State.ASLEEP}
        assert hook.state is State.AWAKE
        modules["a"](X)
        with pytest.raises(EngineAsleep, match="'b'"):
            modules["b"](X)
        for seed, what in ((2, "first.bias"), (3, "second.bias")):
            with store.refit(model, components=["b"], partial=True) as refit:
                refit.put_many(scaled(net(seed), 1.0, "b", only=what))
            report = hook.refit()
            assert (report.changed, report.copied_bytes) == ((), 0)
        assert hook.verify().skipped == ("b",)
        report = hook.wake(tags="b")
        assert (report.woken, report.version) == (("b",), 3)
        assert report.changed == ("b.first.bias", "b.second.bias")
        assert torch.equal(modules["b"].second.bias, net(3).second.bias)
        hook.sleep(tags=["weights"])
        assert hook.state is State.ASLEEP
        assert hook.wake(tags=["a"]).woken == ("a",)
        assert hook.wake().woken == ("b",)
        assert hook.verify().ok


def test_unknown_tags_are_refused(store: Store, model: str) -> None:
    with EngineHook.attach(store, model, {"net": net()}) as hook:
        for method in (hook.sleep, hook.wake):
            with pytest.raises(UsageError, match="no component vae; attached are net"):
                method(tags=["vae"])


def test_a_hook_says_what_it_is_bound_to(store: Store, model: str) -> None:
    modules = {"net": net(), "other": net(1)}
    with EngineHook.attach(store, model, modules, tag="policy") as hook:
        assert (hook.store, hook.model, hook.tag, hook.modules) == (store, model, "policy", modules)


def test_two_tags_share_frozen_components(store: Store, model: str) -> None:
    frozen = net(9, width=512)
    publish(store, model, {"dit": net(0), "te": frozen}, tag="policy")
    store.tag(model, "ref", "policy")
    used = store.status().arena.used
    with store.refit(model, tag="policy", components=["dit"]) as refit:
        refit.put_module(net(1), prefix="dit.")
    assert store.status().arena.used - used < 64 << 10
    engines = {tag: {"dit": net(5), "te": net(6, width=512)} for tag in ("policy", "ref")}
    with (
        EngineHook.attach(store, model, engines["policy"], tag="policy"),
        EngineHook.attach(store, model, engines["ref"], tag="ref"),
    ):
        assert torch.equal(engines["policy"]["dit"](X), net(1)(X))
        assert torch.equal(engines["ref"]["dit"](X), net(0)(X))
        for engine in engines.values():
            assert torch.equal(engine["te"].first.weight, frozen.first.weight)


def test_a_version_with_other_tensors_is_refused_and_the_old_one_stays(store: Store, model: str) -> None:
    engine = net()
    with EngineHook.attach(store, model, {"net": engine}) as hook:
        with store.refit(model, fresh=True) as refit:
            refit.put_many({f"net.{n}": t for n, t in net(1).state_dict().items() if n != "first.bias"})
            refit.put("net.gate", torch.ones(3))
        for _ in range(2):
            with pytest.raises(
                AttachError, match=r"net\.gate is new in it; net\.first\.bias is missing"
            ) as caught:
                hook.refit()
        assert "version 2" in caught.value.message
        assert hook.version == 1
        assert torch.equal(engine(X), net()(X))
        with pytest.raises(AttachError, match="version 2"):
            hook.verify()  # there is nothing any more to compare with
        # The next one fits again. Places of version 1 may have been reused meanwhile: all is copied.
        publish(store, model, {"net": net(2)}, fresh=True)
        report = hook.refit()
        assert len(report.changed) == 4
        assert hook.verify().ok
        assert torch.equal(engine(X), net(2)(X))


def test_a_misfit_meets_a_sleeping_engine_at_wake_and_it_stays_asleep(store: Store, model: str) -> None:
    engine = net()
    with EngineHook.attach(store, model, {"net": engine}) as hook:
        hook.sleep()
        with store.refit(model, extend=True, partial=True) as refit:
            refit.put("net.extra", torch.ones(3))
        with pytest.raises(AttachError, match=r"net\.extra is new"):
            hook.wake()
        assert hook.state is State.ASLEEP
        publish(store, model, {"net": net(4)}, fresh=True)
        assert hook.wake().version == 3
        assert torch.equal(engine(X), net(4)(X))


def test_a_torn_tag_wakes_nobody_until_its_commit(store: Store, model: str) -> None:
    engine = net()
    with EngineHook.attach(store, model, {"net": engine}) as hook:
        hook.sleep()
        with store.refit(model, in_place=True) as refit:
            refit.put_module(net(1), prefix="net.")
            for method in (hook.wake, hook.refit):
                with pytest.raises(TagTorn):
                    method()
            assert hook.state is State.ASLEEP
        assert hook.wake().version == 2
        assert torch.equal(engine(X), net(1)(X))
        assert hook.verify().ok


def test_many_in_place_rounds(store: Store, model: str) -> None:
    engine = net()
    with EngineHook.attach(store, model, {"net": engine}) as hook:
        for seed in range(1, 6):
            hook.sleep()
            publish(store, model, {"net": net(seed)}, in_place=True)
            assert len(hook.wake().changed) == 4  # although no place in the arena changed
            assert torch.equal(engine(X), net(seed)(X))


# -- generations ---------------------------------------------------------------------------------------


def test_forwards_and_generations_while_asleep(store: Store, model: str) -> None:
    engine = net()
    with EngineHook.attach(store, model, {"net": engine}) as hook:
        hook.sleep()
        with pytest.raises(EngineAsleep, match="wake"):
            engine(X)
        with pytest.raises(EngineAsleep), hook.running():
            raise AssertionError("let in")
        with pytest.raises(EngineAsleep):
            hook.verify()
        hook.wake()
        with hook.running() as version:
            assert version == 1
            engine(X)


def test_running_can_name_what_it_needs(store: Store, model: str) -> None:
    with EngineHook.attach(store, model, {"a": net(0), "b": net(1)}) as hook:
        hook.sleep(tags=["b"])
        with hook.running(), hook.running(tags=["a"]):
            pass
        with pytest.raises(EngineAsleep, match="'b'"), hook.running(tags=["a", "b"]):
            raise AssertionError("let in")


@pytest.mark.parametrize("operation", ["sleep", "refit", "close"])
def test_generations_in_flight_are_waited_for(store: Store, model: str, operation: str) -> None:
    engine = net()
    hook = EngineHook.attach(store, model, {"net": engine})
    publish(store, model, {"net": net(1)})
    inside, leave, outputs = threading.Event(), threading.Event(), []

    def generate() -> None:
        with hook.running():
            inside.set()
            assert leave.wait(PATIENCE)
            outputs.append(engine(X))

    generation = threading.Thread(target=generate, daemon=True)
    generation.start()
    assert inside.wait(PATIENCE)
    with pytest.raises(EngineBusy, match="1 generations"):
        getattr(hook, operation)(drain_timeout=0)
    assert hook.state is State.AWAKE
    assert hook.version == 1
    done = threading.Thread(target=getattr(hook, operation), daemon=True)
    done.start()
    leave.set()
    for thread in (generation, done):
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert torch.equal(outputs[0], net()(X))
    hook.close()


def test_no_operation_from_inside_a_generation_or_a_callback(store: Store, model: str) -> None:
    with EngineHook.attach(store, model, {"net": net()}) as hook:
        with hook.running(), pytest.raises(EngineBusy, match="same thread"):
            hook.sleep()
        errors = []

        @hook.after_refit
        def nested(changed: tuple[str, ...]) -> None:
            with hook.running():
                pass
            for method in (hook.sleep, hook.wake, hook.refit, hook.verify, hook.close):
                with pytest.raises(UsageError, match="callback") as caught:
                    method()
                errors.append(caught.value)

        hook.sleep()
        hook.wake()
        assert len(errors) == 5


def test_a_failing_callback_keeps_nobody_else_in_the_dark(store: Store, model: str) -> None:
    engine = net()
    with EngineHook.attach(store, model, {"net": engine}) as hook:
        told = []

        @hook.after_refit
        def bad(changed: tuple[str, ...]) -> None:
            raise ZeroDivisionError("the engine's own")

        hook.after_refit(told.append)
        publish(store, model, {"net": net(1)})
        with pytest.raises(ZeroDivisionError):
            hook.refit()
        assert len(told) == 1
        assert hook.state is State.AWAKE
        assert torch.equal(engine(X), net(1)(X))


def test_inference_mode_and_compiled_code_go_on(store: Store, model: str) -> None:
    engine = net()
    engine.steps = None  # a counter would be a graph of its own
    engine.forward = lambda x: engine.second(torch.relu(engine.first(x)))
    counter = CompileCounter()
    with EngineHook.attach(store, model, {"net": engine}) as hook:
        compiled = torch.compile(engine, backend=counter, fullgraph=True)
        with torch.no_grad():
            assert torch.equal(compiled(X), engine(X))
        frames = counter.frame_count
        for seed in (1, 2):
            publish(store, model, {"net": net(seed)})
            hook.refit()
            hook.sleep()
            with torch.inference_mode():
                hook.wake()
                assert torch.equal(engine(X), net(seed)(X))
            with torch.no_grad():
                assert torch.equal(compiled(X), net(seed)(X))
        assert counter.frame_count == frames


# -- when something fails ------------------------------------------------------------------------------


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


# -- attaching and closing -----------------------------------------------------------------------------


@pytest.mark.parametrize("why", ["misfit", "wake fails", "tensor refuses", "no such tag"])
def test_a_failed_attach_leaves_everything_as_it_was(store: Store, model: str, why: str) -> None:
    publish(store, model, {"net": net(), "other": net()})
    engine, other = net(1), net(2)
    backend = Faulty()
    error: type[Exception] = AttachError
    tag = "latest"
    keep = None
    if why == "misfit":
        engine.third = nn.Linear(2, 2)
    elif why == "wake fails":
        backend.fail["wake"] = 1
        error = DeviceMemoryError
    elif why == "tensor refuses":
        import weakref

        engine.second.to("meta")
        keep = weakref.ref(engine.second.bias)
    else:
        tag, error = "absent", UsageError

    def facts() -> list[tuple[object, ...]]:
        tensors = [*engine.state_dict(keep_vars=True).values(), *other.state_dict(keep_vars=True).values()]
        return [(id(t), t.data_ptr(), t.device, t._version) for t in tensors]

    before = facts()
    with pytest.raises(error):
        EngineHook.attach(store, model, {"other": other, "net": engine}, tag=tag, backend=backend)
    assert facts() == before
    assert torch.equal(other(X), net(2)(X))
    assert not engine._forward_pre_hooks
    assert leases(store, model) == []
    assert backend._closed
    assert keep is None or keep() is not None


def test_closing_gives_weights_up_and_attaching_again_brings_them_back(store: Store, model: str) -> None:
    engine = net()
    expected = engine(X)
    hook = EngineHook.attach(store, model, {"net": engine})
    hook.close()
    hook.close()
    assert all(p.device.type == "meta" for p in engine.parameters())
    assert int(engine.steps) == 1
    assert leases(store, model) == []
    for method in (hook.sleep, hook.wake, hook.refit, hook.verify):
        with pytest.raises(UsageError, match="closed"):
            method()
    with pytest.raises(UsageError, match="closed"), hook.running():
        raise AssertionError("let in")
    with EngineHook.attach(store, model, {"net": engine}):
        assert torch.equal(engine(X), expected)
        assert int(engine.steps) == 2


def test_a_module_has_one_hook(store: Store, model: str) -> None:
    """A second one would take the weights away under the first, and could publish those that sleep."""
    engine = net()
    expected = engine(X)
    hook = EngineHook.attach(store, model, {"net": engine})
    hook.sleep()
    for modules in ({"net": engine}, {"other": net(), "again": torch.compile(engine, backend="eager")}):
        with pytest.raises(AttachError, match="close\\(\\) it and attach then") as caught:
            EngineHook.attach(store, f"{model}-other", modules)
        assert caught.value.details["components"] == list(modules)[-1:]
    assert f"{model}-other" not in store.models()
    hook.wake()
    assert torch.equal(engine(X), expected)
    hook.close()


def test_closing_can_keep_the_weights(store: Store, model: str) -> None:
    modules = tiny_models.build("text_encoder")
    expected = tiny_models.outputs(modules)["text_encoder"]
    hook = EngineHook.attach(store, model, modules)
    hook.sleep()
    with pytest.raises(EngineAsleep, match="keeping"):
        hook.close(keep=True)
    hook.wake()
    hook.close(keep=True)
    encoder = modules["text_encoder"]
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
    assert torch.equal(tiny_models.run_t5(encoder), expected)


def test_a_sleeping_engine_can_be_closed(store: Store, model: str) -> None:
    engine = net()
    engine(X)
    hook = EngineHook.attach(store, model, {"net": engine})
    hook.sleep()
    hook.close()
    assert int(engine.steps) == 1
    assert engine.first.weight.device.type == "meta"


def test_ignored_names_stay_in_the_store(store: Store, model: str) -> None:
    publish(store, model, {"net": net()})
    with store.refit(model, extend=True, partial=True) as refit:
        refit.put("net.lora_A", torch.ones(3))
    engine = net(1)
    with EngineHook.attach(store, model, {"net": engine}, ignore=["*.lora_?"]) as hook:
        with store.refit(model, partial=True) as refit:
            refit.put("net.lora_A", torch.zeros(3))
        assert hook.refit().changed == ()
        hook.sleep()
        hook.wake()
        assert torch.equal(engine(X), net()(X))


def test_one_publishes_and_the_others_wait(store: Store, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine_hooks.attach._RETRY_SECONDS", 0.05)
    waiting = threading.Event()
    wait_for = store.wait_for

    def noted(*args: object, **how: object) -> int:
        waiting.set()
        return wait_for(*args, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "wait_for", noted)
    hooks: list[EngineHook] = []
    engine = net(5)
    attaching = threading.Thread(
        target=lambda: hooks.append(EngineHook.attach(store, model, {"net": engine})), daemon=True
    )
    with store.refit(model) as refit:
        attaching.start()
        assert waiting.wait(PATIENCE)
        refit.put_module(net(0), prefix="net.")
    attaching.join(PATIENCE)
    assert not hooks[0].attached.published
    assert torch.equal(engine(X), net(0)(X))
    hooks[0].close()


def test_a_model_with_almost_the_name_of_another_is_published_with_a_warning(
    store: Store, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"flux-of-{model}-dev"
    with caplog.at_level("WARNING", "engine_hooks"):
        EngineHook.attach(store, name, {"net": net()}).close()
        assert not any(name in line for line in caplog.messages)
        EngineHook.attach(store, f"{name}1", {"net": net()}).close()
    said = [line for line in caplog.messages if f"weightstore rm {name}1" in line]
    assert len(said) == 1 and f"did you mean '{name}'" in said[0]


def test_if_the_publisher_gives_up_another_takes_over(
    store: Store, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine_hooks.attach._RETRY_SECONDS", 0.05)
    refit = store.refit(model)
    with pytest.raises(weightstore.errors.StoreTimeout, match="publishing"):
        EngineHook.attach(store, model, {"net": net()}, publish_timeout=0)
    hooks: list[EngineHook] = []
    attaching = threading.Thread(
        target=lambda: hooks.append(EngineHook.attach(store, model, {"net": net(5)})), daemon=True
    )
    attaching.start()
    refit.abort("changed its mind")
    attaching.join(PATIENCE)
    assert hooks[0].attached.published
    hooks[0].close()


def test_a_model_published_in_the_last_moment_is_not_published_again(
    store: Store, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = store.lease
    asked = []

    def late(*args: object, **how: object) -> object:
        if not asked:
            asked.append(publish(store, model, {"net": net(0)}))
            raise weightstore.errors.UnknownModel("as it was when the store answered")
        return lease(*args, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "lease", late)
    engine = net(1)
    with EngineHook.attach(store, model, {"net": engine}) as hook:
        assert (hook.attached.published, hook.version) == (False, 1)
        assert torch.equal(engine(X), net(0)(X))


def test_what_cannot_be_attached(store: Store, model: str) -> None:
    for modules, error in (
        ({}, AttachError),
        ({"a.b": net()}, AttachError),
        ({"-": net()}, weightstore.errors.InvalidName),
        ({"net": torch.ones(1)}, AttachError),
        (net(), AttachError),
    ):
        with pytest.raises(error):
            EngineHook.attach(store, model, modules)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no backend for device 'meta'"):
        EngineHook.attach(store, model, {"net": net()}, device="meta")
    assert model not in store.models()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda", 1)])
def test_without_a_gpu_it_says_what_is_missing(
    store: Store, model: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(DependencyMissing, match=r"pip install 'weightstore\[cuda\]'"):
        EngineHook.attach(store, model, {"net": net()}, device=device)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", ModuleType("driver"))
    with pytest.raises(DeviceError, match="sees no GPU"):
        EngineHook.attach(store, model, {"net": net()}, device=device)
    assert model not in store.models()


def test_modules_are_left_as_flexible_as_they_were(store: Store, model: str) -> None:
    engine = net()
    engine.first.requires_grad_(True)
    engine.first.train()
    with EngineHook.attach(store, model, {"net": engine}) as hook:
        hook.sleep()
        hook.wake()
        assert engine.first.weight.requires_grad
        assert not engine.second.weight.requires_grad
        assert engine.first.training
        twin = copy.deepcopy(engine)
        assert twin.first.weight.data_ptr() != engine.first.weight.data_ptr()
        engine(X).sum().backward()
        assert engine.first.weight.grad is not None


def test_a_store_that_comes_back_with_another_version_in_mid_copy_leaves_an_engine_that_wakes(
    tmp_path: Path,
) -> None:
    class Interrupted(HostBackend):
        def update(
            self,
            fills: Sequence[tuple[Image, Sequence[Run]]],
            source: ArenaMapping,
            meanwhile: Meanwhile | None = None,
        ) -> None:
            super().update(fills, source)
            while interruptions:
                interruptions.pop()()
            if meanwhile is not None:
                meanwhile()

    engine = net()
    with (
        Service(tmp_path) as service,
        service.connect() as store,
        service.connect() as trainer,
        EngineHook.attach(store, "m", {"net": engine, "other": net(9)}, backend=Interrupted()) as hook,
    ):

        def restart() -> None:
            service.kill()
            with store.link._connecting:  # others are back before the engine is
                service.start()
                publish(trainer, "m", {"net": net(2)}, components=["net"])
            eventually(
                lambda: [lease.offered for lease in store.status().leases] == [3], "version 3 is offered"
            )
            assert store.wait_for("m", timeout=0) == 3  # the offer was sent before this answer

        interruptions = [restart]
        publish(trainer, "m", {"net": net(1)}, components=["net"])
        with pytest.raises(LeaseLost, match="was away while version 2"):
            hook.refit()
        assert hook.states == {"net": State.BROKEN, "other": State.AWAKE} and hook.version == 1
        assert hook.wake().version == 1
        assert hook.verify().ok and torch.equal(engine(X), net()(X))
        assert hook.refit().version == 3
        assert hook.verify().ok and torch.equal(engine(X), net(2)(X))


def test_a_refit_without_the_store_says_that_it_does_not_know(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Service(tmp_path) as service, service.connect() as store:
        with EngineHook.attach(store, "m", {"net": net()}) as hook:
            assert hook.refit().version == 1 and not caplog.records
            service.kill()
            with caplog.at_level("WARNING", "engine_hooks"):
                assert hook.refit().version == 1
            assert "staying on version 1" in caplog.text
