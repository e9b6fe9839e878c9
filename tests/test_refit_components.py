"""Refitting the trained components of a real model leaves the frozen ones where they are."""

from __future__ import annotations

import pytest
import torch

from bench import manifests
from weightstore.errors import UnknownModel, UnknownTag
from weightstore.local import local_store
from weightstore.tensors import DTYPES


def test_both_experts_of_wan_move_and_nothing_else_does() -> None:
    """Wan2.2 has two trained transformers. Every one of its tensors, by its real name, dtype and number of
    dimensions; sizes are cut to fit a test."""
    specs = manifests.load("wan2.2-t2v-a14b")
    tensors = {
        spec.name: torch.full([min(n, 3) for n in spec.shape], 1, dtype=DTYPES[spec.dtype])
        for spec in specs
        if spec.alias_of is None
    }
    experts = ("transformer.", "transformer_2.")
    trained = {name: tensor + 1 for name, tensor in tensors.items() if name.startswith(experts)}
    assert (len(trained), len(tensors)) == (2 * 1095, 2626)
    with local_store("64MiB", window="16MiB") as store:
        with store.refit("wan", fresh=True) as refit:
            refit.put_many(tensors)
        with store.lease("wan") as first:
            before = {name: record.extent for name, record in first.records.items()}
        with store.refit("wan", components=["transformer", "transformer_2"]) as refit:
            refit.put_many(trained)
        with store.lease("wan") as second:
            after = {name: record.extent for name, record in second.records.items()}
            moved = {name for name in before if after[name] != before[name]}
            assert moved == trained.keys()
            assert all(torch.equal(second[name], trained.get(name, tensors[name])) for name in tensors)


def test_components_of_a_mistyped_model_are_refused() -> None:
    with local_store("16MiB", window="1MiB") as store:
        with store.refit("flux1-dev") as refit:
            refit.put("transformer.w", torch.ones(4))
        with pytest.raises(UnknownModel, match=r"no model 'flux1_dev'; did you mean 'flux1-dev'.*fresh=True"):
            store.refit("flux1_dev", components=["transformer"])
        assert store.models() == ["flux1-dev"] and not store.status().refits
        with store.refit("lora-only", components=["lora"], fresh=True) as refit:
            refit.put("lora.w", torch.ones(4))
        assert store.tags("lora-only") == {"latest": 1}
        with store.lease("flux1-dev"):
            store.remove_model("flux1-dev")  # what is leased stays, and is no base
            with pytest.raises(UnknownTag, match=r"no tag of model 'flux1-dev' is left.*fresh=True"):
                store.refit("flux1-dev", components=["transformer"])
