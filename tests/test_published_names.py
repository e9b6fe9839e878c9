"""Published names against real stores: what a refit without its own map does, and what the map survives."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from click.testing import CliRunner, Result
from processes import Service, eventually, publish
from safetensors.torch import load_file, save_file
from torch import nn

import weightstore as ws
from engine_hooks import EngineHook
from weightstore import wire
from weightstore.catalog import Catalog
from weightstore.cli import main
from weightstore.connection import Connection
from weightstore.errors import ArenaFull, CoverageError, InvalidName, UnknownModel, UsageError
from weightstore.names import AS_STORED, NameMap
from weightstore.names.published import decode_published, encode_published
from weightstore.persistence import Root
from weightstore.types import MAX_NAME_MAP

NAMES = (
    NameMap(prefix="t.")
    .rename(r"^net\.", "blocks.")
    .fuse(["q", "k", "v"], "qkv")
    .drop(r"\.lora", optional=True)
)
TRAINED = {
    "module.net.0.q.w": torch.full((2, 3), 1.0),
    "module.net.0.k.w": torch.full((2, 3), 2.0),
    "module.net.0.v.w": torch.full((2, 3), 3.0),
    "module.net.0.norm.w": torch.full((3,), 4.0),
}
FUSED = {
    "t.blocks.0.qkv.w": torch.cat([TRAINED[f"module.net.0.{p}.w"] for p in "qkv"]),
    "t.blocks.0.norm.w": TRAINED["module.net.0.norm.w"],
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("names")) as service:
        yield service
        assert "bug" not in service.log() and "Traceback" not in service.log()


@pytest.fixture
def store(service: Service) -> Iterator[ws.Store]:
    with service.connect() as store:
        yield store
        for model in store.status().models:
            store.remove_model(model.name)


def base(store: ws.Store, model: str = "m") -> None:
    """A version under the engine's names."""
    with store.refit(model, fresh=True, names=AS_STORED) as refit:
        refit.put_many({name: torch.zeros_like(tensor) for name, tensor in FUSED.items()})


def holds(store: ws.Store, expected: dict[str, torch.Tensor], model: str = "m") -> None:
    with store.lease(model) as snapshot:
        assert set(snapshot) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(snapshot[name], tensor), name


# -- a refit without a map ----------------------------------------------------------------------------


def test_a_refit_goes_by_the_published_map(store: ws.Store) -> None:
    base(store)
    assert store.names("m") is None
    store.publish_names("m", NAMES)
    assert store.names("m") == NAMES
    with store.refit("m") as refit:
        assert refit.names == NAMES.relaxed()
        assert refit.plan(TRAINED).ok
        refit.put_many(TRAINED)
    holds(store, FUSED)


