"""CUDA tensors that are cast, compared or sharded on their way into a real store."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch

from weightstore.client import Store
from weightstore.cuda.upload import SCRATCH
from weightstore.errors import CastRefused
from weightstore.local import local_store
from weightstore.tensors import same_bits

sys.path.append(str(Path(__file__).parent.parent))  # for the harness of ranks, beside the other tests

from ranks import Zygote

MIB = 1 << 20
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2)


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with local_store("3GiB", window="256MiB") as store:
        yield store


_made = count()


@pytest.fixture
def model(store: Store) -> Iterator[str]:
    name = f"m{next(_made)}"
    yield name
    if name in store.models():
        store.remove_model(name)


def rise_of_memory(before: int) -> int:
    return torch.cuda.max_memory_allocated() - before


def memory_now() -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


# -- casts ----------------------------------------------------------------------------------------------


def test_casts_are_torchs_own_on_the_gpu(store: Store, model: str) -> None:
    values = torch.cat([torch.randn(100_003), torch.tensor([0.0, -0.0, 1e-8, 1e-45, 300.0])]).cuda()
    given = {f"t.{a}.{b}": values.to(a) for a in FLOATS for b in FLOATS if a != b}
    given["t.turned.bf16"] = torch.randn(300, 500, 7, device="cuda").permute(2, 0, 1)
    stored = {name: next((d for d in FLOATS if name.endswith(str(d))), torch.bfloat16) for name in given}
    with store.refit(model) as refit:
        refit.put_many({name: torch.zeros(t.shape, dtype=stored[name]) for name, t in given.items()})
    with store.refit(model) as refit:
        refit.put_many(given)
    with store.lease(model) as snapshot:
        for name, tensor in given.items():
            assert same_bits(snapshot[name], tensor.to(stored[name]).cpu()), name


def test_a_master_copy_is_cast_with_bounded_scratch(store: Store, model: str) -> None:
    with store.refit(model) as refit:
        refit.put("t.w", torch.zeros(256 * MIB, dtype=torch.bfloat16))
    master = torch.randn(256 * MIB, device="cuda")
    for _ in range(2):
        before = memory_now()
        with store.refit(model) as refit:
            refit.put("t.w", master)
        assert rise_of_memory(before) <= 2 * SCRATCH + MIB
    with store.lease(model) as snapshot:
        assert torch.equal(snapshot["t.w"][::1001], master[::1001].bfloat16().cpu())


def test_overflow_is_found_on_the_gpu(store: Store, model: str) -> None:
    with store.refit(model) as refit:
        refit.put_many({f"t.{i}": torch.zeros(1000, 1000).half() for i in range(4)})
    good = torch.randn(1000, 1000, device="cuda")
    odd = good.clone()
    odd[3, 3], odd[4, 4] = math.nan, math.inf
    large = good.clone()
    large[999, 999] = -7e4
    both = odd.clone()
    both[0, 0] = 1e5
    refit = store.refit(model)
    with pytest.raises(CastRefused) as caught:
        refit.put_many({"t.0": good, "t.1": odd, "t.2": large, "t.3": both})
    assert caught.value.details["overflow"] == {"t.2": -7e4, "t.3": 1e5}
    refit.put_many({"t.0": good, "t.1": odd, "t.2": good, "t.3": odd})
    refit.commit()


# -- unchanged ------------------------------------------------------------------------------------------


def test_changes_are_found_wherever_they_are(store: Store, model: str) -> None:
    base = torch.randn(40 * MIB, device="cuda").view(-1, 1024)
    image = torch.randn(4, 30, 20, 64, device="cuda").to(memory_format=torch.channels_last)
    names = [f"t.{i}" for i in range(4)]
    tensors = dict.fromkeys(names, base) | {"t.image": image, "t.cast": base.bfloat16()}
    tensors |= {"t.scalar": torch.tensor(3.5, device="cuda"), "t.empty": torch.empty(0, 3, device="cuda")}
    with store.refit(model) as refit:
        refit.put_many({name: tensor.clone() for name, tensor in tensors.items()})
    last, first, nan = base.clone(), base.clone(), base.clone()
    last[-1, -1] += 1
    first[0, 0] = -first[0, 0]
    nan[20_000, 5] = math.nan
    given = tensors | {"t.1": last, "t.2": first, "t.3": nan, "t.image": image.contiguous(), "t.cast": base}
    before = memory_now()
    with store.refit(model, skip_unchanged=True) as refit:
        refit.put_many(given)
    # Two slots, and what comparing one of them takes: a cast of it and a mask.
    assert rise_of_memory(before) <= 6 * SCRATCH
    assert (refit.report.tensors, refit.report.unchanged) == (3, 5)
    with store.lease(model) as snapshot:
        for name, tensor in given.items():
            assert same_bits(snapshot[name], tensor.to(snapshot[name].dtype).cpu()), name


def test_what_is_still_being_computed_is_compared_as_it_will_be(store: Store, model: str) -> None:
    weight = torch.zeros(8 * MIB, device="cuda")
    with store.refit(model) as refit:
        refit.put("t.w", weight)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        weight.add_(1)
        with store.refit(model, skip_unchanged=True) as refit:
            refit.put("t.w", weight)
    assert refit.report.unchanged == 0
    with store.lease(model) as snapshot:
        assert bool((snapshot["t.w"] == 1).all())


# -- two GPUs -------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", ["fsdp", "mixed", "ddp"])
def test_two_gpus_write_one_model(store: Store, model: str, tmp_path: Path, kind: str) -> None:
    from safetensors.torch import load_file

    from weightstore.names import NameMap

    reference = tmp_path / "whole.safetensors"
    options = {"prefix": "", "names": NameMap(prefix="t.").to_json()} if kind == "ddp" else {}
    with Zygote(tmp_path) as zygote, zygote.group(2, store.socket, "cuda") as group:
        group.all("build", kind=kind)
        for version in (1, 2):
            group.all("train")
            reports = group.all("write", model=model, **options)
            assert [report["version"] for report in reports] == [version] * 2
            assert [report["collectives"] for report in reports] == [0, 0]
            group.all("save", path=str(reference))
            with store.lease(model) as snapshot:
                for name, tensor in load_file(reference).items():
                    assert same_bits(snapshot[f"t.{name}"], tensor), name
