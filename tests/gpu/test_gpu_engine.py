"""An engine on a GPU, a trainer and a store, all real."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from torch import nn
from toy import WIDTH, Toy, bits, changed

from engine_hooks import EngineHook
from engine_hooks.lifecycle import State
from weightstore.client import Store
from weightstore.cuda import driver
from weightstore.cuda.pinning import PinnedArena
from weightstore.errors import DeviceMemoryError, EngineAsleep
from weightstore.layout import DATA_OFFSET, read_committed
from weightstore.local import local_store

MIB = 1 << 20


@pytest.fixture
def store() -> Iterator[Store]:
    with local_store("1GiB", window="64MiB") as store:
        yield store


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy().cuda()


def put(store: Store, values: dict[str, torch.Tensor], **options: object) -> None:
    with store.refit("toy", components=["net"], **options) as refit:
        refit.put_many({f"net.{name}": value for name, value in values.items()})


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.arange(200, device="cuda").view(2, 100)


def test_everything_survives_twenty_cycles_bit_for_bit(store: Store, toy: Toy, tokens: torch.Tensor) -> None:
    before, output = bits(toy), toy(tokens)
    with EngineHook.attach(store, "toy", {"net": toy}, device="cuda:0") as hook:
        addresses = {name: tensor.data_ptr() for name, tensor in toy.state_dict().items()}
        for _ in range(20):
            hook.sleep()
            with pytest.raises(EngineAsleep):
                toy(tokens)
            hook.wake()
        assert bits(toy) == before
        assert {name: tensor.data_ptr() for name, tensor in toy.state_dict().items()} == addresses
        assert toy.head.weight.data_ptr() == toy.embed.weight.data_ptr()
        assert torch.equal(toy(tokens), output)
        report = hook.verify()
        assert (report.differing, report.moved) == ((), ())


def test_engine_state_that_changed_comes_back_as_it_was_last(store: Store, toy: Toy) -> None:
    with EngineHook.attach(store, "toy", {"net": toy}, device="cuda:0") as hook:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(100_000_000)
            toy.calls.add_(1)
            toy.rotary.mul_(2)
        hook.sleep()
        hook.wake()
        assert int(toy.calls) == 4
        assert float(toy.rotary.abs()[0]) == 2


def test_a_cuda_graph_lives_on(store: Store, toy: Toy, tokens: torch.Tensor) -> None:
    with EngineHook.attach(store, "toy", {"net": toy}, device="cuda:0") as hook:
        warm = torch.cuda.Stream()
        with torch.cuda.stream(warm):
            for _ in range(3):
                toy(tokens)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = toy(tokens)
        graph.replay()
        torch.cuda.synchronize()
        first = out.clone()
        for _ in range(3):
            hook.sleep()
            hook.wake()
            out.zero_()
            graph.replay()
            assert torch.equal(out, first)
        put(store, changed(toy, 1), partial=True)
        hook.refit()
        graph.replay()
        torch.cuda.synchronize()
        second = out.clone()
        assert not torch.equal(second, first)
        assert torch.equal(second, toy(tokens))
        hook.sleep()
        put(store, changed_back(store), partial=True)
        hook.wake()
        graph.replay()
        assert torch.equal(out, first)


def changed_back(store: Store) -> dict[str, torch.Tensor]:
    """The seeded toy's own values, from the CPU."""
    torch.manual_seed(0)
    return {name: value for name, value in Toy().state_dict().items() if name != "head.weight"}


def test_compiled_code_is_not_compiled_again(store: Store, toy: Toy, tokens: torch.Tensor) -> None:
    with EngineHook.attach(store, "toy", {"net": toy}, device="cuda:0") as hook:
        compiled = torch.compile(toy, backend="aot_eager")
        first = compiled(tokens)
        torch._dynamo.utils.counters.clear()
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(2):
                hook.sleep()
                hook.wake()
                assert torch.equal(compiled(tokens), first)
            put(store, changed(toy, 1), partial=True)
            hook.refit()
            assert not torch.equal(compiled(tokens), first)
        assert not torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)


