"""The hook against a real store service, with real modules: what an engine sees."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import tiny_models
import torch
from hooked import PATIENCE, X, addresses, fresh_model, leases, net, publish, scaled
from torch._dynamo.testing import CompileCounter

import weightstore
from engine_hooks import EngineHook, State
from weightstore.client import Store
from weightstore.errors import (
    AttachError,
    EngineAsleep,
    EngineBusy,
    TagTorn,
    UsageError,
)


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with weightstore.local_store(capacity="256MiB", window="16MiB") as store:
        yield store


@pytest.fixture
def model() -> str:
    return fresh_model()


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
