"""Refits through a name map, against the real service: what lands is what a full state dict would say.

`assembled` is that reference. It rewrites whole dictionaries rule by rule, with `torch.cat` and
`Tensor.split`, and shares no code with the map.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import nn

import weightstore as ws
from weightstore.errors import CoverageError, InvalidTensor
from weightstore.names import Kind, NameMap
from weightstore.names.rules import Drop, Fuse, Rename, Rule, Split

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def store() -> Iterator[ws.Store]:
    with ws.local_store("256MiB", window="16MiB") as store:
        yield store


def publish(store: ws.Store, model: str, tensors: State) -> None:
    """A base version with these names and shapes, and other values."""
    with store.refit(model, fresh=True) as refit:
        refit.put_many({name: torch.zeros_like(tensor) for name, tensor in tensors.items()})


def stored_as(store: ws.Store, model: str, expected: State) -> None:
    with store.lease(model) as snapshot:
        assert set(snapshot) == set(expected)
        for name, tensor in expected.items():
            assert snapshot[name].dtype == tensor.dtype
            assert torch.equal(snapshot[name], tensor), name


# -- the reference ------------------------------------------------------------------------------------


class Impossible(Exception):
    """The rules make no full state dict of it."""


def found_in(template: str, name: str) -> tuple[str, tuple[str, ...], str] | None:
    """Head, what the stars stand for, and tail; by looking at lists of segments."""
    wanted, have = template.split("."), name.split(".")
    for at in range(len(have) - len(wanted), -1, -1):
        middle = have[at : at + len(wanted)]
        if all(fnmatchcase(segment, want) for segment, want in zip(middle, wanted, strict=True)):
            stars = []
            for segment, want in zip(middle, wanted, strict=True):
                if "*" in want:  # one star at most per segment here
                    before, _, after = want.partition("*")
                    stars.append(segment[len(before) : len(segment) - len(after)])
            head, tail = have[:at], have[at + len(wanted) :]
            return ".".join([*head, ""]), tuple(stars), "".join(f".{segment}" for segment in tail)
    return None


def filled(template: str, place: tuple[str, tuple[str, ...], str]) -> str:
    head, stars, tail = place
    for star in stars:
        template = template.replace("*", star, 1)
    return head + template + tail


def assembled(state: State, rules: tuple[Rule, ...], prefix: str) -> State:
    """The full state dict that the rules make of one whose names are stripped already."""
    live = list(state.items())
    done: list[tuple[str, torch.Tensor]] = []
    for rule in rules:
        if isinstance(rule, Rename):
            live = [(re.sub(rule.pattern, rule.to, name), tensor) for name, tensor in live]
            continue
        left = []
        groups: dict[tuple[object, ...], State] = {}
        for name, tensor in live:
            if isinstance(rule, Drop):
                if not re.search(rule.pattern, name):
                    left.append((name, tensor))
            elif isinstance(rule, Fuse):
                place = None
                for source in rule.sources:
                    place = found_in(source, name)
                    if place is not None:
                        group = groups.setdefault(place, {})
                        if source in group:
                            raise Impossible(name)
                        group[source] = tensor
                        break
                if place is None:
                    left.append((name, tensor))
                elif rule.keep:
                    done.append((name, tensor))
            elif isinstance(rule, Split):
                place = found_in(rule.source, name)
                if place is None:
                    left.append((name, tensor))
                    continue
                shares = rule.shares or (1,) * len(rule.into)
                try:
                    unit = tensor.shape[rule.dim] // sum(shares)
                    parts = tensor.split([unit * share for share in shares], rule.dim)
                except (IndexError, RuntimeError):
                    raise Impossible(name) from None
                done += [(filled(t, place), part) for t, part in zip(rule.into, parts, strict=True)]
        for place, group in groups.items():
            assert isinstance(rule, Fuse)
            try:
                whole = torch.cat([group[source] for source in rule.sources], rule.dim)
            except (KeyError, RuntimeError, IndexError):
                raise Impossible(place) from None
            # torch.cat lets an empty vector meet anything.
            if len({(tensor.dtype, tensor.dim()) for tensor in group.values()}) > 1:
                raise Impossible(place)
            done.append((filled(rule.into, place), whole))  # type: ignore[arg-type]
        live = left
    full: State = {}
    for name, tensor in [*done, *live]:
        if prefix + name in full or not all(
            re.fullmatch(r"[!-~]+", part) for part in (prefix + name).split(".")
        ):
            raise Impossible(name)
        full[prefix + name] = tensor
    if not full:
        raise Impossible("nothing")
    return full


def matching(state: State, rules: tuple[Rule, ...]) -> set[int]:
    """Which rules something comes to, one at a time."""
    used = set()
    for name in state:
        for number, rule in enumerate(rules):
            if isinstance(rule, (Rename, Drop)):
                if not re.search(rule.pattern, name):
                    continue
                used.add(number)
                if isinstance(rule, Drop):
                    break
                name = re.sub(rule.pattern, rule.to, name)
            else:
                templates = rule.sources if isinstance(rule, Fuse) else (rule.source,)
                if any(found_in(template, name) for template in templates):
                    used.add(number)
                    break
    return used


def needs_company(rules: tuple[Rule, ...], state: State) -> bool:
    """Whether pieces of unequal size, whose shares nobody declared, may be among these."""
    along = {tensor.shape[d] for tensor in state.values() for d in range(tensor.dim())}
    return len(along) > 1 and any(isinstance(rule, Fuse) and rule.shares is None for rule in rules)


# -- random rules, random state dicts -----------------------------------------------------------------

SEGMENTS = ["a", "b", "q", "k", "v", "qkv", "0", "1", "mlp"]
WRAPPERS = ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"]
DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.float64, torch.bool]


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    make = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tensor = torch.randint(-100, 100, shape, generator=make).to(dtype)
    if len(shape) == 2 and draw(st.booleans()):
        tensor = tensor.T.contiguous().T
    return tensor


@st.composite
def fusions(draw: st.DrawFn) -> tuple[Rule, State]:
    """A fuse or split rule, and tensors that it fits."""
    parts = draw(st.permutations(["q", "k", "v", "gate", "up"]))[: draw(st.integers(2, 4))]
    whole = draw(st.sampled_from(["qkv", "fused", "attn.all"]))
    if draw(st.booleans()):
        lead = draw(st.sampled_from(["to_*", "attn.*"]))
        parts, whole = [f"{lead}.{part}" for part in parts], f"{lead}.{whole}"
    shares = draw(st.none() | st.lists(st.integers(1, 3), min_size=len(parts), max_size=len(parts)))
    dims = draw(st.integers(1, 3))
    dim = draw(st.integers(-dims, dims - 1))
    dtype = draw(st.sampled_from(DTYPES))
    shape = [draw(st.integers(0 if draw(st.booleans()) else 1, 3)) for _ in range(dims)]
    unit = draw(st.integers(1, 2))
    state: State = {}
    splits = draw(st.booleans())
    root = draw(st.sampled_from(["layers", "blocks", "encoder.layers"]))
    for layer in range(draw(st.integers(1, 2))):
        sizes = [unit * share for share in shares or [1] * len(parts)]
        if splits:
            shape[dim] = sum(sizes)
            name = f"{root}.{layer}.{whole.replace('*', 'x')}.w"
            state[name] = draw(tensors(tuple(shape), dtype))
            continue
        for part, size in zip(parts, sizes, strict=True):
            shape[dim] = size
            state[f"{root}.{layer}.{part.replace('*', 'x')}.w"] = draw(tensors(tuple(shape), dtype))
    chosen = None if shares is None else tuple(shares)
    if splits:
        return Split(whole, tuple(parts), dim, chosen), state
    # Shares that are not declared are seen where all pieces come at once.
    declared = chosen if draw(st.booleans()) else None
    return Fuse(tuple(parts), whole, dim, declared, draw(st.booleans())), state


@st.composite
def plain(draw: st.DrawFn) -> State:
    path = draw(st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=3))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    return {".".join(path): draw(tensors(shape, draw(st.sampled_from(DTYPES))))}


NOISE: st.SearchStrategy[Rule] = st.one_of(
    st.builds(
        Rename,
        st.sampled_from([r"^layers\.", r"\b(\d)\b", "^a", "q$", r"mlp\.(\w+)", "k", r"\.0\.", "b|v"]),
        st.sampled_from(["", "z", "blocks.", "x.y"]),
        st.just(True),
    ),
    st.builds(Rename, st.sampled_from([r"(\w)\.(\w)", r"^(\w+)\.([^.]+)"]), st.just(r"\2.\1"), st.just(True)),
    st.builds(Drop, st.sampled_from(["^a", r"\.1\.", "mlp", r"^b\.q", "v$"]), st.just(True)),
    st.builds(
        Fuse,
        st.just(("a", "b")),
        st.sampled_from(["ab", "q"]),
        st.integers(-1, 1),
        st.none(),
        st.booleans(),
        st.just(True),
    ),
    st.builds(
        Split,
        st.sampled_from(["mlp.*", "*.k"]),
        st.just(("m.*", "*.n")),
        st.integers(0, 1),
        st.none(),
        st.just(True),
    ),
    st.builds(
        Split,
        st.sampled_from(["mlp", "a"]),
        st.just(("m", "n")),
        st.integers(0, 1),
        st.none(),
        st.just(True),
    ),
)


@st.composite
def wrapped(draw: st.DrawFn, name: str, prefix: str) -> str:
    """`name` as wrappers would have it."""
    segments = name.split(".")
    for _ in range(draw(st.integers(0, 2))):
        segments.insert(draw(st.integers(0, len(segments) - 1)), draw(st.sampled_from(WRAPPERS)))
    leading = draw(
        st.sampled_from([[], ["module"], ["base_model", "model"], ["module", "_orig_mod", "module"]])
    )
    return ".".join([*leading, *segments])


@st.composite
def cases(draw: st.DrawFn) -> tuple[NameMap, State, State]:
    """A map, a trainer's state dict, and the same one without what wrappers add."""
    state: State = {}
    rules: list[Rule] = []
    for rule, some in draw(st.lists(fusions(), max_size=2)):
        rules.append(rule)
        state.update(some)
    for some in draw(st.lists(plain(), max_size=4)):
        state.update(some)
    for noise in draw(st.lists(NOISE, max_size=2)):
        rules.insert(draw(st.integers(0, len(rules))), noise)
    prefix = draw(st.sampled_from(["", "transformer."]))
    names = NameMap(prefix=prefix, rules=tuple(rules))
    return names, {draw(wrapped(name, prefix)): tensor for name, tensor in state.items()}, state


