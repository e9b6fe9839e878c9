"""A store that is connected and does not answer: stopped by a debugger, swapped out, overloaded.

It is stopped by SIGSTOP; clients are given little patience, so that nothing has to be waited for. What must
hold: nothing waits for ever; nobody reads bytes that the store may have promised to others; and once it goes
on, it and its clients agree again.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fake_store import FakeArena, FakeStore
from hooked import publish
from processes import Service, eventually
from torch import nn

import weightstore
from engine_hooks import EngineHook, State
from weightstore import wire
from weightstore.client import Store
from weightstore.errors import StoreSilent, TagTorn

PATIENCE = 0.05


def model(value: float, device: str = "cpu") -> dict[str, nn.Module]:
    module = nn.Linear(64, 64, device=device)
    if device == "cpu":
        nn.init.constant_(module.weight, value)
        nn.init.constant_(module.bias, value)
    return {"transformer": module, "vae": nn.Linear(4, 4, device=device)}


def value_of(hook: EngineHook) -> float:
    """Of all of the transformer, which has the same everywhere."""
    parameters = hook.modules["transformer"].parameters()
    (value,) = {value for parameter in parameters for value in parameter.flatten().tolist()}
    return float(value)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with Service(tmp_path) as service:
        yield service
        if service.alive:
            os.kill(service.pid, signal.SIGCONT)


@pytest.fixture
def trainer(service: Service) -> Iterator[Store]:
    with service.connect() as store:
        publish(store, "m", model(1.0))
        yield store


@pytest.fixture
def store(service: Service, trainer: Store) -> Iterator[Store]:
    """The engine's, with little patience."""
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
    """Have it answer all that it was asked meanwhile."""
    os.kill(service.pid, signal.SIGCONT)
    store.link.patience = 30.0
    store.status()
    store.status()  # and what answers to its answers


def versions(store: Store) -> list[int]:
    return [version.number for version in store.status().models[0].versions]


def test_an_engine_sleeps_and_does_not_wake_on_what_nobody_vouches_for(
    service: Service, trainer: Store, store: Store, hook: EngineHook, caplog: pytest.LogCaptureFixture
) -> None:
    stop(service)
    hook.sleep()
    assert hook.state is State.ASLEEP and "the lease could not be parked" in caplog.text
    for _ in range(2):
        with pytest.raises(
            StoreSilent, match=r"did not answer ParkLease within .*; it is stopped or overload"
        ):
            hook.wake()
        assert hook.state is State.ASLEEP
    go_on(service, store)
    publish(trainer, "m", model(2.0))
    # It sleeps as far as the store knows, too: the old version is let go of.
    eventually(lambda: versions(trainer) == [2], "1 is freed")
    assert hook.wake().version == 2 and value_of(hook) == 2.0
    assert not hook.verify().differing
    publish(trainer, "m", model(3.0))
    assert versions(trainer) == [2, 3]  # and now it reads 2
    assert hook.refit().version == 3 and value_of(hook) == 3.0


@pytest.mark.parametrize("tries", [1, 3])
def test_a_wake_that_was_given_up_leaves_a_sleeper(
    service: Service, trainer: Store, store: Store, hook: EngineHook, tries: int
) -> None:
    hook.sleep()
    stop(service)
    for _ in range(tries):
        with pytest.raises(StoreSilent):
            hook.wake(["vae"])
    go_on(service, store)
    with trainer.refit("m", in_place=True) as refit:  # let in, since it sleeps
        for name, module in model(2.0).items():
            refit.put_module(module, prefix=f"{name}.")
    assert hook.wake().version == 2 and value_of(hook) == 2.0
    assert not hook.verify().differing


def test_components_that_are_awake_stay_of_one_version(
    service: Service, trainer: Store, store: Store, hook: EngineHook
) -> None:
    stop(service)
    hook.sleep()
    with pytest.raises(StoreSilent):
        hook.wake(["vae"])
    go_on(service, store)
    assert hook.wake(["vae"]).version == 1
    publish(trainer, "m", model(2.0))
    assert hook.wake(["transformer"]).version == 1 and value_of(hook) == 1.0
    assert not hook.verify().differing
    assert hook.refit().version == 2 and value_of(hook) == 2.0


def test_an_in_place_refit_of_a_sleeper_is_not_read_half_way(
    service: Service, trainer: Store, store: Store, hook: EngineHook
) -> None:
    hook.sleep()
    with trainer.refit("m", in_place=True) as refit:
        refit.put("transformer.weight", torch.full((64, 64), 2.0))
        stop(service)
        with pytest.raises(StoreSilent):
            hook.wake()
        go_on(service, store)
        with pytest.raises(TagTorn):
            hook.wake()
        refit.put_module(model(2.0)["vae"], prefix="vae.")
        refit.put("transformer.bias", torch.full((64,), 2.0))
    assert hook.wake().version == 2 and value_of(hook) == 2.0


def test_a_store_that_hung_and_was_killed_is_done_without(
    service: Service, trainer: Store, store: Store, hook: EngineHook
) -> None:
    stop(service)
    hook.sleep()
    service.kill()
    assert hook.wake().version == 1 and value_of(hook) == 1.0
    hook.sleep()
    service.start()
    eventually(lambda: len(trainer.status().leases) == 1, "its lease is renewed")
    publish(trainer, "m", model(2.0))
    assert hook.wake().version == 2 and value_of(hook) == 2.0