def test_it_costs_no_request(store: ws.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for verb in ("request", "request_fd", "post"):
        original = getattr(Connection, verb)

        def counted(self: Connection, message: Any, *rest: Any, _original: Any = original, **how: Any) -> Any:
            asked.append(type(message).__name__)
            return _original(self, message, *rest, **how)

        monkeypatch.setattr(Connection, verb, counted)
    counts = []
    base(store)
    for names in (NAMES, None):  # given, then published
        store.publish_names("m", NAMES)
        asked.clear()
        with store.refit("m", names=names) as refit:
            refit.put_many(TRAINED)
        counts.append(list(asked))
    assert counts[0] == counts[1] and counts[0][0] == "OpenRefit"
    assert "GetNames" not in counts[1]


def test_a_map_that_is_given_goes_before_it(store: ws.Store) -> None:
    base(store)
    store.publish_names("m", NAMES)
    with store.refit("m", names=NameMap()) as refit:
        assert refit.names == NameMap()
        refit.put_many({f"module.{name}": tensor for name, tensor in FUSED.items()})
    holds(store, FUSED)
    with store.refit("m", names=NameMap(strip=False)) as refit:
        refit.put_many({name: tensor + 1 for name, tensor in FUSED.items()})
    holds(store, {name: tensor + 1 for name, tensor in FUSED.items()})


def test_what_has_no_place_is_refused_and_the_map_named(store: ws.Store) -> None:
    base(store)
    number = store.tags("m")["latest"]
    store.publish_names("m", NAMES)
    with pytest.raises(CoverageError, match="through the map published with the model") as caught:
        with store.refit("m") as refit:
            refit.put_many(FUSED)
    assert caught.value.details["unknown"] == [f"t.{name}" for name in FUSED]
    with pytest.raises(CoverageError) as own:
        with store.refit("m", names=NAMES) as refit:
            refit.put_many(FUSED)
    assert "published" not in str(own.value)
    assert store.tags("m") == {"latest": number}


def test_its_rules_need_not_match_but_coverage_is_exact(store: ws.Store) -> None:
    base(store)
    store.publish_names("m", NAMES.rename("never", "").fuse(["a", "b"], "ab"))
    with store.refit("m") as refit:
        refit.put_many(TRAINED)
    holds(store, FUSED)
    with pytest.raises(CoverageError, match="norm") as caught:
        with store.refit("m") as refit:
            refit.put_many({name: value for name, value in TRAINED.items() if "norm" not in name})
    assert caught.value.details["missing"] == ["t.blocks.0.norm.w"]


def test_what_names_stored_tensors_goes_past_it(store: ws.Store) -> None:
    base(store)
    store.publish_names("m", NAMES)
    with store.refit("m") as refit:
        refit.view("t.blocks.0.qkv.w").fill_(5)
        refit.put_part("t.blocks.0.norm.w", torch.full((3,), 6.0), at=(0,))
    holds(store, {"t.blocks.0.qkv.w": torch.full((6, 3), 5.0), "t.blocks.0.norm.w": torch.full((3,), 6.0)})
    store.tag("m", "ema", "latest")
    with store.refit("m", tag="policy") as refit:
        refit.put_many(TRAINED)
    ws.update_ema(store, "m", source="policy", target="ema", decay=0.0)
    with store.lease("m", "ema") as snapshot:
        assert torch.equal(snapshot["t.blocks.0.qkv.w"], FUSED["t.blocks.0.qkv.w"])


def test_ranks_go_by_the_map_their_refit_began_with(service: Service, store: ws.Store) -> None:
    base(store)
    store.publish_names("m", NAMES)
    with service.connect() as other:
        first = store.refit("m", key="step", rank=0, world_size=2)
        store.publish_names("m", NameMap(prefix="elsewhere."))
        second = other.refit("m", key="step", rank=1, world_size=2)
        assert first.names == second.names == NAMES.relaxed()
        first.put_many({name: value for name, value in TRAINED.items() if "norm" not in name})
        second.put_many({name: value for name, value in TRAINED.items() if "norm" in name})
        ending = threading.Thread(target=first.commit)
        ending.start()
        second.commit()
        ending.join(60)
    holds(store, FUSED)
    assert store.names("m") == NameMap(prefix="elsewhere.")


def test_an_engine_with_other_names_follows_its_trainer(store: ws.Store) -> None:
    """Published before there is a version: attaching publishes the engine's own names all the same."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 12)

    torch.manual_seed(0)
    trainer = {
        f"net.0.{p}.{kind}": torch.randn(shape)
        for p in "qkv"
        for kind, shape in (("weight", (4, 4)), ("bias", (4,)))
    }
    engine = nn.Module()
    engine.blocks = nn.ModuleList([Block()])
    store.publish_names("flux", NAMES)
    with EngineHook.attach(store, "flux", {"t": engine}, device="cpu") as hook:
        assert hook.version == 1
        hook.sleep()
        with store.refit("flux") as refit:
            refit.put_many(trainer)
        hook.wake()
        block = engine.blocks[0]
        assert isinstance(block, Block)
        for kind in ("weight", "bias"):
            fused = torch.cat([trainer[f"net.0.{p}.{kind}"] for p in "qkv"])
            assert torch.equal(getattr(block.qkv, kind), fused)


# -- its life -----------------------------------------------------------------------------------------


def test_it_may_come_before_the_first_version(store: ws.Store) -> None:
    store.publish_names("new", NAMES)
    assert store.models() == []
    assert [(model.name, model.names, model.versions) for model in store.status().models] == [
        ("new", True, [])
    ]
    with pytest.raises(UnknownModel, match="it has none"):
        store.tags("new")
    with pytest.raises(UnknownModel):
        store.lease("new")
    with store.refit("new") as refit:
        refit.put_many(TRAINED)
    holds(store, FUSED, "new")
    assert store.names("new") == NAMES


def test_taken_back(store: ws.Store) -> None:
    base(store)
    store.publish_names("m", None)
    store.publish_names("m", NAMES)
    store.publish_names("m", None)
    store.publish_names("m", None)
    assert store.names("m") is None and store.names("nobody") is None
    with store.refit("m") as refit:
        assert refit.names is None
        refit.put_many(FUSED)
    store.publish_names("only", NAMES)
    store.publish_names("only", None)
    assert [model.name for model in store.status().models] == ["m"]


def test_it_goes_with_its_model(store: ws.Store) -> None:
    used = store.status().arena.meta_used
    for end in ("remove_model", "remove_tag", "held"):
        base(store)
        store.publish_names("m", NAMES)
        lease = store.lease("m") if end == "held" else None
        if end == "remove_tag":
            store.remove_tag("m", "latest")
        else:
            store.remove_model("m")
        assert store.names("m") is None
        if lease is not None:
            lease.release()
        assert store.models() == []
    store.publish_names("m", NAMES)
    store.remove_model("m")
    assert store.status().models == []
    with pytest.raises(UnknownModel):
        store.remove_model("m")
    assert store.status().arena.meta_used == used


def test_it_stays_while_versions_come_and_go(store: ws.Store) -> None:
    base(store)
    store.publish_names("m", NAMES)
    used = store.status().arena.meta_used
    with store.refit("m", in_place=True) as refit:
        refit.put_many(TRAINED)
    base(store)
    assert store.names("m") == NAMES
    eventually(lambda: all(v.checksummed for m in store.status().models for v in m.versions), "checksums")
    for prefix in "abc":
        store.publish_names("m", NameMap(prefix=f"{prefix}."))
    store.publish_names("m", NAMES)
    assert len(store.status().models[0].versions) == 1
    assert store.status().arena.meta_used < used + 4096  # maps that were replaced leave nothing behind


def test_it_survives_the_store(tmp_path: Path) -> None:
    with Service(tmp_path) as service:
        with service.connect() as store:
            base(store)
            store.publish_names("m", NAMES)
            store.publish_names("later", NameMap(prefix="later."))
            store.publish_names("gone", NAMES)
            store.publish_names("gone", None)
        service.kill()
        service.start()
        with service.connect() as store:
            assert (store.names("m"), store.names("later")) == (NAMES, NameMap(prefix="later."))
            assert store.names("gone") is None
            assert store.models() == ["m"]
            with store.refit("m") as refit:
                refit.put_many(TRAINED)
            holds(store, FUSED)


def test_a_store_killed_while_maps_are_published_serves_a_whole_one(tmp_path: Path) -> None:
    """Maps 1, 2, 3, …; whatever the instant, the next store has the last acknowledged one or the next."""
    with Service(tmp_path) as service:
        with service.connect() as store:
            base(store)
        for _ in range(3):
            known = [0]
            started = threading.Event()
            with service.connect() as store:

                def go_on(
                    store: ws.Store = store, known: list[int] = known, started: threading.Event = started
                ) -> None:
                    try:
                        for number in range(1, 100_000):
                            store.publish_names("m", NameMap(prefix=f"{number}." * 2000))
                            known[0] = number
                            if number == 20:
                                started.set()
                    except ws.errors.StoreGone:
                        pass

                thread = threading.Thread(target=go_on)
                thread.start()
                assert started.wait(60)
                service.kill()
                thread.join(60)
            service.start()
            with service.connect() as store:
                found = store.names("m")
                assert found in [NameMap(prefix=f"{number}." * 2000) for number in (known[0], known[0] + 1)]
                store.publish_names("m", NameMap(prefix="0."))


def test_engines_that_publish_at_once_leave_one_of_their_maps(service: Service, store: ws.Store) -> None:
    base(store)
    maps = [NameMap(prefix=f"{number}." * 1000) for number in range(4)]
    ready = threading.Barrier(len(maps) + 1)
    seen: list[NameMap | None] = []

    def engine(names: NameMap) -> None:
        with service.connect() as mine:
            ready.wait(60)
            for _ in range(20):
                mine.publish_names("m", names)

    threads = [threading.Thread(target=engine, args=(names,)) for names in maps]
    for thread in threads:
        thread.start()
    ready.wait(60)
    seen.append(store.names("m"))
    while any(thread.is_alive() for thread in threads):
        seen.append(store.names("m"))
    assert all(names is None or names in maps for names in seen)
    assert store.names("m") in maps


def test_roots_written_before_there_were_maps_still_load() -> None:
    new = msgspec.msgpack.encode(Root([], None))
    old = msgspec.msgpack.encode([[["m", 4, {"latest": 3}, []]], None])
    model = msgspec.msgpack.decode(old, type=Root).models[0]
    assert (model.name, model.next_number, model.names) == ("m", 4, None)
    assert msgspec.msgpack.decode(new, type=Root).models == []


def test_a_catalog_without_room_keeps_what_was_published(store: ws.Store, service: Service) -> None:
    base(store)
    store.publish_names("m", NAMES)
    big = NameMap(prefix="x" * (MAX_NAME_MAP - 100))
    published = []
    with pytest.raises(ArenaFull, match="catalog area cannot hold"):
        for number in range(100):
            store.publish_names(f"filler-{number}", big)
            published.append(f"filler-{number}")
    assert 40 < len(published) < 60
    with pytest.raises(ArenaFull):
        store.publish_names("m", big)
    assert store.names("m") == NAMES
    for name in published:
        store.remove_model(name)
    with store.refit("m") as refit:
        refit.put_many(TRAINED)
    holds(store, FUSED)


# -- hostile ------------------------------------------------------------------------------------------


def test_sizes(store: ws.Store, service: Service) -> None:
    overhead = len(encode_published("m", NameMap(prefix="")))
    store.publish_names("m", NameMap(prefix="x" * (MAX_NAME_MAP - overhead)))
    for prefix in ("x" * (MAX_NAME_MAP - overhead + 1), "ü" * (MAX_NAME_MAP // 2)):
        with pytest.raises(UsageError, match=f"and may have {MAX_NAME_MAP}") as caught:
            store.publish_names("m", NameMap(prefix=prefix))
        assert caught.value.details["requested"] > caught.value.details["capacity"] == MAX_NAME_MAP
    with service.raw() as raw:  # past the client's own check
        refused = raw.ask(wire.PublishNames(id=0, model="m", names='{"prefix":"' + "x" * MAX_NAME_MAP + '"}'))
        assert (refused.error, refused.details["capacity"]) == ("UsageError", MAX_NAME_MAP)
        assert len(refused.message) < 300


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", '{"a": }', "[" * 100_000, '{"a":' * 100_000, "\0", '{"a":1} x']
)
def test_what_is_no_map_at_all_is_refused_by_the_store(service: Service, text: str) -> None:
    with service.raw() as raw:
        refused = raw.ask(wire.PublishNames(id=0, model="m", names=text))
        assert (refused.error, "is not JSON of a map" in refused.message) == ("UsageError", True)
        assert len(refused.message) < 300
        assert raw.ask(wire.GetNames(id=0, model="m")).names is None


@pytest.mark.parametrize("name", ["", "a b", "../x", "x" * 129])
def test_model_names_are_checked(store: ws.Store, name: str) -> None:
    with pytest.raises(InvalidName):
        store.publish_names(name, NAMES)
    with pytest.raises(InvalidName):
        store.names(name)


@pytest.mark.parametrize(
    "text",
    [
        '{"prefx": "t."}',
        '{"format": 2}',
        '{"rules": [{"rule": "rename", "pattern": "(", "to": ""}]}',
        '{"rules": [{"rule": "explode"}]}',
    ],
)
def test_a_map_that_clients_cannot_read_fails_their_refits_and_says_what_to_do(
    service: Service, store: ws.Store, text: str
) -> None:
    base(store)
    with service.raw() as raw:
        assert isinstance(raw.ask(wire.PublishNames(id=0, model="m", names=text)), wire.Done)
    for attempt in (lambda: store.names("m"), lambda: store.refit("m")):
        with pytest.raises(UsageError, match=r"published with 'm' cannot be used: .*store\.publish_names"):
            attempt()
    with store.refit("m", names=AS_STORED) as refit:  # the refused refit holds nothing
        refit.put_many(FUSED)
    store.publish_names("m", NAMES)
    assert store.names("m") == NAMES


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"prefix": "t."}, "not a dict"),
        ("t.", "not a str"),
        (NameMap(prefix="\ud800"), "cannot be published"),
        (NameMap(rules=("drop",)), "cannot be published"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_map_is_not_sent(wrong: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        encode_published("m", wrong)


def test_the_text_is_the_map() -> None:
    assert decode_published("m", encode_published("m", NAMES)) == NAMES
    relaxed = NAMES.relaxed()
    assert all(rule.optional for rule in relaxed.rules)
    assert [str(rule) for rule in relaxed.rules] == [str(rule) for rule in NAMES.rules]


def test_the_catalog_alone() -> None:
    catalog = Catalog(0)
    catalog.publish_names("m", None)
    assert catalog.models.find("m") is None
    catalog.publish_names("m", "{}")
    catalog.remove_model("m")
    with pytest.raises(UnknownModel):
        catalog.remove_model("m")


# -- the command line ---------------------------------------------------------------------------------


def run(store: ws.Store, command: str, *arguments: object) -> Result:
    return CliRunner().invoke(main, [command, "--socket", store.socket, *map(str, arguments)])


def test_status_shows_it(store: ws.Store) -> None:
    publish(store, "plain", {"t.w": 8}, 1)
    base(store)
    store.publish_names("m", NAMES)
    store.publish_names("early", NAMES)
    shown = run(store, "status").output
    assert [line.split()[0] for line in shown.splitlines() if "name map published" in line] == ["m", "early"]
    assert "no version yet" in shown
    told = json.loads(run(store, "status", "--json").output)
    assert {model["name"]: model["names"] for model in told["models"]} == {
        "plain": False,
        "m": True,
        "early": True,
    }
    assert "early" not in run(store, "tag").output
    refused = run(store, "verify", "early")
    assert refused.exit_code == 1 and "early" not in refused.output.partition("it has: ")[2]


def test_plan_goes_by_it(store: ws.Store, tmp_path: Path) -> None:
    file = tmp_path / "trained.safetensors"
    save_file({name.removeprefix("module."): tensor for name, tensor in TRAINED.items()}, file)
    base(store)
    assert run(store, "plan", "m", file).exit_code == 1
    store.publish_names("m", NAMES.rename("never", ""))
    planned = run(store, "plan", "m", file)
    assert planned.exit_code == 0, planned.output
    assert ", through the published name map\n" in planned.output
    own = tmp_path / "map.json"
    own.write_text('{"strip": false}')
    assert run(store, "plan", "--map", own, "m", file).exit_code == 1
    fresh = run(store, "plan", "--fresh", "m", file)
    assert fresh.exit_code == 0 and "published" not in fresh.output


def test_load_takes_names_as_they_are_unless_told(store: ws.Store, tmp_path: Path) -> None:
    trained, saved = tmp_path / "trained.safetensors", tmp_path / "saved.safetensors"
    save_file({name.removeprefix("module."): tensor for name, tensor in TRAINED.items()}, trained)
    refused = run(store, "load", "--quiet", "--published-map", "m", trained)
    assert refused.exit_code == 1 and "no name map is published with model 'm'" in refused.output
    store.publish_names("m", NAMES)
    loaded = run(store, "load", "--quiet", "--published-map", "m", trained)
    assert loaded.exit_code == 0, loaded.output
    holds(store, FUSED)
    assert run(store, "save", "--quiet", "m", saved).exit_code == 0
    assert set(load_file(saved)) == set(FUSED)
    assert run(store, "load", "--quiet", "m", saved).exit_code == 0  # what was saved comes back as it was
    holds(store, FUSED)
    both = run(store, "load", "--published-map", "--map", saved, "m", trained)
    assert both.exit_code == 2