@settings(
    max_examples=1000,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(cases(), st.data())
def test_what_lands_equals_the_full_state_dict(
    store: ws.Store, case: tuple[NameMap, State, State], data: st.DataObject
) -> None:
    names, given, bare = case
    try:
        expected = assembled(bare, names.rules, names.prefix)
    except Impossible:
        expected = None
    unused = {n for n, rule in enumerate(names.rules) if not rule.optional} - matching(bare, names.rules)
    if expected is None or unused:
        event("refused")
        base = store.tags("refused").get("latest") if "refused" in store.models() else None
        with pytest.raises((CoverageError, InvalidTensor)):
            with store.refit("refused", fresh=True, names=names) as refit:
                assert not refit.plan(given).ok
                refit.put_many(given)
        assert (store.tags("refused").get("latest") if "refused" in store.models() else None) == base
        return
    how = data.draw(st.sampled_from(["fresh", "at once", "one by one", "in two calls"]))
    if how in ("one by one", "in two calls") and needs_company(names.rules, bare):
        how = "at once"
    event(how)
    if how == "fresh":
        refit = store.refit("m", fresh=True, names=names)
    else:
        publish(store, "m", expected)
        refit = store.refit("m", names=names)
    with refit:
        planned = refit.plan(given)
        assert planned.ok, planned
        items = data.draw(st.permutations(list(given.items())))
        if how == "one by one":
            for name, tensor in items:
                refit.put(name, tensor)
        elif how == "in two calls":
            middle = data.draw(st.integers(0, len(items)))
            refit.put_many(items[:middle])
            refit.put_many(dict(items[middle:]))
        else:
            refit.put_many(items)
    stored_as(store, "m", expected)
    assert refit.report.tensors == len({row.target for row in planned.rows if row.target is not None})


# -- real models --------------------------------------------------------------------------------------

FUSING = (
    NameMap(prefix="transformer.")
    .fuse(["to_q", "to_k", "to_v"], "to_qkv")
    .fuse(["add_q_proj", "add_k_proj", "add_v_proj"], "to_added_qkv")
)
SPLITTING = (
    NameMap(prefix="transformer.")
    .split("to_qkv", ["to_q", "to_k", "to_v"])
    .split("to_added_qkv", ["add_q_proj", "add_k_proj", "add_v_proj"])
)


def flux(seed: int = 0) -> nn.Module:
    return tiny_models.seeded(tiny_models.flux, seed)


def fused_flux(seed: int = 0) -> nn.Module:
    model = flux(seed)
    model.fuse_qkv_projections()
    return model


def state_of(module: nn.Module, keep: Callable[[str], bool] = lambda name: True) -> State:
    return {f"transformer.{name}": t for name, t in module.state_dict().items() if keep(name)}


def only_fused(name: str) -> bool:
    return not re.search(r"\.(to_[qkv]|add_[qkv]_proj)\.", name)


def test_flux_s_projections_are_fused_and_split_again(store: ws.Store) -> None:
    trainer = flux(seed=1)
    expected = state_of(fused_flux(seed=1), only_fused)
    publish(store, "flux", expected)
    with store.refit("flux", names=FUSING) as refit:
        planned = refit.plan(trainer)
        refit.put_module(trainer)
    assert planned.ok
    # One double block (six projections) and one single block (three), each weight and bias.
    assert planned.counts[Kind.FUSED] == (6 + 3) * 2
    stored_as(store, "flux", expected)

    with store.lease("flux") as snapshot:
        fused = {name.removeprefix("transformer."): snapshot[name] for name in snapshot}
        publish(store, "separate", state_of(trainer))
        with store.refit("separate", names=SPLITTING) as refit:
            refit.put_many(fused)
    stored_as(store, "separate", state_of(trainer))


def test_an_engine_that_keeps_the_projections_it_fused_gets_both(store: ws.Store) -> None:
    engine = fused_flux(seed=0)
    assert any("to_qkv" in name for name in engine.state_dict())
    assert any("to_q." in name for name in engine.state_dict())
    publish(store, "both", state_of(engine))
    keeping = NameMap(
        prefix="transformer.",
        rules=tuple(
            Fuse(rule.sources, rule.into, keep=True) for rule in FUSING.rules if isinstance(rule, Fuse)
        ),
    )
    with store.refit("both", names=keeping) as refit:
        for name, tensor in flux(seed=2).state_dict().items():
            refit.put(name, tensor)
    stored_as(store, "both", state_of(fused_flux(seed=2)))
    # What the engine reads is what it would have computed with, had it been trained itself.
    with store.lease("both") as snapshot:
        engine.load_state_dict({n.removeprefix("transformer."): snapshot[n] for n in snapshot})
    assert torch.equal(tiny_models.run_flux(engine), tiny_models.run_flux(fused_flux(seed=2)))


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wrap_for_checkpointing(module: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    module.transformer_blocks[0] = checkpoint_wrapper(module.transformer_blocks[0])
    return module


@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        nn.parallel.DistributedDataParallel,
        lambda module: torch.compile(nn.parallel.DistributedDataParallel(module)),
        lambda module: nn.parallel.DistributedDataParallel(torch.compile(wrap_for_checkpointing(module))),
    ],
)
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_what_wraps_a_trainer_s_module_is_stripped(
    store: ws.Store, one_rank: None, wrap: Callable[[nn.Module], nn.Module], prefix: str
) -> None:
    expected = state_of(flux(seed=3))
    publish(store, "wrapped", expected)
    module = wrap(flux(seed=3).requires_grad_(True))
    first = next(name for name, _ in module.named_parameters())
    assert first.startswith(("module.", "_orig_mod."))
    with store.refit("wrapped", names=NameMap(prefix="" if prefix else "transformer.")) as refit:
        refit.put_module(module, prefix)
    stored_as(store, "wrapped", expected)


