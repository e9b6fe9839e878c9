"""What the store does with input that no client would send: stay alive, leak nothing, and say little.

Hypothesis makes it up: garbage, valid messages with senseless fields in a senseless order, valid messages
cut, mutated or nested wrongly, over several connections to one live store at a time. An *input* is one
frame or piece of garbage.

`WEIGHTSTORE_FUZZ_INPUTS` says how many (`make fuzz`: 100,000); the default is for every run of the tests.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import types
import typing
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from processes import Raw, Service, contents, eventually, publish

from weightstore import wire
from weightstore.errors import WeightstoreError
from weightstore.names import NameMap
from weightstore.types import ITEMSIZE, Box, TensorRecord, TensorSpec, contiguous_stride

INPUTS: Final = int(os.environ.get("WEIGHTSTORE_FUZZ_INPUTS", "4000"))
AT_ONCE: Final = 20
"""Inputs of one example."""
LOOK_EVERY: Final = 25
"""Examples between two looks at everything the store holds."""

SYNC: Final = 1 << 41
"""Id of the requests by which the fuzz keeps in step."""

INSTANCES: Final = ("fuzz", "")
"""Names of client objects. Only a writer of that name can say that its copies have landed, as `look` does."""

PRECIOUS: Final = {"t.w": 5000, "vae.w": 64}

# -- fields ------------------------------------------------------------------------------------------

integers = st.one_of(
    st.integers(0, 6),
    st.sampled_from([-1, 1 << 16, (1 << 31) - 1, 1 << 48, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63)]),
)
floats = st.sampled_from([0.0, -1.0, 1e-9, 0.001, 1.0, 600.0, 1e300, math.inf, -math.inf, math.nan])
BAD_NAMES: Final = ["", ".", "-", "a b", "../x", "ü", "x" * 129, "x" * 5000, "\x00", "{}", "%s%n"]
names = st.one_of(
    st.sampled_from(["a", "b", "latest", "policy", "t", "vae"]), st.sampled_from(BAD_NAMES), st.text()
)


def mostly(*good: Any, bad: Sequence[Any] = ()) -> st.SearchStrategy[Any]:
    """Values of which one in ten is `bad`: else nothing would get past the first check."""
    return st.sampled_from([*good] * (9 * max(1, len(bad))) + [*bad] * len(good))


tensor_names = mostly("t.w", "t.b", "vae.w", "t.new", "x", bad=BAD_NAMES)


@st.composite
def tensor_specs(draw: st.DrawFn) -> TensorSpec:
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    stride = contiguous_stride(shape)
    dtype = draw(mostly(*ITEMSIZE, bad=["object", ""]))
    if draw(st.integers(0, 9)) == 0:
        shape = tuple(draw(st.lists(integers, max_size=4)))
        stride = tuple(draw(st.lists(integers, max_size=4)))
    alias = draw(mostly(None, bad=["t.w", "t.b", "", "nowhere"]))
    return TensorSpec(draw(tensor_names), dtype, shape, stride, alias)


indices = st.lists(integers, max_size=3).map(tuple)
BY_NAME: Final[dict[str, st.SearchStrategy[Any]]] = {
    "id": st.integers(1, 1 << 40),
    "model": mostly("a", "b", bad=BAD_NAMES),
    "tag": mostly("latest", "policy", bad=BAD_NAMES),
    "instance": st.sampled_from(INSTANCES),
    "protocol": st.sampled_from([wire.PROTOCOL, wire.PROTOCOL, 0, wire.PROTOCOL + 1, -1]),
    "specs": st.lists(tensor_specs(), max_size=5)
    | st.lists(tensor_specs(), max_size=2, unique_by=lambda s: s.name),
    "writes": st.lists(
        st.builds(wire.Write, tensor_names, st.one_of(st.none(), st.builds(Box, indices, indices))),
        max_size=6,
    ),
    "components": st.one_of(mostly(None, ["t"], bad=[["vae"], []]), st.lists(names, max_size=3)),
    "world_size": mostly(1, bad=[2, 3, 0, -1, 1 << 60]),
    "rank": mostly(0, bad=[1, 2, -1, 1 << 60]),
    "key": mostly(None, "k", bad=BAD_NAMES),
    "base": mostly(None, bad=[0, 1, -1, 99, 1 << 60]),
    "refit": mostly(1, 2, bad=[0, 7, -1, 1 << 60]),
    "lease": mostly(1, 2, bad=[0, 7, -1, 1 << 60]),
    "names": mostly(
        None, '{"prefix":"t."}', "{}", '{"no map": [1e99]}', bad=["", "[]", "{", "[" * 5000, "\0"]
    ),
    "extend": mostly(True, bad=[False]),
    "fresh": mostly(False, bad=[True]),
    "in_place": mostly(False, bad=[True]),
    "timeout": mostly(600.0, 0.001, bad=[0.0, -1.0, 1e300, math.inf, -math.inf, math.nan]),
}
BY_TYPE: Final[dict[Any, st.SearchStrategy[Any]]] = {
    int: integers,
    float: floats,
    str: names,
    bool: st.booleans(),
}
REQUESTS: Final[tuple[type[msgspec.Struct], ...]] = typing.get_args(wire.Request)


def of_type(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type, for fields that `BY_NAME` does not know."""
    if hint in BY_TYPE:
        return BY_TYPE[hint]
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return st.one_of(*(st.none() if arm is type(None) else of_type(arm) for arm in typing.get_args(hint)))
    if typing.get_origin(hint) is list:
        return st.lists(of_type(typing.get_args(hint)[0]), max_size=3)
    raise AssertionError(f"say in BY_NAME what values a field of type {hint} may have")