def test_memory_comes_back_and_does_not_creep(store: Store, tokens: torch.Tensor) -> None:
    net = nn.Linear(64 * WIDTH, 4 * WIDTH, bias=False, device="cuda", dtype=torch.bfloat16)  # 128 MiB
    weights = net.weight.nbytes
    with EngineHook.attach(store, "big", {"net": net}, device="cuda:0") as hook:
        asleep, awake = [], []
        for _ in range(50):
            report = hook.sleep()
            asleep.append(hook.backend.memory_in_use())
            assert report.freed_bytes >= 0.999 * weights
            hook.wake()
            awake.append(hook.backend.memory_in_use())
        assert max(asleep[5:]) <= asleep[5] + 2 * MIB
        assert max(awake[5:]) <= awake[5] + 2 * MIB
        assert awake[-1] - asleep[-1] <= weights + 4 * MIB


def test_too_little_memory_leaves_it_asleep_and_can_be_retried(store: Store) -> None:
    net = nn.Linear(64 * WIDTH, 4 * WIDTH, bias=False, device="cuda", dtype=torch.bfloat16)
    value = net.weight.detach().clone()
    with EngineHook.attach(store, "big", {"net": net}, device="cuda:0") as hook:
        hook.sleep()
        torch.cuda.empty_cache()
        free, _ = driver.device(0).memory()
        hog = torch.empty(free - 64 * MIB, dtype=torch.uint8, device="cuda")
        for _ in range(2):
            with pytest.raises(DeviceMemoryError, match=r"needs 128 MiB .* are free") as caught:
                hook.wake()
            assert caught.value.details["free"] < caught.value.details["needed"]
            assert hook.state is State.ASLEEP
        del hog
        torch.cuda.empty_cache()
        hook.wake()
        assert hook.state is State.AWAKE
        assert torch.equal(net.weight, value)


def test_a_forward_sees_one_version_whole(store: Store) -> None:
    """Work enqueued before a delta refit reads old bytes, work after it new ones, none a mixture."""
    net = nn.Linear(16 * WIDTH, 8 * WIDTH, bias=False, device="cuda", dtype=torch.float32)  # over two windows
    with torch.no_grad():
        net.weight.fill_(0)
    with EngineHook.attach(store, "big", {"net": net}, device="cuda:0") as hook:
        for round_, stream in enumerate((torch.cuda.default_stream(), torch.cuda.Stream()) * 3, start=1):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(
                    100_000_000
                )  # the readers are enqueued, and far from done, when refit comes
                early = torch.stack(torch.aminmax(net.weight))
            with store.refit("big", components=["net"]) as refit:
                refit.put("net.weight", torch.full_like(net.weight, round_))
            hook.refit()
            with torch.cuda.stream(stream):
                late = torch.stack(torch.aminmax(net.weight))
            stream.synchronize()
            assert early.tolist() == [round_ - 1] * 2
            assert late.tolist() == [round_] * 2


def test_generations_in_another_thread_never_see_half_a_tensor(store: Store) -> None:
    net = nn.Linear(16 * WIDTH, 8 * WIDTH, bias=False, device="cuda", dtype=torch.float32)
    with torch.no_grad():
        net.weight.fill_(0)
    seen: list[list[float]] = []
    stop = threading.Event()
    with EngineHook.attach(store, "big", {"net": net}, device="cuda:0") as hook:

        def generate() -> None:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                while not stop.is_set():
                    with hook.running():
                        found = torch.stack(torch.aminmax(net.weight))
                    seen.append(found.tolist())

        thread = threading.Thread(target=generate)
        thread.start()
        try:
            for value in range(1, 21):
                with store.refit("big", components=["net"]) as refit:
                    refit.put("net.weight", torch.full_like(net.weight, value))
                hook.refit()
        finally:
            stop.set()
            thread.join()
    assert seen
    assert all(low == high for low, high in seen)
    assert [low for low, _ in seen] == sorted(low for low, _ in seen)