def test_names_of_fsdp_and_peft(store: ws.Store) -> None:
    trainer = flux(seed=4).state_dict()
    expected = {f"transformer.{name}": tensor for name, tensor in trainer.items()}
    publish(store, "peft", expected)
    adapted: State = {}
    for name, tensor in trainer.items():
        path, _, leaf = name.rpartition(".")
        if path.endswith(("to_q", "to_k")):
            path += ".base_layer"
            adapted[f"base_model.model.{path}.lora_A.default.weight".replace(".base_layer", "")] = torch.ones(
                2, 3
            )
        path = path.replace("transformer_blocks.0", "transformer_blocks.0._fsdp_wrapped_module")
        adapted[f"_fsdp_wrapped_module.base_model.model.{path}.{leaf}"] = tensor
    names = NameMap(prefix="transformer.").drop(r"\.lora_[AB]\.")
    with store.refit("peft", names=names) as refit:
        assert refit.plan(adapted).counts[Kind.DROPPED] == sum("lora" in name for name in adapted) > 0
        refit.put_many(adapted)
    stored_as(store, "peft", expected)


# -- errors, and what they leave behind ---------------------------------------------------------------

QKV = NameMap().fuse(["q", "k", "v"], "qkv")
QKV_STORED = {"t.qkv": torch.zeros(6, 2), "t.norm": torch.zeros(3)}
QKV_GIVEN = {**{f"t.{n}": torch.full((2, 2), float(i)) for i, n in enumerate("qkv")}, "t.norm": torch.ones(3)}
QKV_LANDED = {"t.qkv": torch.cat([QKV_GIVEN[f"t.{n}"] for n in "qkv"]), "t.norm": torch.ones(3)}