def test_a_refit_takes_what_was_offered_before_the_store_hung(
    service: Service, trainer: Store, store: Store, hook: EngineHook
) -> None:
    publish(trainer, "m", model(2.0))
    store.status()  # the offer has come
    stop(service)
    assert hook.refit().version == 2 and value_of(hook) == 2.0
    assert hook.refit().version == 2  # as far as anybody knows
    go_on(service, store)
    assert [lease.version for lease in store.status().leases] == [2]
    assert not hook.verify().differing


def test_a_lease_is_released_without_an_answer(service: Service, store: Store) -> None:
    lease = store.lease("m")
    assert torch.is_tensor(lease.snapshot["vae.weight"])
    stop(service)
    lease.release()
    go_on(service, store)
    assert store.status().leases == []


ASKED: dict[str, Callable[[Store], object]] = {
    "status": lambda store: store.status(),
    "lease": lambda store: store.lease("m"),
    "wait_for": lambda store: store.wait_for("m", timeout=0),
    "tag": lambda store: store.tag("m", "old", 1),
    "remove_tag": lambda store: store.remove_tag("m", "old"),
    "remove_model": lambda store: store.remove_model("m"),
    "names": lambda store: store.names("m"),
    "publish_names": lambda store: store.publish_names("m", None),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_a_store_answers_at_once_is_not_waited_for(service: Service, store: Store, name: str) -> None:
    stop(service)
    with pytest.raises(StoreSilent, match="stopped or overloaded") as caught:
        ASKED[name](store)
    assert caught.value.details["socket"] == service.socket
    go_on(service, store)
    assert store.status().leases == []  # what came late is given back


def granted(request: wire.OpenLease | wire.RenewLease) -> wire.LeaseGranted:
    return wire.LeaseGranted(id=request.id, lease=1, version=1, records=wire.encode_records([]))


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[tuple[FakeStore, Store]]:
    """A store that answers when it is told to, and a client with little patience."""
    arena = FakeArena()
    fake = FakeStore(tmp_path / "s", arena)
    fake.answers[wire.OpenLease] = granted
    store = weightstore.connect(fake.path, timeout=PATIENCE)
    store.link.patience = PATIENCE
    yield fake, store
    store.close()
    fake.stop()
    arena.close()


def test_a_greeting_that_is_not_answered_is_given_up(scripted: tuple[FakeStore, Store]) -> None:
    """The store came back, says hello, and hangs when leases are to be renewed: others must not wait."""
    fake, store = scripted
    fake.answers[wire.RenewLease] = lambda r: None
    lease = store.lease("m", follow=True)
    fake.lose(store.link)
    fake.wait(wire.RenewLease)
    with pytest.raises(StoreSilent, match="did not answer RenewLease"):
        store.status()
    with pytest.raises(StoreSilent):
        lease.park()
    assert lease.parked
    with pytest.raises(StoreSilent):
        lease.unpark()  # it lives, and who knows what it lets others do
    fake.answers[wire.RenewLease] = granted
    fake.answers[wire.ParkLease] = lambda r: state(r)
    lease.unpark()
    assert fake.of(wire.RenewLease)[-1].parked and not lease.parked


def state(request: wire.ParkLease) -> wire.LeaseState:
    return wire.LeaseState(id=request.id, version=1, torn=False, records=wire.encode_records(None))


def test_an_unparking_that_is_answered_too_late_is_undone_before_the_next(
    scripted: tuple[FakeStore, Store],
) -> None:
    fake, store = scripted
    asked: list[wire.ParkLease] = []
    fake.answers[wire.ParkLease] = lambda r: state(r) if r.parked else asked.append(r)  # type: ignore[func-returns-value]
    lease = store.lease("m", follow=True)
    lease.park()
    with pytest.raises(StoreSilent):
        lease.unpark()
    fake.push(state(asked[0]))
    fake.wait(wire.ParkLease, 3)
    assert [request.parked for request in fake.of(wire.ParkLease)] == [True, False, True] and lease.parked
    fake.answers[wire.ParkLease] = state
    lease.unpark()
    assert not lease.parked and not fake.of(wire.ParkLease)[-1].parked


def test_an_offer_is_not_answered_behind_an_unparking(scripted: tuple[FakeStore, Store]) -> None:
    """Which makes it void: the store could take the answer for that of a later offer of the same version."""
    fake, store = scripted
    asked: list[wire.ParkLease] = []
    fake.answers[wire.ParkLease] = lambda r: asked.append(r)  # type: ignore[func-returns-value]
    lease = store.lease("m", follow=True)
    fake.push(wire.Offer(lease=1, version=2, torn=False, records=wire.encode_records([])))
    with pytest.raises(StoreSilent):
        lease.park()
    assert lease.pending == 2
    store.link.patience = 20.0
    unparking = threading.Thread(target=lease.unpark)
    unparking.start()
    fake.wait(wire.ParkLease, 2)
    fake.push(state(asked[0]))
    fake.push(state(asked[1]))
    unparking.join(20)
    assert (lease.version, lease.parked, lease.pending) == (1, False, None)
    store.link.connect().request(wire.Drained(id=0), wire.Done)
    assert fake.of(wire.TakeOffer) == []
