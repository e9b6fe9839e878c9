"""A store that is connected and does not answer: stopped by a debugger, swapped out, overloaded.

It is stopped by SIGSTOP; clients are given little patience, so that nothing has to be waited for.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hooked import publish
from processes import Service, eventually
from torch import nn

import weightstore
from engine_hooks import EngineHook, State
from engine_hooks.hook import Components
from weightstore import wire
from weightstore.client import Store
from weightstore.errors import LeaseLost, StoreSilent

PATIENCE = 0.05


def model(value: float, device: str = "cpu") -> dict[str, nn.Module]:
    module = nn.Linear(64, 64, device=device)
    if device == "cpu":
        nn.init.constant_(module.weight, value)
        nn.init.constant_(module.bias, value)
    return {"transformer": module, "vae": nn.Linear(4, 4, device=device)}


def value_of(hook: EngineHook) -> float:
    (value,) = set(hook.modules["transformer"].weight.flatten().tolist())  # type: ignore[union-attr, operator]
    return float(value)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with Service(tmp_path) as service:
        yield service
        os.kill(service.pid, signal.SIGCONT)


@pytest.fixture
def store(service: Service) -> Iterator[Store]:
    """The engine's, with little patience."""
    with service.connect() as trainer:
        publish(trainer, "m", model(1.0))
    with weightstore.connect(service.socket) as store:
        store.link.patience = PATIENCE
        yield store


@pytest.fixture
def hook(store: Store) -> Iterator[EngineHook]:
    with EngineHook.attach(store, "m", model(0.0, "meta")) as hook:
        yield hook


def stop(service: Service) -> None:
    os.kill(service.pid, signal.SIGSTOP)


def go_on(service: Service, store: Store) -> None:
    """Have it answer what it was asked meanwhile."""
    os.kill(service.pid, signal.SIGCONT)
    store.status()


def test_an_engine_sleeps_and_wakes_without_an_answer(
    service: Service, store: Store, hook: EngineHook, caplog: pytest.LogCaptureFixture
) -> None:
    stop(service)
    hook.sleep()
    assert hook.wake().version == 1 and value_of(hook) == 1.0
    assert hook.refit().version == 1  # as far as anybody knows
    hook.sleep()
    assert hook.state is State.ASLEEP
    assert "did not answer ParkLease" in caplog.text and "stopped or overloaded" in caplog.text
    go_on(service, store)
    with service.connect() as trainer:
        publish(trainer, "m", model(2.0))
        # It sleeps as far as the store knows, too: the old version is let go of.
        eventually(lambda: [v.number for v in trainer.status().models[0].versions] == [2], "1 is freed")
    assert hook.wake().version == 2 and value_of(hook) == 2.0
    assert not hook.verify().differing


def test_a_sleeper_that_woke_alone_is_awake_once_the_store_goes_on(
    service: Service, store: Store, hook: EngineHook
) -> None:
    hook.sleep()
    stop(service)
    assert hook.wake().version == 1
    go_on(service, store)
    with service.connect() as trainer:
        publish(trainer, "m", model(2.0))
        assert [v.number for v in trainer.status().models[0].versions] == [1, 2]  # it reads version 1
        assert not hook.verify().differing and value_of(hook) == 1.0
        assert hook.refit().version == 2 and value_of(hook) == 2.0
        eventually(lambda: [v.number for v in trainer.status().models[0].versions] == [2], "1 is freed")


def test_a_refit_takes_what_was_offered_before_the_store_hung(
    service: Service, store: Store, hook: EngineHook
) -> None:
    with service.connect() as trainer:
        publish(trainer, "m", model(2.0))
    store.status()  # the offer has come
    stop(service)
    assert hook.refit().version == 2 and value_of(hook) == 2.0
    go_on(service, store)
    eventually(lambda: [lease.version for lease in store.status().leases] == [2], "the store has heard")
    assert not hook.verify().differing


def test_an_answer_that_moves_the_lease_during_the_copy_is_noticed(
    service: Service, store: Store, hook: EngineHook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease was unparked without the store, which had a newer version by then, and says so too late."""
    hook.sleep()
    stop(service)
    fill = Components.fill

    def late(*arguments: object) -> object:
        check = arguments[-1]
        assert callable(check)

        def answered() -> None:
            go_on(service, store)
            hook._following._lease._move(
                7, False, dict(hook._following._lease.records)
            )  # as its answer would
            check()

        monkeypatch.setattr(Components, "fill", fill)
        return fill(*arguments[:-1], answered)  # type: ignore[arg-type]

    monkeypatch.setattr(Components, "fill", late)
    with pytest.raises(LeaseLost, match=r"let go of version 1 while .* has version 7; call wake\(\) again"):
        hook.wake()
    assert hook.state is State.ASLEEP
    hook._following._lease._move(1, False, dict(hook._following._lease.records))
    assert hook.wake().version == 1 and value_of(hook) == 1.0


def test_requests_that_need_an_answer_say_that_there_was_none(service: Service, store: Store) -> None:
    stop(service)
    with pytest.raises(StoreSilent, match="stopped or overloaded") as caught:
        store.link.connect().request(wire.GetStatus(id=0), wire.Status, timeout=PATIENCE)
    assert caught.value.details["socket"] == service.socket


def test_releasing_does_not_hang(service: Service, store: Store) -> None:
    lease = store.lease("m")
    assert torch.is_tensor(lease.snapshot["vae.weight"])
    stop(service)
    lease.release()
    go_on(service, store)
    assert store.status().leases == []