@pytest.fixture
def qkv(store: ws.Store) -> str:
    publish(store, "qkv", QKV_STORED)
    return "qkv"


def test_a_call_with_one_wrong_name_writes_nothing(store: ws.Store, qkv: str) -> None:
    wrong = {**QKV_GIVEN, "t.nrom": torch.ones(3), "t.v": torch.ones(3, 2)}
    refit = store.refit(qkv, names=QKV)
    with pytest.raises(CoverageError, match=r"t\.nrom: perhaps t\.norm\?") as caught:
        refit.put_many(wrong)
    assert caught.value.details == {"mismatched": ["t.qkv"] * 3, "unknown": ["t.nrom"]}
    refit.put_many(QKV_GIVEN)  # not a duplicate: nothing was entered
    refit.commit()
    stored_as(store, qkv, QKV_LANDED)


def test_a_piece_put_twice_is_refused_in_one_call_and_across_calls(store: ws.Store, qkv: str) -> None:
    with store.refit(qkv, names=QKV) as refit:
        refit.put("t.q", QKV_GIVEN["t.q"])
        for again in ({"t.q": QKV_GIVEN["t.q"]}, {"module.t.q": QKV_GIVEN["t.q"], "t.k": QKV_GIVEN["t.k"]}):
            with pytest.raises(CoverageError) as caught:
                refit.put_many(again)
            assert caught.value.details == {"overlapping": ["t.qkv"]}
        with pytest.raises(CoverageError) as caught:
            refit.put("t.qkv", QKV_LANDED["t.qkv"])
        assert caught.value.details == {"duplicate": ["t.qkv"]}
        with pytest.raises(CoverageError, match=r"t\.k writes it too") as caught:
            refit.put_many({"t.k": QKV_GIVEN["t.k"], "module.t.k": QKV_GIVEN["t.k"]})
        assert caught.value.details == {"duplicate": ["t.qkv"]}
        refit.put_many({name: QKV_GIVEN[name] for name in ("t.k", "t.v", "t.norm")})
    stored_as(store, qkv, QKV_LANDED)