def requests_of(kind: type[msgspec.Struct]) -> st.SearchStrategy[msgspec.Struct]:
    """Every field of the type it must have, if rarely a value that makes sense."""
    hints = typing.get_type_hints(kind)
    fields = {name: BY_NAME[name] if name in BY_NAME else of_type(hint) for name, hint in hints.items()}
    return st.builds(kind, **fields)


valid = st.one_of(*map(requests_of, REQUESTS))
OFTEN: Final = (
    *[wire.OpenRefit] * 3,
    *[wire.Reserve] * 3,
    *[wire.CommitRefit] * 3,
    *[wire.OpenLease] * 2,
    wire.VerifyVersion,
)
harmless = st.one_of(*(requests_of(kind) for kind in (*REQUESTS, *OFTEN) if kind is not wire.Hello))
"""What may be said in any order without a breach of the protocol."""

# -- inputs ------------------------------------------------------------------------------------------

anything = st.recursive(
    st.one_of(st.none(), st.booleans(), integers, floats, st.text(max_size=10), st.binary(max_size=10)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=10,
)


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid frame, damaged; its length is right, or wrong too."""
    body = bytearray(wire.frame(draw(harmless))[4:])
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(body) - 1)))
        how = draw(st.sampled_from(["flip", "cut", "insert", "double"]))
        if how == "flip" and body:
            body[at] ^= draw(st.integers(1, 255))
        elif how == "cut":
            del body[at : at + draw(st.integers(1, 20))]
        elif how == "insert":
            body[at:at] = draw(st.binary(max_size=20))
        else:
            body[at:at] = body[at : at + 50]
    return framed(bytes(body))


@st.composite
def misfielded(draw: st.DrawFn) -> bytes:
    """Well-formed msgpack that looks like a message, with fields of any type, missing or unknown."""
    message = msgspec.to_builtins(draw(valid))
    for name in draw(
        st.lists(st.sampled_from([*sorted(message.keys() - {"instance"}), "unknown"]), max_size=3)
    ):
        if draw(st.booleans()):
            message.pop(name, None)
        else:
            message[name] = draw(anything)
    return framed(msgspec.msgpack.encode(message))


frames = st.one_of(
    valid.map(wire.frame),
    valid.map(wire.frame),
    mutated(),
    misfielded(),
    anything.map(msgspec.msgpack.encode).map(framed),
    st.binary(max_size=60).map(framed),
    st.binary(max_size=60),
    st.tuples(valid.map(wire.frame), st.integers(1, 30)).map(lambda pair: pair[0][: -pair[1]]),
)
scripts = st.lists(
    st.one_of(
        st.tuples(st.just("stranger"), frames),  # never says Hello
        st.tuples(st.just("rude"), frames),
        *[st.tuples(st.just("senseless"), harmless)] * 4,
    ),
    min_size=AT_ONCE,
    max_size=AT_ONCE,
)
"""Pairs of a client and what it sends."""


# -- the store under it -----------------------------------------------------------------------------


class Client:
    """A connection that is sent inputs. The senseless one names, now and then, what it really was given."""

    def __init__(self, socket: str, who: str, replies: Counter[str]) -> None:
        self._raw = Raw(socket)
        self._replies = replies
        self._known = {"refit": 1, "lease": 1, "version": 1}
        self._targets: dict[str, TensorSpec] = {}
        if who != "stranger":
            self._raw.hello(instance="fuzz")
        if who == "senseless":  # something to go on from
            self.send(wire.OpenRefit(id=1, model="a", tag="latest"))

    def send(self, what: bytes | wire.Request) -> bool:
        """False if the store has hung up."""
        try:
            if isinstance(what, bytes):
                self._raw.send(what)
            else:
                self._raw.send(self._sharpened(what))
                self._raw.send(wire.GetStatus(id=SYNC))
                while getattr(reply := self._raw.read(), "id", 0) != SYNC:
                    self._learn(reply)
        except (BrokenPipeError, ConnectionResetError, EOFError):
            return False
        return True

    def _sharpened(self, message: wire.Request) -> wire.Request:
        """Most messages are about what there is: the last refit, lease or version this client knows, a
        model and tag, all tensors that have a place."""
        if message.id % 4 == 1:
            return message
        fields: dict[str, Any] = {**self._known, "model": "ab"[message.id % 2], "tag": "latest"}
        if message.id % 3:
            fields["writes"] = [wire.Write(name) for name in self._targets]
            fields["specs"] = list(self._targets.values())
        if isinstance(message, wire.VerifyVersion | wire.OpenLease):
            fields["version"] = None
        return msgspec.structs.replace(
            message, **{name: value for name, value in fields.items() if name in message.__struct_fields__}
        )

    def _learn(self, reply: Any) -> None:
        for name in self._known:
            self._known[name] = getattr(reply, name, None) or self._known[name]
        if isinstance(reply, wire.RefitOpened):
            self._targets = {record.name: spec_of(record) for record in reply.targets}
        elif isinstance(reply, wire.Reserved):
            self._targets |= {record.name: spec_of(record) for record in reply.records}
        kind = type(reply).__name__
        self._replies[kind if kind != "Failed" else reply.error] += 1
        if isinstance(reply, wire.Failed):
            assert reply.error in WeightstoreError.registry, reply  # the bare base class is a bug's
            assert len(reply.message) < 10_000, reply

    def close(self) -> None:
        """Say no more, and look at what comes back until the store hangs up: replies of the protocol."""
        with self._raw, contextlib.suppress(EOFError):
            with contextlib.suppress(OSError):
                self._raw.sock.shutdown(socket.SHUT_WR)
            while True:
                self._learn(self._raw.read())


def spec_of(record: TensorRecord) -> TensorSpec:
    return TensorSpec(record.name, record.dtype, record.shape, record.stride)


class Fuzzed:
    """One live store, and what must be true of it whatever was sent."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.pid = service.pid
        self.inputs = self.examples = 0
        self.replies: Counter[str] = Counter()
        with service.connect() as store:
            publish(store, "precious", PRECIOUS, 42)
        self.fds = self.memory = 0
        self.look()

    def play(self, script: list[tuple[str, Any]]) -> None:
        with self.service.connect() as store:
            if "a" not in store.models():
                names = NameMap(strip=False)  # another client may have published one of its own for it
                publish(store, "a", {"t.w": (4,), "t.b": 3, "vae.w": (2, 2)}, 1, names=names)
        clients: dict[str, Client] = {}
        for who, what in script:
            client = clients.get(who) or Client(self.service.socket, who, self.replies)
            clients[who] = client
            if not client.send(what):
                clients.pop(who).close()
            self.inputs += 1
        for client in clients.values():
            client.close()
        self.examples += 1
        assert self.service.status().pid == self.pid
        if self.examples % LOOK_EVERY == 0:
            self.look()

    def look(self) -> None:
        """The same process and descriptors, every byte accounted for, what was committed as it was."""
        service = self.service
        with service.raw(instance=INSTANCES[0]) as one, service.raw(instance=INSTANCES[1]) as two:

            def alone() -> wire.Status | None:
                one.ask(wire.Drained(id=0))
                two.ask(wire.Drained(id=0))
                status = one.status()
                held = status.leases or status.refits or status.arena.quarantined
                return None if held or status.clients > 2 else status

            for model in eventually(alone, "every connection and all it held are gone").models:
                if model.name != "precious":
                    assert isinstance(one.ask(wire.RemoveModel(id=0, model=model.name)), wire.Done)
            status = one.status()
        arena = status.arena
        assert [model.name for model in status.models] == ["precious"]
        assert (arena.pending, arena.quarantined, arena.reachable) == (0, 0, 5120 + 256)
        assert arena.free + arena.reachable == arena.committed
        with service.connect() as store:
            assert contents(store, "precious") == {name: b"\x2a" * size for name, size in PRECIOUS.items()}
        eventually(lambda: service.status().clients == 1, "our own connections are gone")
        self.fds = self.fds or service.fds()
        eventually(lambda: service.fds() <= self.fds, f"{service.fds()} descriptors are {self.fds} again")
        log = service.log()
        assert "Traceback" not in log and "bug" not in log, log
        assert len(log.splitlines()) < 40, log
        if self.inputs < INPUTS // 4:
            self.memory = anonymous(service.pid)
        assert anonymous(service.pid) < self.memory + (48 << 20)


def anonymous(pid: int) -> int:
    """Bytes of a process's own memory, without the arena."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzed]:
    with Service(tmp_path_factory.mktemp("fuzz"), capacity="64MiB", window="1MiB", grace=0.0) as service:
        fuzzed = Fuzzed(service)
        yield fuzzed
        fuzzed.look()
        assert fuzzed.inputs >= INPUTS
        print(f"\n{fuzzed.inputs} inputs; the store replied: {dict(fuzzed.replies.most_common())}")


@pytest.mark.timeout(3600)
@settings(
    max_examples=math.ceil(INPUTS / AT_ONCE),
    deadline=None,
    derandomize=INPUTS <= 4000,
    database=None,
    phases=[Phase.generate],  # the store is a state of its own: shrinking would start from another
    suppress_health_check=list(HealthCheck),
)
@given(script=scripts)
def test_no_input_hurts_the_store(fuzzed: Fuzzed, script: list[tuple[str, Any]]) -> None:
    fuzzed.play(script)


def test_the_fuzz_reaches_behind_the_decoder(fuzzed: Fuzzed) -> None:
    """It would prove little if every input were refused at the door."""
    accepted = {
        "Done",
        "Status",
        "NamesAre",
        "RefitOpened",
        "Reserved",
        "Committed",
        "LeaseGranted",
        "Verified",
    }
    refused = {"ProtocolError", "InvalidName", "UsageError", "RefitClosed", "LeaseLost", "UnknownModel"}
    missing = (accepted | refused) - fuzzed.replies.keys()
    assert not missing, (missing, fuzzed.replies)


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(data=st.data())
@pytest.mark.parametrize("kind", REQUESTS)
def test_every_kind_of_request_is_fuzzed(kind: type[msgspec.Struct], data: st.DataObject) -> None:
    """A new kind of message cannot be left out, and what is called valid does decode."""
    message = data.draw(requests_of(kind))
    assert type(wire.decode_request(wire.frame(message)[4:])) is kind
