"""Attaching modules to a version and letting go of them, against a real store service."""

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
from hooked import PATIENCE, Faulty, X, fresh_model, leases, net, publish
from processes import Service, eventually
from torch import nn

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
    LeaseLost,
    UsageError,
)
from weightstore.mapping import ArenaMapping


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with weightstore.local_store(capacity="256MiB", window="16MiB") as store:
        yield store


@pytest.fixture
def model() -> str:
    return fresh_model()


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