def test_a_piece_that_never_comes_fails_the_commit(store: ws.Store, qkv: str) -> None:
    before = store.tags(qkv)
    with pytest.raises(CoverageError) as caught:
        with store.refit(qkv, names=QKV) as refit:
            refit.put_many({name: QKV_GIVEN[name] for name in ("t.q", "t.k", "t.norm")})
    assert caught.value.details == {"holes": ["t.qkv"]}
    assert store.tags(qkv) == before
    stored_as(store, qkv, QKV_STORED)


def test_a_rule_that_matched_nothing_fails_the_commit(store: ws.Store, qkv: str) -> None:
    before = store.tags(qkv)
    strict = QKV.drop("lora").rename("gamma", "weight", optional=True)
    with pytest.raises(
        CoverageError, match=r"of 3 name rules 1 matched nothing \(drop\('lora'\)\)"
    ) as caught:
        with store.refit(qkv, names=strict) as refit:
            refit.put_many(QKV_GIVEN)
    assert caught.value.details == {"unused": ["drop('lora')"]}
    assert store.tags(qkv) == before
    refit = store.refit(qkv, names=strict)
    refit.put_many(QKV_GIVEN)
    with pytest.raises(CoverageError):
        refit.commit()
    refit.put("a.lora", torch.ones(1))  # the refit is still open, and this is what it lacked
    refit.commit()
    stored_as(store, qkv, QKV_LANDED)