def test_a_refit_while_asleep_arrives_at_wake(store: Store, toy: Toy, tokens: torch.Tensor) -> None:
    with EngineHook.attach(store, "toy", {"net": toy}, device="cuda:0") as hook:
        new = changed(toy, 5)
        hook.sleep()
        put(store, new, partial=True)
        hook.wake()
        for name, value in new.items():
            assert torch.equal(toy.state_dict()[name], value), name
        assert hook.verify().differing == ()


def test_verify_names_what_is_wrong_on_the_gpu(store: Store, toy: Toy) -> None:
    with EngineHook.attach(store, "toy", {"net": toy}, device="cuda:0") as hook:
        toy.layers[2].bias.view(torch.uint8)[5] ^= 1
        toy.embed.weight.view(torch.uint8)[-1, -1] ^= 1
        assert set(hook.verify().differing) == {"net.layers.2.bias", "net.embed.weight", "net.head.weight"}
        hook.sleep()
        hook.wake()
        assert hook.verify().differing == ()


# -- several processes -----------------------------------------------------------------------------

ENGINE = f"""
import sys, torch, weightstore
sys.path.insert(0, {str(Path(__file__).parent)!r})
from engine_hooks import EngineHook
store = weightstore.connect(sys.argv[1])
net = torch.nn.Linear(64 * 512, 4 * 512, bias=False, device="meta", dtype=torch.bfloat16)
hook = EngineHook.attach(store, "big", {{"net": net}}, device="cuda:0")
print("awake", float(net.weight.float().sum()), hook.verify().differing, flush=True)
for line in sys.stdin:
    if line.strip() == "cycle":
        while True:
            hook.sleep()
            hook.wake()
    getattr(hook, line.strip())()
    print(line.strip(), hook.state.value, flush=True)
"""


def start_engine(store: Store) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", ENGINE, store.socket],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def say(engine: subprocess.Popen[str], word: str | None) -> str:
    assert engine.stdin is not None
    assert engine.stdout is not None
    if word is not None:
        engine.stdin.write(word + "\n")
        engine.stdin.flush()
    return engine.stdout.readline().strip()


def publish(store: Store) -> torch.Tensor:
    weight = torch.randn(4 * WIDTH, 64 * WIDTH, device="cuda").to(torch.bfloat16)
    with store.refit("big") as refit:
        refit.put("net.weight", weight)
    return weight


def test_two_engines_share_one_copy(store: Store) -> None:
    weight = publish(store)
    used = store.status().arena.used
    engines = [start_engine(store) for _ in range(2)]
    try:
        for engine in engines:
            assert say(engine, None) == f"awake {float(weight.float().sum())} ()"
        assert store.status().arena.used == used
        assert say(engines[0], "sleep") == "sleep asleep"
        assert say(engines[1], "sleep") == "sleep asleep"
        assert say(engines[0], "wake") == "wake awake"
        assert say(engines[1], "wake") == "wake awake"
    finally:
        for engine in engines:
            engine.kill()
            engine.communicate()


def test_engines_killed_in_mid_wake_leave_the_arena_usable(store: Store, device: driver.Device) -> None:
    weight = publish(store)
    moments = Random(3)
    for _ in range(3):
        engine = start_engine(store)
        try:
            assert say(engine, None).startswith("awake")
            assert engine.stdin is not None
            engine.stdin.write("cycle\n")
            engine.stdin.flush()
            with pytest.raises(subprocess.TimeoutExpired):
                engine.wait(0.3 + moments.random() / 5)  # somewhere in a wake, most likely
        finally:
            engine.kill()
            engine.communicate()
    # Nobody's registration, lease or lock is left.
    net = nn.Linear(64 * WIDTH, 4 * WIDTH, bias=False, device="meta", dtype=torch.bfloat16)
    with EngineHook.attach(store, "big", {"net": net}, device="cuda:0") as hook:
        arena = PinnedArena.share(store.mapping, device)
        committed = read_committed(store.mapping.buffer)
        arena.ensure([(DATA_OFFSET, committed)])
        assert arena.pinned_bytes == committed
        arena.close()
        assert torch.equal(net.weight, weight)
        assert hook.verify().differing == ()
        assert len(store.status().leases) == 1
        publish(store)
        hook.refit()
        assert hook.verify().differing == ()
