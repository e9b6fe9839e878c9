"""LoRA through a real store: merged on write, and as adapters that an engine adds, with the same bits."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import adapters
import pytest
import tiny_models
import torch
from adapters import Trained, adapted_names
from hooked import Faulty, fresh_model, publish
from torch import nn

import weightstore
from engine_hooks import EngineHook, State
from engine_hooks import adapters as adding
from weightstore import NameMap
from weightstore.client import Store
from weightstore.errors import (
    AttachError,
    CastRefused,
    CoverageError,
    DeviceError,
    UnknownTag,
    UsageError,
)

PREFIX = "transformer."


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with weightstore.local_store(capacity="256MiB", window="16MiB") as store:
        yield store


@pytest.fixture
def model() -> str:
    return fresh_model()


@pytest.fixture(scope="module")
def given() -> Trained:
    return adapters.flux()


def publish_ref(store: Store, model: str, base: nn.Module, *others: str) -> int:
    """The base as `ref` and `policy`, with other tiny components beside it."""
    version = publish(store, model, {"transformer": base, **tiny_models.build(*others)}, tag="policy")
    store.tag(model, "ref", version)
    return version


def write_merged(store: Store, model: str, given: Trained, **options: Any) -> list[str]:
    with store.refit(model, tag="policy", base="ref", partial=True) as refit:
        return refit.put_lora(given.state_dict, config=given.config, prefix=PREFIX, **options)


def write_adapter(store: Store, model: str, given: Trained, **options: Any) -> list[str]:
    with store.refit(model, tag="policy", base="ref", partial=True, extend=True) as refit:
        return refit.put_adapter(given.state_dict, config=given.config, prefix=PREFIX, **options)


def weights(store: Store, model: str, tag: str = "policy") -> dict[str, torch.Tensor]:
    with store.lease(model, tag) as snapshot:
        return {name: snapshot[name].clone() for name in snapshot}


def same(module: nn.Module, other: nn.Module) -> bool:
    """Bit for bit, all of it, and what comes out of it."""
    mine, others = module.state_dict(), other.state_dict()
    return all(torch.equal(mine[n], others[n]) for n in others) and torch.equal(
        tiny_models.run_flux(module), tiny_models.run_flux(other)
    )


def engine() -> dict[str, nn.Module]:
    """Modules with other weights than anything in the store."""
    return {"transformer": tiny_models.seeded(tiny_models.flux, seed=9)}


# -- merged on write ---------------------------------------------------------------------------------


def test_merging_on_write_gives_what_peft_merges(store: Store, model: str, given: Trained) -> None:
    publish_ref(store, model, given.base, "text_encoder")
    with store.lease(model, "ref") as snapshot:
        before = dict(snapshot.records)
    names = write_merged(store, model, given)
    assert set(names) == adapted_names(given)
    with store.lease(model, "policy") as snapshot:
        moved = {n for n, record in snapshot.records.items() if record.extent != before[n].extent}
        assert moved == set(names)
        for name, expected in given.merged.state_dict().items():
            assert torch.equal(snapshot[PREFIX + name], expected), name


def test_every_step_starts_from_the_pristine_base(store: Store, model: str, given: Trained) -> None:
    publish_ref(store, model, given.base)
    for seed in (2, 3):
        write_merged(store, model, adapters.flux(seed))
    write_merged(store, model, adapters.flux(4, target_modules=["to_q"]))
    last = adapters.flux(4, target_modules=["to_q"])
    for name, expected in last.merged.state_dict().items():
        assert torch.equal(weights(store, model)[PREFIX + name], expected), name


def test_an_in_place_refit_merges_too(store: Store, model: str, given: Trained) -> None:
    # `ref` is a copy of its own: nobody else may read what is overwritten.
    publish_ref(store, model, given.base)
    publish(store, model, {"transformer": given.base}, tag="policy")
    with store.refit(model, tag="policy", in_place=True, partial=True) as refit:
        refit.put_lora(given.state_dict, config=given.config, prefix=PREFIX)
    got = weights(store, model)
    assert all(torch.equal(got[PREFIX + n], w) for n, w in given.merged.state_dict().items())


@pytest.mark.parametrize("sent", [False, True])
def test_ranks_of_a_shared_refit_write_a_share_each(
    store: Store, model: str, given: Trained, sent: bool
) -> None:
    publish_ref(store, model, given.base)
    shared: dict[str, Any] = {"base": "ref", "partial": True, "extend": sent, "key": "step", "world_size": 2}
    with (
        weightstore.connect(store.socket) as other,
        store.refit(model, tag="policy", rank=0, **shared) as first,
        other.refit(model, tag="policy", rank=1, **shared) as second,
    ):
        for refit in (first, second):
            put = refit.put_adapter if sent else refit.put_lora
            names = put(given.state_dict, config=given.config, prefix=PREFIX)
            assert set(names) == adapted_names(given)
        voting = threading.Thread(target=second.commit)
        voting.start()
        first.commit()
        voting.join()
    assert abs(first.report.tensors - second.report.tensors) <= 1
    assert first.report.tensors + second.report.tensors == len(names) * (3 if sent else 1)
    modules = engine()
    with EngineHook.attach(store, model, modules, tag="policy") as hook:
        assert hook.attached.merged == (len(names) if sent else 0)
        assert same(modules["transformer"], given.merged)


def test_float16_that_overflows_is_refused(store: Store, model: str) -> None:
    given = adapters.flux(dtype=torch.float16, lora_alpha=1e7)
    publish_ref(store, model, given.base)
    with pytest.raises(CastRefused, match=r"exceed the largest float16; is its scale of 2\.5e"):
        write_merged(store, model, given)


# -- names -------------------------------------------------------------------------------------------


def test_a_lora_that_matches_nothing_is_an_error_with_close_names(
    store: Store, model: str, given: Trained
) -> None:
    publish_ref(store, model, given.base)
    with store.refit(model, tag="policy", partial=True) as refit:
        with pytest.raises(CoverageError, match=r"would match with prefix='transformer\.'") as caught:
            refit.put_lora(given.state_dict, config=given.config)
        assert len(caught.value.details["unknown"]) == len(adapted_names(given))
        odd = {name.replace("to_q", "to_qq"): value for name, value in given.state_dict.items()}
        with pytest.raises(CoverageError, match=r"to_qq\.weight: perhaps transformer\..*to_q\.weight\?"):
            refit.put_lora(odd, config=given.config, prefix=PREFIX)
        grown = {
            name: value.repeat(2, 1) if "to_q.lora_B" in name else value
            for name, value in given.state_dict.items()
        }
        with pytest.raises(CoverageError, match=r"\[64, 32\], stored \[32, 32\]"):
            refit.put_lora(grown, config=given.config, prefix=PREFIX)
        refit.abort()


def test_components_that_the_refit_does_not_declare(store: Store, model: str, given: Trained) -> None:
    publish_ref(store, model, given.base, "text_encoder")
    with store.refit(model, tag="policy", components=["text_encoder"], partial=True) as refit:
        with pytest.raises(CoverageError, match="undeclared"):
            refit.put_lora(given.state_dict, config=given.config, prefix=PREFIX)
        refit.abort()


def fuse_qkv(base: nn.Module) -> tuple[dict[str, torch.Tensor], NameMap]:
    """The base's weights with q, k and v of each attention as one tensor, as engines store them."""
    names = NameMap(prefix=PREFIX).fuse(["attn.to_q", "attn.to_k", "attn.to_v"], "attn.to_qkv")
    fused = {}
    for name, tensor in base.state_dict().items():
        if ".to_q." in name:
            parts = [base.state_dict()[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
            fused[PREFIX + name.replace("to_q", "to_qkv")] = torch.cat(parts)
        elif ".to_k." not in name and ".to_v." not in name:
            fused[PREFIX + name] = tensor
    return fused, names


@pytest.mark.parametrize("alphas", [{}, {"to_v": 3}])
@pytest.mark.parametrize("targets", [["to_q", "to_k", "to_v"], ["to_q", "to_v"]])
def test_adapters_of_q_k_and_v_reach_a_fused_weight(
    store: Store, model: str, targets: list[str], alphas: dict[str, int]
) -> None:
    given = adapters.flux(target_modules=targets, alpha_pattern=alphas, rank_pattern={"to_v": 2})
    fused, names = fuse_qkv(given.base)
    expected, _ = fuse_qkv(given.merged)
    with store.refit(model, tag="ref") as refit:
        refit.put_many(fused)
    with store.refit(model, tag="policy", base="ref", partial=True, names=names) as refit:
        refit.put_lora(given.state_dict, config=given.config)
    merged = weights(store, model)
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(merged[name], tensor, rtol=1e-6, atol=1e-6), name
    assert any(not torch.equal(merged[name], fused[name]) for name in fused)

    with store.refit(model, tag="policy", base="ref", partial=True, extend=True, names=names) as refit:
        refit.put_adapter(given.state_dict, config=given.config)
    holder = Holder({name: torch.zeros_like(tensor) for name, tensor in fused.items()})
    with EngineHook.attach(store, model, {"transformer": holder}, tag="policy") as hook:
        assert hook.attached.merged == sum(".to_qkv.weight" in name for name in fused)
        for name, tensor in holder.state_dict().items():
            assert torch.equal(tensor, merged[PREFIX + name]), name
        assert hook.verify().ok


class Holder(nn.Module):
    """Parameters under dotted names, as an engine with modules of its own has them."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *path, last = name.removeprefix(PREFIX).split(".")
            holder: nn.Module = self
            for part in path:
                if part not in holder._modules:
                    holder.add_module(part, nn.Module())
                holder = holder.get_submodule(part)
            holder.register_parameter(last, nn.Parameter(tensor, requires_grad=False))


def test_a_fused_weight_in_the_trainer_is_split_in_the_store(store: Store, model: str) -> None:
    torch.manual_seed(0)
    base = nn.Sequential()
    base.add_module("to_qkv", nn.Linear(6, 12, bias=False))
    given = adapters.trained(base, adapters.lora(target_modules=["to_qkv"]))
    names = NameMap(prefix="net.").split("to_qkv", ["to_q", "to_k", "to_v"])
    with store.refit(model, tag="ref", names=names) as refit:
        refit.put_many(base.state_dict())
    with store.refit(model, tag="policy", base="ref", partial=True, names=names) as refit:
        refit.put_lora(given.state_dict, config=given.config)
    got = weights(store, model)
    whole = torch.cat([got[f"net.to_{part}.weight"] for part in "qkv"])
    assert torch.allclose(whole, given.merged.state_dict()["to_qkv.weight"], rtol=1e-6, atol=1e-6)
    assert not torch.equal(whole, base.state_dict()["to_qkv.weight"])


def test_quantised_weights_are_refused(store: Store, model: str, given: Trained) -> None:
    tensors = {PREFIX + n: t.to(torch.float8_e4m3fn) for n, t in given.base.state_dict().items()}
    with store.refit(model, tag="ref") as refit:
        refit.put_many(tensors)
    with store.refit(model, tag="policy", base="ref", partial=True) as refit:
        with pytest.raises(CoverageError, match="stored as float8_e4m3fn, to which nothing can be added"):
            refit.put_lora(given.state_dict, config=given.config, prefix=PREFIX)
        refit.abort()


# -- what would add an adapter twice -----------------------------------------------------------------


def test_no_ref_is_told(store: Store, model: str, given: Trained) -> None:
    publish(store, model, {"transformer": given.base})
    with store.refit(model, partial=True) as refit:
        with pytest.raises(UnknownTag, match="ref"):
            refit.put_lora(given.state_dict, config=given.config, prefix=PREFIX)
        refit.abort()


def test_adapters_are_never_added_to_sums_or_beside_others(store: Store, model: str, given: Trained) -> None:
    publish_ref(store, model, given.base)
    write_adapter(store, model, given)
    only_q = adapters.flux(2, target_modules=["to_q"])
    arguments: dict[str, Any] = {"config": only_q.config, "prefix": PREFIX}
    with store.refit(model, tag="policy", partial=True, extend=True) as refit:
        with pytest.raises(UsageError, match=r"has \d+ adapter tensors") as caught:
            refit.put_lora(only_q.state_dict, **arguments)
        assert all(name.startswith("lora.float32.transformer.") for name in caught.value.details["adapters"])
        with pytest.raises(UsageError, match="would be added as well"):
            refit.put_adapter(only_q.state_dict, **arguments)
        with pytest.raises(UsageError, match="no pristine base"):
            refit.put_lora(only_q.state_dict, base_tag="policy", **arguments)
        # The same modules again take the place of the old ones.
        refit.put_adapter(adapters.flux(3).state_dict, config=given.config, prefix=PREFIX)
    with store.refit(model, tag="policy", base="ref", partial=True) as refit:
        with pytest.raises(UsageError, match="partial=True, extend=True"):
            refit.put_adapter(only_q.state_dict, **arguments)
        refit.abort()


# -- added by the engine -----------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_give_the_same_bits(
    store: Store, model: str, stored: torch.dtype, dtype: torch.dtype
) -> None:
    given = adapters.flux(dtype=stored)
    publish_ref(store, model, given.base)
    write_merged(store, model, given, dtype=dtype)
    merged = weights(store, model)
    expected = copy.deepcopy(given.base)
    expected.load_state_dict({n: merged[PREFIX + n] for n in given.base.state_dict()})
    write_adapter(store, model, given, dtype=dtype)
    modules = {"transformer": copy.deepcopy(given.base)}
    with EngineHook.attach(store, model, modules, tag="policy") as hook:
        assert hook.attached.merged == len(adapted_names(given))
        assert same(modules["transformer"], expected)
        if dtype is torch.float32:
            assert same(modules["transformer"], given.merged)
        assert hook.verify().ok


def test_an_engine_adds_adapters_at_refit_and_wake(store: Store, model: str, given: Trained) -> None:
    publish_ref(store, model, given.base, "text_encoder")
    modules = engine() | tiny_models.build("text_encoder")
    module = modules["transformer"]
    second = adapters.flux(2, target_modules=["to_q", "to_k"])
    with EngineHook.attach(store, model, modules, tag="policy") as hook:
        assert hook.attached.merged == 0
        assert same(module, given.base)
        where = {n: p.data_ptr() for n, p in module.named_parameters()}

        names = write_adapter(store, model, given)
        report = hook.refit()
        assert set(report.changed) == set(names)
        assert report.merged == len(names)
        assert same(module, given.merged)
        assert (hook.verify().ok, hook.verify().recomputed) == (True, len(names))

        hook.sleep()
        woken = hook.wake()
        assert (woken.merged, woken.changed) == (len(names), ())
        assert same(module, given.merged)

        # The next step adapts fewer modules: the others are the base's again.
        fewer = write_adapter(store, model, second)
        report = hook.refit()
        assert set(report.changed) == set(names)
        assert report.merged == len(fewer) < len(names)
        assert same(module, second.merged)

        hook.sleep()
        write_adapter(store, model, given)
        assert hook.wake().merged == len(names)
        assert same(module, given.merged)

        # A version without adapters after one with: the base's weights again.
        store.tag(model, "policy", "ref")
        report = hook.refit()
        assert set(report.changed) == set(names)
        assert report.merged == 0
        assert same(module, given.base)
        assert hook.verify().ok
        assert {n: p.data_ptr() for n, p in module.named_parameters()} == where


def test_components_that_slept_through_adapters_catch_up(store: Store, model: str, given: Trained) -> None:
    publish_ref(store, model, given.base, "text_encoder")
    modules = engine() | tiny_models.build("text_encoder")
    with EngineHook.attach(store, model, modules, tag="policy") as hook:
        hook.sleep(tags=["transformer"])
        names = write_adapter(store, model, given)
        assert hook.refit().changed == ()
        woken = hook.wake()
        assert set(woken.changed) == set(names)
        assert same(modules["transformer"], given.merged)


def test_the_arena_holds_only_a_b_and_scale_more(store: Store, model: str, given: Trained) -> None:
    publish_ref(store, model, given.base)
    with store.lease(model, "ref") as snapshot:
        before = dict(snapshot.records)
    write_adapter(store, model, given)
    with store.lease(model, "policy") as snapshot:
        new = {n: r for n, r in snapshot.records.items() if n not in before}
        assert {n: snapshot.records[n] for n in before} == before
        assert len(new) == 3 * len(adapted_names(given))
        assert sum(r.nbytes for r in new.values()) < 0.2 * sum(r.nbytes for r in before.values())


def test_verify_finds_what_is_not_the_sum(store: Store, model: str, given: Trained) -> None:
    publish_ref(store, model, given.base)
    names = write_adapter(store, model, given)
    modules = engine()
    with EngineHook.attach(store, model, modules, tag="policy") as hook:
        adapted, plain = sorted(names)[0], "transformer.x_embedder.weight"
        with torch.no_grad():
            for name in (adapted, plain):
                parameter = modules["transformer"].get_parameter(name.removeprefix(PREFIX))
                bits = parameter.view(torch.int32)
                bits[0, 0] ^= 1
        assert set(hook.verify().differing) == {adapted, plain}
        hook.sleep()
        hook.wake()
        assert hook.verify().ok


def test_a_refit_that_fails_while_adding_leaves_broken_until_a_wake(
    store: Store, model: str, given: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_ref(store, model, given.base)
    modules = engine()
    with EngineHook.attach(store, model, modules, tag="policy") as hook:
        write_adapter(store, model, given)
        done = 0

        def failing(*arguments: Any) -> None:
            nonlocal done
            done += 1
            if done == 3:
                raise DeviceError("the device is tired")
            merge(*arguments)

        merge = adding.merge
        monkeypatch.setattr(adding, "merge", failing)
        with pytest.raises(DeviceError, match="tired"):
            hook.refit()
        assert hook.state is State.BROKEN
        done = 0
        with pytest.raises(DeviceError, match="tired"):
            hook.wake()
        assert hook.state is State.BROKEN
        monkeypatch.undo()
        hook.wake()
        assert same(modules["transformer"], given.merged)


def test_a_failed_attach_leaves_the_modules_alone(store: Store, model: str, given: Trained) -> None:
    publish_ref(store, model, given.base)
    write_adapter(store, model, given)
    backend = Faulty()
    backend.fail["wake"] = 1
    modules = engine()
    expected = tiny_models.run_flux(modules["transformer"])
    with pytest.raises(DeviceError):
        EngineHook.attach(store, model, modules, tag="policy", backend=backend)
    assert torch.equal(tiny_models.run_flux(modules["transformer"]), expected)


def test_weights_that_an_engine_lacks_on_purpose_need_no_adapter(
    store: Store, model: str, given: Trained
) -> None:
    publish_ref(store, model, given.base, "text_encoder")
    write_adapter(store, model, given)
    encoder = tiny_models.build("text_encoder", seed=4)
    with EngineHook.attach(store, model, encoder, tag="policy") as hook:
        assert hook.attached.merged == 0
        assert hook.verify().ok


def test_adapters_that_fit_nothing_are_refused_with_reasons(store: Store, model: str, given: Trained) -> None:
    publish_ref(store, model, given.base)
    modules = engine()
    name = "transformer.x_embedder.weight"
    bad = {
        f"lora.float32.{name}.A": torch.ones(2, 5),
        f"lora.float32.{name}.B": torch.ones(32, 2),
        f"lora.float32.{name}.scale": torch.tensor(1.0, dtype=torch.float64),
        "lora.float32.transformer.nothing.weight.A": torch.ones(2, 5),
        "lora.int8.odd": torch.ones(1),
    }
    with EngineHook.attach(store, model, modules, tag="policy") as hook:
        with store.refit(model, tag="policy", base="ref", partial=True, extend=True) as refit:
            refit.put_many(bad)
        with pytest.raises(AttachError) as caught:
            hook.refit()
        reasons = "\n".join(caught.value.details["reasons"])
        assert "B·A is [32, 5], stored [32, 4]" in reasons
        assert "transformer.nothing.weight lacks its B and scale" in reasons
        assert "lora.int8.odd is not named" in reasons
        assert same(modules["transformer"], given.base)
    with pytest.raises(AttachError, match="does not fit this engine"):
        EngineHook.attach(store, model, engine(), tag="policy")


def test_the_name_of_the_adapters_component_is_taken(store: Store, model: str) -> None:
    with pytest.raises(AttachError, match="'lora' is taken"):
        EngineHook.attach(store, model, {"lora": nn.Linear(2, 2)})