def test_a_partial_refit_may_leave_rules_unused_but_not_everything(store: ws.Store, qkv: str) -> None:
    names = QKV.drop("lora")
    with store.refit(qkv, names=names, partial=True) as refit:
        assert refit.plan({"t.norm": torch.ones(3)}).ok
        refit.put("t.norm", torch.ones(3))
    stored_as(store, qkv, {**QKV_STORED, "t.norm": torch.ones(3)})
    before = store.tags(qkv)
    for tensors, says in [
        ({}, "none was given"),
        ({"t.lora": torch.ones(1)}, "all 1 tensors given are dropped"),
    ]:
        with pytest.raises(CoverageError, match=f"writes nothing: {says}"):
            with store.refit(qkv, names=names, partial=True) as refit:
                refit.put_many(tensors)
    assert store.tags(qkv) == before


def test_views_and_parts_are_of_stored_tensors(store: ws.Store, qkv: str) -> None:
    with store.refit(qkv, names=QKV) as refit:
        refit.put_part("t.qkv", QKV_GIVEN["t.q"], at=(0, 0))
        refit.put_many({"t.k": QKV_GIVEN["t.k"], "t.v": QKV_GIVEN["t.v"]})
        refit.view("t.norm").copy_(QKV_GIVEN["t.norm"])
    stored_as(store, qkv, QKV_LANDED)


def test_arrays_and_strided_tensors_are_pieces_too(store: ws.Store, qkv: str) -> None:
    class OnlyDlpack:
        def __init__(self, tensor: torch.Tensor) -> None:
            self._tensor = tensor

        def __dlpack__(self, **options: object) -> object:
            return self._tensor.__dlpack__(**options)

        def __dlpack_device__(self) -> object:
            return self._tensor.__dlpack_device__()

    with store.refit(qkv, names=QKV) as refit:
        refit.put_many(
            {
                "t.q": QKV_GIVEN["t.q"].numpy(),
                "t.k": QKV_GIVEN["t.k"].T.contiguous().T,
                "t.v": OnlyDlpack(QKV_GIVEN["t.v"]),
                "t.norm": np.ones(3, np.float32),
            }
        )
    stored_as(store, qkv, QKV_LANDED)


def test_meta_tensors_can_be_planned_and_not_put(store: ws.Store, qkv: str) -> None:
    on_meta = {name: tensor.to("meta") for name, tensor in QKV_GIVEN.items()}
    with store.refit(qkv, names=QKV) as refit:
        assert refit.plan(on_meta).ok
        with pytest.raises(InvalidTensor, match="meta"):
            refit.put_many(on_meta)
        refit.put_many(QKV_GIVEN)
    stored_as(store, qkv, QKV_LANDED)


def test_a_plan_without_a_map_is_about_names_as_they_are(store: ws.Store, qkv: str) -> None:
    refit = store.refit(qkv)
    assert refit.plan(QKV_LANDED).ok
    assert not refit.plan({f"module.{name}": tensor for name, tensor in QKV_LANDED.items()}).ok
    assert refit.plan({"qkv": torch.zeros(6, 2), "norm": torch.zeros(3)}, prefix="t.").ok
    refit.abort()


