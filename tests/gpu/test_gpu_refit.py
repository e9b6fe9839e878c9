"""A trainer's CUDA tensors through a real store: what is committed is what was put."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from engine_hooks import EngineHook
from weightstore.client import Store
from weightstore.cuda import driver, upload
from weightstore.cuda.pinning import PinnedArena, Window
from weightstore.cuda.uploads import uploads_into
from weightstore.errors import CoverageError, DeviceError
from weightstore.local import local_store
from weightstore.tensors import same_bits

MIB = 1 << 20


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with local_store("1GiB", window="64MiB") as store:
        yield store


def committed(store: Store, model: str, name: str) -> torch.Tensor:
    with store.lease(model) as snapshot:
        return snapshot[name].clone()


def test_put_of_many_layouts_and_dtypes(store: Store) -> None:
    base = torch.randn(6, 20, 30, 40, device="cuda")
    sources = {
        "a.plain": base,
        "a.transposed": base.permute(3, 1, 0, 2),
        "a.every_second": base[::2, :, ::2],
        "a.channels_last": base.to(memory_format=torch.channels_last),
        "a.half": base.half(),
        "a.bfloat16": base.bfloat16(),
        "a.fp8": base.to(torch.float8_e5m2),
        "a.complex": torch.view_as_complex(torch.randn(7, 2, device="cuda")).conj(),
        "a.bool": base > 0,
        "a.scalar": torch.tensor(7, device="cuda"),
        "a.empty": torch.empty(0, 5, device="cuda"),
        "a.large": torch.randn(30 * MIB, device="cuda"),
        "a.host": torch.randn(100),
    }
    with store.refit("layouts") as refit:
        refit.put_many(sources)
    with store.lease("layouts") as snapshot:
        for name, source in sources.items():
            found = snapshot[name]
            assert found.dtype == source.dtype
            assert same_bits(found, source.resolve_conj()), name


def test_hundreds_of_tensors_go_out_while_the_next_are_looked_at(store: Store) -> None:
    def made(seed: float) -> dict[str, torch.Tensor]:
        return {f"t.w{i}": torch.full((1000 + i,), seed + i, device="cuda") for i in range(700)}

    for seed in (0.0, 1.0):
        with store.refit("hundreds") as refit:
            refit.put_many(made(seed))
    with store.refit("hundreds") as refit:
        with pytest.raises(CoverageError) as caught:
            refit.put_many({**made(5.0), "t.late": torch.ones(3, device="cuda")})
        assert caught.value.details == {"unknown": ["t.late"]}
        with pytest.raises(CoverageError, match="700 missing"):
            refit.commit()
        expected = made(2.0)
        refit.put_many(expected)
    with store.lease("hundreds") as snapshot:
        assert all(torch.equal(snapshot[name], tensor.cpu()) for name, tensor in expected.items())


def test_a_source_may_be_overwritten_in_stream_order(store: Store) -> None:
    buffer = torch.empty(20 * MIB, device="cuda")
    side = torch.cuda.Stream()
    for stream in (torch.cuda.current_stream(), side):
        with torch.cuda.stream(stream), store.refit("reuse", fresh=True) as refit:
            for i in range(5):
                buffer.fill_(i)
                refit.put(f"a.{i}", buffer)
            buffer.fill_(-1)
        with store.lease("reuse") as snapshot:
            for i in range(5):
                assert bool((snapshot[f"a.{i}"] == i).all())
        torch.cuda.synchronize()


def test_parts_from_ranks_land_in_their_boxes(store: Store) -> None:
    whole = torch.randn(300, 512, device="cuda")
    with store.refit("parts") as refit:
        refit.put("a.w", torch.zeros_like(whole))
    with store.refit("parts") as refit:
        refit.put_part("a.w", whole[:100], (0, 0))
        refit.put_part("a.w", whole[100:, :37], (100, 0))
        refit.put_part("a.w", whole[100:, 37:].t().contiguous().t(), (100, 37))
    assert torch.equal(committed(store, "parts", "a.w"), whole.cpu())


def test_pinned_windows_stay_pinned_from_refit_to_refit(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered: list[Window] = []
    register = PinnedArena._register

    def counting(self: PinnedArena, window: Window) -> None:
        registered.append(window)
        register(self, window)

    monkeypatch.setattr(PinnedArena, "_register", counting)
    weight = torch.randn(10 * MIB, device="cuda")
    for _ in range(6):
        with store.refit("steady") as refit:
            refit.put("a.w", weight)
    assert len(registered) == len(set(registered))


def test_a_failed_copy_fails_the_commit(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.ones(1000, device="cuda")
    with store.refit("failing") as refit:
        refit.put("a.w", weight)
    before = store.tags("failing")
    refit = store.refit("failing")
    refit.put("a.w", weight * 2)

    def fail(self: upload.Uploader) -> None:
        raise DeviceError("cuStreamSynchronize failed: CUDA_ERROR_LAUNCH_FAILED")

    with monkeypatch.context() as patch:
        patch.setattr(upload.Uploader, "drain", fail)
        with pytest.raises(DeviceError, match="LAUNCH_FAILED"):
            refit.commit()
    assert store.tags("failing") == before
    assert bool((committed(store, "failing", "a.w") == 1).all())


def test_without_bindings_torch_copies_and_says_so(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise DeviceError("no bindings")

    weight = torch.randn(1000, device="cuda")
    with local_store("256MiB", window="64MiB") as other, caplog.at_level(logging.WARNING):
        monkeypatch.setattr(upload.Uploader, "__init__", refuse)
        for _ in range(2):
            with other.refit("slow") as refit:
                refit.put("a.w", weight)
        assert torch.equal(committed(other, "slow", "a.w"), weight.cpu())
    assert [r.message for r in caplog.records if "copied by torch" in r.message] == [
        "tensors on cuda:0 are copied by torch, slower than the link: no bindings"
    ]


def test_prepare_pins_both_places_ahead() -> None:
    def made(value: float) -> dict[str, torch.Tensor]:
        return {f"t.w{i}": torch.full((20 * MIB,), value, device="cuda") for i in range(3)}

    with local_store("1GiB", window="64MiB") as store:
        with store.refit("m") as refit:
            refit.put_many({name: tensor.cpu() for name, tensor in made(1.0).items()})
        store.prepare("m", components=["t"], device="cuda")
        with store.refit("m", components=["t"]) as refit:
            arena = PinnedArena.share(refit.mapping, driver.device(0))
            uploads_into(refit.mapping)._uploaders[torch.device("cuda", 0)]._arena.settle()  # type: ignore[union-attr]
            pinned = arena.pinned_bytes
            assert pinned >= 480 * MIB
            refit.put_many(made(2.0))
        with store.refit("m", components=["t"]) as refit:
            refit.put_many(made(3.0))
        assert arena.pinned_bytes == pinned
        arena.close()
        with store.lease("m") as snapshot:
            assert all(bool((snapshot[name] == 3).all()) for name in made(0.0))


def test_an_engine_pins_the_next_place_before_it_wakes_on_it() -> None:
    module = nn.Linear(20 * MIB, 4, bias=False, device="meta")
    weight = torch.full((4, 20 * MIB), 2.0)
    with local_store("2GiB", window="64MiB") as store:
        with store.refit("m") as refit:
            refit.put("t.weight", torch.ones(4, 20 * MIB))
        with EngineHook.attach(store, "m", {"t": module}, device="cuda:0") as hook:
            arena = PinnedArena.share(store.mapping, driver.device(0))
            before = arena.pinned_bytes
            store.prepare("m")
            store.status()  # a round trip: what the store had told before has been heard
            hook.backend._source.arena.settle()  # type: ignore[attr-defined]
            assert arena.pinned_bytes >= before + 256 * MIB
            hook.sleep()
            with store.refit("m") as refit:
                refit.put("t.weight", weight)
            hook.wake()
            assert hook.backend.transfer.pinned_bytes == 0  # type: ignore[attr-defined]
            assert torch.equal(module.weight.cpu(), weight)
            arena.close()
