"""What control costs: a round trip, a lease with its plan, a commit. No weights move here."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import weightstore
from bench import manifests
from bench.rows import Goal, Row, clock, percentile
from bench.settings import MIB, Settings
from bench.shapes import shrink
from bench.waiting import Quiet, settle
from engine_hooks.plan import by_component, lay_out, matcher, misfits, runs_of
from weightstore import wire
from weightstore.client import Store
from weightstore.types import DEFAULT_TAG, TensorSpec, component_of, contiguous_stride

WAN = "wan2.2-t2v-a14b"
LEASE_GOAL = Goal(0.020, at_least=False)
COMMIT_GOAL = Goal(0.015, at_least=False)


@contextmanager
def wan_store() -> Iterator[Store]:
    """A private store that holds Wan2.2's tensors under their names, each shrunk to 1,024 elements."""
    with weightstore.local_store(64 * MIB, window=8 * MIB) as store:
        write(store, WAN, shrink(manifests.load(WAN)))
        yield store


def write(store: Store, model: str, specs: list[TensorSpec]) -> None:
    """A new version of exactly these tensors, with whatever bytes are there."""
    with store.refit(model, fresh=True) as refit:
        refit.reserve(specs)
        refit.wrote(spec.name for spec in specs if spec.alias_of is None)


def trip(settings: Settings) -> Iterator[Row]:
    """One request and its answer, over and over, on one connection."""
    with wan_store() as store:
        requests = {
            "trip": (
                "round trip: asking what version a tag names (wait_for with timeout 0)",
                lambda: store.wait_for(WAN, timeout=0),
            ),
            "status": (f"round trip: status of a store with {WAN}", store.status),
        }
        for key, (what, ask) in requests.items():
            quiet = Quiet.of(settings)
            quiet()
            samples = [clock(ask) for _ in range(settings.trips + 50)][50:]
            for percent in (50, 99):
                yield Row(
                    f"{key} p{percent}",
                    f"{what}, p{percent} of {len(samples)}",
                    {"measured": samples if percent == 50 else []},
                    value=percentile(samples, percent),
                    notes=quiet.notes(),
                )


def lease(settings: Settings) -> Iterator[Row]:
    """Taking a lease and working out what to copy, as an engine does when it attaches and when it wakes."""
    with wan_store() as store:
        components = sorted({component_of(spec.name) for spec in manifests.load(WAN)})
        nothing = matcher(())
        planning: list[float] = []

        def attach() -> float:
            began = time.perf_counter()
            held = store.lease(WAN, follow=True)
            leased = time.perf_counter()
            for records in by_component(held.records, components, nothing).values():
                runs_of(lay_out(records.values()), records)
            ended = time.perf_counter()
            tensors.add(len({r.offset for r in held.records.values()}))
            held.release()
            planning.append(ended - leased)
            return ended - began

        tensors: set[int] = set()
        quiet = Quiet.of(settings)
        samples = []
        for _ in range(settings.leases + 2):
            quiet()
            samples.append(attach())
        (count,) = tensors
        yield Row(
            "lease + plan",
            f"attach: lease of {WAN} ({count:,} tensors), layout and runs of {len(components)} components",
            {"measured": samples[2:], "plan": planning[2:]},
            goal=LEASE_GOAL,
            notes=quiet.notes(),
        )

        specs = shrink(manifests.load(WAN))
        held = store.lease(WAN, follow=True)
        layouts = {
            name: lay_out(records.values())
            for name, records in by_component(held.records, components, nothing).items()
        }
        quiet = Quiet.of(settings)
        samples = []
        for _ in range(settings.leases):
            held.park()
            write(store, WAN, specs)
            settle(store)
            while held.version < store.tags(WAN)["latest"]:
                time.sleep(0.001)
            quiet()
            began = time.perf_counter()
            held.unpark()
            grouped = by_component(held.records, components, nothing)
            for name, layout in layouts.items():
                misfits(layout, grouped[name])
                runs_of(layout, grouped[name])
            samples.append(time.perf_counter() - began)
        held.release()
        yield Row(
            "unpark + plan",
            "the same at a wake on a version that came while asleep: unpark, compare, runs",
            {"measured": samples},
            goal=LEASE_GOAL,
            notes=quiet.notes(),
        )


def commit(settings: Settings) -> Iterator[Row]:
    """A refit of many small tensors on a base that has them all: begin, and commit."""
    specs = many(settings.commit_tensors)
    with weightstore.local_store(64 * MIB, window=8 * MIB) as store:
        write(store, "many", specs)
        begins, commits, requests, reserves = [], [], [], []
        quiet = Quiet.of(settings)
        for _ in range(settings.commits + 2):
            settle(store)
            quiet()
            requests.append(_commit_request(store, "many"))
            settle(store)
            quiet()
            began = time.perf_counter()
            refit = store.refit("many")
            begins.append(time.perf_counter() - began)
            refit.wrote(spec.name for spec in specs)
            commits.append(clock(refit.commit))
        settle(store)
        for number in range(settings.commits):
            began = time.perf_counter()
            refit = store.refit(f"new{number}")
            refit.reserve(specs)
            reserves.append(time.perf_counter() - began)
            refit.abort()
        count = f"{len(specs):,} tensors"
        yield Row(
            "commit",
            f"commit of {count}: the request, from its encoding to its answer",
            {"measured": requests[2:], "Refit.commit": commits[2:]},
            goal=COMMIT_GOAL,
            notes=quiet.notes(),
        )
        yield Row(
            "begin",
            f"begin of a refit on a base of {count}, with a place for each of them",
            {"measured": begins[2:]},
        )
        yield Row(
            "begin + reserve",
            f"begin of a refit of a new model and reserving its {count}",
            {"measured": reserves},
        )


def _commit_request(store: Store, model: str) -> float:
    """Seconds of the request that makes a new version of every tensor of a model."""
    connection = store.link.connect()
    begin = wire.OpenRefit(id=0, model=model, tag=DEFAULT_TAG)
    opened, fd = connection.request_fd(begin, wire.RefitOpened)
    os.close(fd)
    writes = [wire.Write(record.name) for record in opened.targets]
    request = wire.CommitRefit(id=0, refit=opened.refit, writes=writes)
    return clock(connection.request, request, wire.Committed)


def many(count: int) -> list[TensorSpec]:
    """Small tensors with names as long as real ones."""
    shape = (16, 8)
    leaves = ("attn.to_q.weight", "attn.to_out.0.bias", "norm1.linear.weight", "ff.net.0.proj.weight")
    return [
        TensorSpec(
            f"transformer.transformer_blocks.{number // len(leaves)}.{leaves[number % len(leaves)]}",
            "bfloat16",
            shape,
            contiguous_stride(shape),
        )
        for number in range(count)
    ]
