"""In-place refits from end to end: one copy of the weights, a trainer that dies half way, an engine that
refuses what it left behind, and every way back that the refusal names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import in_place_actors as actors
import pytest
import torch
from children import Child
from click.testing import CliRunner
from in_place_actors import NAMES, state_dict
from processes import Service, eventually
from safetensors.torch import save_file

from weightstore.cli import main
from weightstore.client import Store
from weightstore.errors import ArenaFull, TagTorn, VersionInUse

FROZEN = {"vae.w": torch.full((50, 10), 9.0)}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("service"), capacity="32MiB") as service:
        yield service


@pytest.fixture
def store(service: Service) -> Iterator[Store]:
    with service.connect() as store:
        yield store


_numbers = count()


class Engine:
    """An engine in its own process, asleep or awake."""

    def __init__(self, child: Child) -> None:
        self._child = child
        child.reaches("waiting")

    def does(self, method: str) -> dict[str, Any]:
        self._child.go(method)
        fact: dict[str, Any] = self._child.reaches("waiting")
        return fact

    def close(self) -> None:
        self._child.go("close")
        self._child.result()


@pytest.fixture
def model(store: Store) -> Iterator[str]:
    """Version 1 of a model of its own."""
    name = f"m{next(_numbers)}"
    publish(store, name, 1.0)
    yield name
    store.remove_model(name)


@pytest.fixture
def engine(service: Service, model: str) -> Iterator[Engine]:
    """Asleep on `model`."""
    with Child(actors.engine, service.socket, model) as child:
        engine = Engine(child)
        assert engine.does("sleep")["state"] == "ASLEEP"
        yield engine
        engine.close()


def publish(store: Store, model: str, value: float, **options: Any) -> int:
    """All of it; with `components`, the transformer."""
    with store.refit(model, **options) as refit:
        refit.put_many(state_dict(value) | ({} if "components" in options else FROZEN))
    return refit.report.version


def half_way(child: Child) -> None:
    """Let a trainer write its first tensor, and half of the others."""
    child.reaches("before transformer.a")
    child.go()
    child.reaches("before transformer.b")


def awake(version: int, value: float) -> dict[str, Any]:
    return {"state": "AWAKE", "version": version, "values": [value]}


def refused(answer: dict[str, Any], model: str) -> str:
    """The message of a wake that the torn tag prevented."""
    assert (answer["state"], answer["error"]) == ("ASLEEP", "TagTorn"), answer
    message: str = answer["message"]
    assert re.search(rf"tag 'latest' of '{model}' is torn: an in-place refit overwrote version 1", message)
    return message


@pytest.fixture
def torn(service: Service, store: Store, model: str, engine: Engine) -> str:
    """The model after its trainer was killed half way; the engine has refused to wake on it."""
    with Child(actors.train, service.socket, model, 2.0) as trainer:
        half_way(trainer)
        trainer.kill()
    eventually(lambda: not store.status().refits, "the dead trainer's refit is gone")
    message = refused(engine.does("wake"), model)
    # The ways back, each of which has a test below.
    for way in (
        "Wait for its commit if it is running",
        "write the same components whole with a new refit",
        "in_place=True needs no more room",
        f"weightstore load {model}",
    ):
        assert way in message
    return model


def test_the_frozen_rest_is_not_touched_and_nobody_reads_the_torn_tag(store: Store, torn: str) -> None:
    for use in (
        lambda: store.lease(torn),
        lambda: store.tag(torn, "copy", "latest"),
        lambda: store.verify(torn),
    ):
        with pytest.raises(TagTorn, match=r"refit of transformer has not committed.*weightstore load"):
            use()
    (status,) = [model for model in store.status().models if model.name == torn]
    assert status.torn == ["latest"]
    publish(store, torn, 3.0, components=["transformer"])
    with store.lease(torn) as snapshot:
        assert torch.equal(snapshot["vae.w"], FROZEN["vae.w"])
    assert store.verify(torn).corrupt == []


def test_an_engine_refuses_as_often_as_it_is_asked_and_others_cannot_attach(
    service: Service, store: Store, torn: str, engine: Engine
) -> None:
    for method in ("wake", "refit", "wake"):
        refused(engine.does(method), torn)
    with Child(actors.engine, service.socket, torn) as child:
        assert "TagTorn" in child.error()
    publish(store, torn, 3.0, components=["transformer"])
    assert engine.does("wake") == awake(2, 3.0)


# -- the ways back ------------------------------------------------------------------------------------


def test_waiting_for_the_commit(service: Service, model: str, engine: Engine) -> None:
    with Child(actors.train, service.socket, model, 2.0) as trainer:
        half_way(trainer)
        assert "Wait for its commit" in refused(engine.does("wake"), model)
        trainer.go()
        trainer.reaches("before transformer.c")
        trainer.go()
        trainer.reaches("all written")
        refused(engine.does("wake"), model)
        trainer.go()
        assert trainer.result() == 2
    assert engine.does("wake") == awake(2, 2.0)


def test_a_new_refit_in_place(service: Service, store: Store, torn: str, engine: Engine) -> None:
    used = store.status().arena.used
    with Child(actors.train, service.socket, torn, 3.0) as trainer:
        for name in NAMES:
            trainer.reaches(f"before transformer.{name}")
            trainer.go()
        trainer.reaches("all written")
        trainer.go()
        assert trainer.result() == 2
    assert engine.does("wake") == awake(2, 3.0)
    assert store.status().arena.used == used


def test_a_new_refit_beside_it(store: Store, torn: str, engine: Engine) -> None:
    assert publish(store, torn, 3.0, components=["transformer"]) == 2
    assert engine.does("wake") == awake(2, 3.0)


def test_loading_the_model_again(service: Service, torn: str, engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(state_dict(1.0) | FROZEN, path)
    loaded = CliRunner().invoke(main, ["load", "--socket", service.socket, torn, str(path)])
    assert loaded.exit_code == 0, loaded.output
    assert engine.does("wake") == awake(2, 1.0)


def test_half_a_refit_is_no_way_back(store: Store, torn: str, engine: Engine) -> None:
    for options in ({"partial": True}, {"components": ["vae"]}, {"skip_unchanged": True}):
        with pytest.raises(TagTorn, match="those components whole"):
            store.refit(torn, **options)  # type: ignore[arg-type]
    refused(engine.does("wake"), torn)


# -- other ways to die --------------------------------------------------------------------------------


def test_a_trainer_that_gives_up_leaves_the_tag_torn_too(
    service: Service, store: Store, model: str, engine: Engine
) -> None:
    with Child(actors.train, service.socket, model, 2.0) as trainer:
        half_way(trainer)
        trainer.go("fail")
        assert "the loss is NaN" in trainer.error()
    refused(engine.does("wake"), model)
    publish(store, model, 3.0, components=["transformer"], in_place=True)
    assert engine.does("wake") == awake(2, 3.0)


def test_a_rank_that_dies_tears_the_tag_for_all(
    service: Service, store: Store, model: str, engine: Engine
) -> None:
    with (
        Child(actors.train_rank, service.socket, model, 2.0, 0) as first,
        Child(actors.train_rank, service.socket, model, 2.0, 1) as second,
    ):
        first.reaches("half written")
        second.reaches("half written")
        second.kill()
        first.go()
        assert re.search(r"RefitAborted: .*rank 1, .*disconnected", first.error())
    refused(engine.does("wake"), model)
    with (
        Child(actors.train_rank, service.socket, model, 4.0, 0) as first,
        Child(actors.train_rank, service.socket, model, 4.0, 1) as second,
    ):
        for rank in (first, second):
            rank.reaches("half written")
            rank.go()
        assert (first.result(), second.result()) == (2, 2)
    assert engine.does("wake") == awake(2, 4.0)


def test_an_engine_that_is_killed_meanwhile_attaches_again_afterwards(
    service: Service, store: Store, model: str
) -> None:
    with Child(actors.engine, service.socket, model) as child:
        Engine(child).does("sleep")
        with Child(actors.train, service.socket, model, 2.0) as trainer:
            half_way(trainer)
            child.kill()
            trainer.kill()
    eventually(lambda: not store.status().refits and not store.status().leases, "both are gone")
    publish(store, model, 5.0, components=["transformer"], in_place=True)
    with Child(actors.engine, service.socket, model) as child:
        engine = Engine(child)
        engine.does("sleep")
        assert engine.does("wake") == awake(2, 5.0)
        engine.close()


# -- hosts without room -------------------------------------------------------------------------------


def test_an_engine_that_is_awake_is_not_overwritten(store: Store, model: str, engine: Engine) -> None:
    assert engine.does("wake") == awake(1, 1.0)
    with pytest.raises(VersionInUse, match=r"\(pid \d+\) reads version 1 .*put that engine to sleep"):
        store.refit(model, components=["transformer"], in_place=True)
    engine.does("sleep")
    publish(store, model, 2.0, components=["transformer"], in_place=True)
    assert engine.does("wake") == awake(2, 2.0)


def test_where_only_one_copy_fits_in_place_goes_on_and_on(tmp_path: Path) -> None:
    rows = 14_000  # three tensors of 5.3 MiB in an arena of 20
    with Service(tmp_path, capacity="20MiB") as service, service.connect() as store:
        with store.refit("large") as refit:
            refit.put_many(state_dict(1.0, rows))
        with Child(actors.engine, service.socket, "large", rows) as child:
            engine = Engine(child)
            engine.does("sleep")
            with pytest.raises(ArenaFull), store.refit("large") as refit:
                refit.put_many(state_dict(2.0, rows))
            for version, value in ((2, 2.0), (3, 3.0)):
                with Child(actors.train, service.socket, "large", -1.0, rows) as trainer:
                    half_way(trainer)
                    trainer.kill()
                eventually(lambda: not store.status().refits, "the dead trainer's refit is gone")
                assert engine.does("wake")["error"] == "TagTorn"
                with store.refit("large", in_place=True) as refit:
                    refit.put_many(state_dict(value, rows))
                assert engine.does("wake") == awake(version, value)
                engine.does("sleep")
            engine.close()


def test_a_trainer_that_hung_up_and_lives_keeps_others_from_overwriting(
    service: Service, store: Store, model: str, engine: Engine
) -> None:
    # Its connection has ended, and with it the refit; but its last copies may still be landing.
    with Child(actors.train, service.socket, model, 2.0) as trainer:
        half_way(trainer)
        trainer.go("hang up")
        trainer.reaches("hung up")
        eventually(lambda: not store.status().refits, "its refit is gone")
        with pytest.raises(VersionInUse, match=rf"process {trainer.pid} may still be writing to it"):
            store.refit(model, components=["transformer"], in_place=True)
        # Beside it there is room; what it may be writing to stays out of use until it has gone.
        publish(store, model, 3.0, components=["transformer"])
        assert engine.does("wake") == awake(2, 3.0)
        engine.does("sleep")
        eventually(lambda: store.status().arena.quarantined, "version 1 is gone, its space is not back")
        trainer.kill()
    eventually(lambda: not store.status().arena.quarantined, "its space is back")
    publish(store, model, 4.0, components=["transformer"], in_place=True)
    assert engine.does("wake") == awake(3, 4.0)