def test_what_is_tied_stays_tied(store: ws.Store) -> None:
    shared = torch.randn(2, 2)
    block = {f"{n}": torch.randn(2, 2) for n in "qkv"}
    given = {f"{block_name}.{n}": block[n] for block_name in ("a", "b") for n in "qkv"}
    given |= {"a.embed": shared, "b.embed": shared}
    with store.refit("tied", fresh=True) as refit:
        whole = torch.zeros(6, 2)
        table = torch.zeros(2, 2)
        refit.put_many({"t.a.qkv": whole, "t.b.qkv": whole, "t.a.embed": table, "t.b.embed": table})
    with store.refit("tied", names=NameMap(prefix="t.").fuse(["q", "k", "v"], "qkv")) as refit:
        assert refit.plan(given).ok
        refit.put_many(given)
    fused = torch.cat(list(block.values()))
    stored_as(store, "tied", {"t.a.qkv": fused, "t.b.qkv": fused, "t.a.embed": shared, "t.b.embed": shared})
    with store.lease("tied") as snapshot:
        assert snapshot.records["t.a.qkv"].extent == snapshot.records["t.b.qkv"].extent
    unlike = {**given, "b.k": torch.randn(2, 2)}
    with pytest.raises(CoverageError) as caught:
        with store.refit("tied", names=NameMap(prefix="t.").fuse(["q", "k", "v"], "qkv")) as refit:
            refit.put_many(unlike)
    assert caught.value.details == {"overlapping": ["t.b.qkv"]}


def test_two_experts_go_through_one_map(store: ws.Store) -> None:
    given = {f"module.{i}.{n}.weight": torch.randn(2, 3) for i in range(2) for n in "qkv"}
    expected = {"vae.conv": torch.zeros(4)}
    for component in ("transformer", "transformer_2"):
        for i in range(2):
            pieces = [given[f"module.{i}.{n}.weight"] for n in "qkv"]
            expected[f"{component}.{i}.qkv.weight"] = torch.cat(pieces)
    publish(store, "wan", expected)
    with store.lease("wan") as snapshot:
        before = snapshot.records["vae.conv"].extent
    with store.refit("wan", components=["transformer", "transformer_2"], names=QKV) as refit:
        for component in ("transformer", "transformer_2"):
            refit.put_many({f"{component}.{name}": tensor for name, tensor in given.items()})
    stored_as(store, "wan", expected)
    with store.lease("wan") as snapshot:
        assert snapshot.records["vae.conv"].extent == before
    with pytest.raises(CoverageError) as caught:
        with store.refit("wan", components=["transformer"], names=QKV) as refit:
            refit.put_many({f"transformer_2.{name}": tensor for name, tensor in given.items()})
    assert set(caught.value.details) == {"undeclared"}
    assert "would match" not in caught.value.message
    with pytest.raises(
        CoverageError, match=r"; 6 would match with prefix='transformer\.'; nothing was"
    ) as caught:
        with store.refit("wan", components=["transformer"], names=QKV) as refit:
            refit.put_many(given)
    assert set(caught.value.details) == {"undeclared"}


def test_ranks_of_a_shared_refit_may_each_put_what_some_rules_are_not_about(
    store: ws.Store, qkv: str
) -> None:
    with ws.connect(store.socket) as other:
        shared = {"key": "step", "world_size": 2, "names": QKV}
        first = store.refit(qkv, rank=0, **shared)  # type: ignore[arg-type]
        second = other.refit(qkv, rank=1, **shared)  # type: ignore[arg-type]
        first.put("t.norm", QKV_GIVEN["t.norm"])
        second.put_many({name: QKV_GIVEN[name] for name in ("t.q", "t.k", "t.v")})
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(2) as pool:
            numbers = [pool.submit(refit.commit) for refit in (first, second)]
            assert len({number.result(timeout=60) for number in numbers}) == 1
    stored_as(store, qkv, QKV_LANDED)
