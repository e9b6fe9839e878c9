#!/usr/bin/env python3
"""How much host memory a weightstore needs for a set of models, tags and engines.

MODEL is NAME=PATH, PATH, or the name of a model bundled in bench/manifests. PATH is anything
`weightstore load` reads (only headers are opened) or a manifest of make_manifest.py.

  plan_capacity.py flux1-dev
  plan_capacity.py flux=/models/FLUX.1-dev wan=wan2.2-t2v-a14b --tags flux=3 --engines 8
  plan_capacity.py flux1-dev --tags 2 --json

What is counted, by the store's own rules:

  steady     every tensor once, tied names together, each rounded up to 256 bytes. Tags share frozen
             components; each tag has its own copy of the trained ones. Engines map the same pages.
  refit      a second copy of one tag's trained components, until the engines have taken it.
  lagging    a third one, while an awake engine still reads the version before the last.
  in place   a refit with in_place=True needs no copy; nobody can wake while it lasts.
  reload     `weightstore load` over a model replaces all of it: a second copy of one tag's version.

The recommended capacity has a spare copy for every trained model and, where there are several, room for
the fragments that refits of different sizes leave (one largest tensor each). It is whole windows, the unit
in which memory is committed and pinned.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

if __package__ in (None, ""):  # run as a script from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.manifest_files import ManifestError, read_manifest
from weightstore.checkpoint.contents import Contents
from weightstore.checkpoint.layouts import is_component
from weightstore.errors import WeightstoreError
from weightstore.layout import DATA_OFFSET
from weightstore.sizes import format_size, parse_size
from weightstore.types import TensorSpec, align_up, component_of, nbytes_of

T = TypeVar("T")

BUNDLED = Path(__file__).resolve().parent.parent / "bench" / "manifests"
WHOLE = "weights"
"""The component of a checkpoint whose names have no component prefix."""


class PlanError(Exception):
    """Arguments that make no plan."""


@dataclass(frozen=True)
class Component:
    """`nbytes` are the tensors' own bytes, `arena_bytes` what they take in the arena, `largest` the largest
    of them there; `copies` in steady state."""

    name: str
    tensors: int
    ties: int
    nbytes: int
    arena_bytes: int
    largest: int
    trained: bool
    copies: int


@dataclass(frozen=True)
class Model:
    name: str
    tags: int
    engines: int
    components: list[Component]

    @property
    def steady(self) -> int:
        return sum(c.arena_bytes * c.copies for c in self.components)

    @property
    def trained(self) -> int:
        """Arena bytes of one copy of the trained components: what a refit adds."""
        return sum(c.arena_bytes for c in self.components if c.trained)

    @property
    def version(self) -> int:
        """Arena bytes of one whole version: what loading a checkpoint over it adds."""
        return sum(c.arena_bytes for c in self.components)

    @property
    def private(self) -> int:
        """Bytes if every engine kept a host copy of its own, as it does without a store."""
        return self.engines * sum(c.nbytes for c in self.components)


@dataclass(frozen=True)
class Plan:
    """All in bytes. `capacity` is for ``weightstore serve --capacity``, `shm` for the size of /dev/shm."""

    window: int
    models: list[Model]
    steady: int
    peak_refit: int
    peak_lagging: int
    peak_in_place: int
    peak_reload: int
    capacity: int
    capacity_in_place: int
    shm: int
    shm_in_place: int
    private_copies: int

    def to_json(self) -> dict[str, Any]:
        table = asdict(self)
        for row, model in zip(table["models"], self.models, strict=True):
            row |= {
                "steady": model.steady,
                "trained": model.trained,
                "version": model.version,
                "private_copies": model.private,
            }
        return table


def component_of_specs(name: str, specs: Iterable[TensorSpec], trained: bool, tags: int) -> Component:
    """Count one component as the store would place it: ties once, every tensor from a 256-byte multiple."""
    specs = list(specs)
    own = [nbytes_of(s.dtype, s.shape) for s in specs if s.alias_of is None]
    return Component(
        name=name,
        tensors=len(own),
        ties=len(specs) - len(own),
        nbytes=sum(own),
        arena_bytes=sum(align_up(n) for n in own),
        largest=align_up(max(own, default=0)),
        trained=trained,
        copies=tags if trained else 1,
    )


def make_plan(models: list[Model], window: int, refits: int = 1) -> Plan:
    """The plan for `models`, of which `refits` are refitted at the same time."""
    steady = sum(m.steady for m in models)
    one_each = sorted((m.trained for m in models for _ in range(m.tags)), reverse=True)
    spares = sum(m.trained * min(refits, m.tags) for m in models)
    trained = [m for m in models if m.trained]
    if len(trained) > 1:
        spares += len(trained) * max(c.largest for m in trained for c in m.components if c.trained)
    peak_refit = steady + sum(one_each[:refits])
    peak_lagging = peak_refit + sum(one_each[:refits])
    peak_reload = steady + max((m.version for m in models), default=0)
    capacity, in_place = align_up(steady + spares, window), align_up(steady, window)
    return Plan(
        window=window,
        models=models,
        steady=steady,
        peak_refit=peak_refit,
        peak_lagging=peak_lagging,
        peak_in_place=steady,
        peak_reload=peak_reload,
        capacity=capacity,
        capacity_in_place=in_place,
        shm=capacity + DATA_OFFSET,
        shm_in_place=in_place + DATA_OFFSET,
        private_copies=sum(m.private for m in models),
    )


# -- reading what the models are ------------------------------------------------------------------


def read_components(source: str) -> dict[str, list[TensorSpec]]:
    """Component → specs, from a checkpoint's headers, a manifest, or a bundled manifest's name.

    Raises:
        PlanError, ManifestError, CheckpointError: nothing of the kind.
    """
    path = Path(source)
    if not path.exists():
        bundled = BUNDLED / f"{source}.json.gz"
        if bundled.name != f"{source}.json.gz" or not bundled.is_file():
            known = ", ".join(sorted(p.name.removesuffix(".json.gz") for p in BUNDLED.glob("*.json.gz")))
            raise PlanError(f"{source}: no such file, directory or bundled model ({known})")
        path = bundled
    if path.name.endswith((".json.gz", ".json")) and not path.name.endswith(".index.json"):
        return read_manifest(path)
    with Contents(path) as contents:
        specs = contents.specs
    if not all(is_component(component_of(spec.name)) for spec in specs):
        return {WHOLE: specs}
    parts: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        parts.setdefault(component_of(spec.name), []).append(spec)
    return parts


def trained_by_default(component: str) -> bool:
    """What RL post-training of diffusion models trains: the denoiser, not the encoders and the VAE."""
    return component == WHOLE or component.startswith(("transformer", "unet"))


def per_model(
    option: str, values: Sequence[str], models: Sequence[str], read: Callable[[str], T]
) -> dict[str, T]:
    """Values given as VALUE (for all models) or MODEL=VALUE (which wins)."""
    found: dict[str, T] = {}
    own: dict[str, T] = {}
    for value in values:
        model, _, text = value.rpartition("=")
        if model and model not in models:
            raise PlanError(f"{option} {value}: there is no model {model}, only {', '.join(models)}")
        try:
            item = read(text)
        except ValueError as error:
            raise PlanError(f"{option} {value}: {error}") from None
        if model:
            own[model] = item
        else:
            found |= dict.fromkeys(models, item)
    return found | own


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("must be a whole number, at least 1")
    return int(text)


def read_models(args: argparse.Namespace) -> list[Model]:
    sources: dict[str, str] = {}
    for value in args.models:
        name, separator, source = value.partition("=")
        if not separator:
            source, name = value, Path(value.rstrip("/")).name.partition(".json")[0]
        if name in sources:
            raise PlanError(f"two models are called {name!r}; write NAME=PATH to tell them apart")
        sources[name] = source
    names = list(sources)
    tags = per_model("--tags", args.tags, names, count)
    engines = per_model("--engines", args.engines, names, count)
    trained = per_model("--trained", args.trained, names, lambda text: [c for c in text.split(",") if c])
    models = []
    for name, source in sources.items():
        parts = read_components(source)
        if unknown := set(trained.get(name, ())) - parts.keys():
            raise PlanError(
                f"--trained: {name} has no component {', '.join(sorted(unknown))}, only {', '.join(parts)}"
            )
        chosen = trained.get(name, [part for part in parts if trained_by_default(part)])
        copies = tags.get(name, 1)
        components = [component_of_specs(c, specs, c in chosen, copies) for c, specs in parts.items()]
        models.append(Model(name, copies, engines.get(name, 1), components))
    return models


# -- printing -------------------------------------------------------------------------------------


def table(plan: Plan) -> str:
    """The plan for people."""
    rows = [("model", "component", "tensors", "size", "copies", "in the arena")]
    for model in plan.models:
        for c in model.components:
            label = f"{c.name} (trained)" if c.trained else c.name
            size, held = format_size(c.nbytes), format_size(c.arena_bytes * c.copies)
            rows.append((model.name, label, str(c.tensors), size, str(c.copies), held))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(left + right).rstrip())
    lines.append("")
    facts = [
        ("steady state", plan.steady, "whatever the number of engines"),
        ("peak during a refit", plan.peak_refit, "one more copy of what is trained"),
        ("  while an awake engine lags", plan.peak_lagging, "and another until it takes the newer one"),
        ("  refit in place", plan.peak_in_place, "no copy; nobody can wake meanwhile"),
        ("peak during a full reload", plan.peak_reload, "`weightstore load` over the largest model"),
        ("private copies instead", plan.private_copies, _engines(plan)),
    ]
    width = max(len(name) for name, _, _ in facts)
    lines += [f"{name.ljust(width)}  {format_size(n).rjust(9)}  {why}" for name, n, why in facts]
    lines += [
        "",
        f"recommended       --capacity {_exact(plan.capacity)}   /dev/shm at least {_exact(plan.shm)}",
        f"  only in place   --capacity {_exact(plan.capacity_in_place)}   "
        f"/dev/shm at least {_exact(plan.shm_in_place)}",
        f"windows of {_exact(plan.window)}; /dev/shm also holds the store's own {_exact(DATA_OFFSET)}",
    ]
    return "\n".join(lines)


def _engines(plan: Plan) -> str:
    each = ", ".join(f"{m.engines} of {m.name}" for m in plan.models)
    return (
        f"one host copy per engine ({each}): {plan.private_copies / max(plan.steady, 1):.1f} × steady state"
    )


def _exact(nbytes: int) -> str:
    """A size that `--capacity` reads back as exactly this many bytes."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes and nbytes % (1 << shift) == 0:
            return f"{nbytes >> shift}{unit}"
    return str(nbytes)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="NAME=PATH, PATH or a bundled model's name"
    )
    parser.add_argument("--tags", action="append", default=[], metavar="[MODEL=]N", help="tags (default 1)")
    parser.add_argument(
        "--engines", action="append", default=[], metavar="[MODEL=]N", help="engine processes (default 1)"
    )
    parser.add_argument(
        "--trained",
        action="append",
        default=[],
        metavar="[MODEL=]C,C",
        help="components that are trained (default: transformer*, unet*)",
    )
    parser.add_argument(
        "--refits", type=int, default=1, metavar="N", help="refits at the same time (default 1)"
    )
    parser.add_argument("--window", default="1GiB", help="the store's window (default 1GiB)")
    parser.add_argument("--json", action="store_true", help="print bytes as JSON")
    args = parser.parse_args(argv)
    try:
        window = parse_size(args.window)
        if window < 1 or args.refits < 1:
            raise PlanError("--window and --refits must be at least 1")
        plan = make_plan(read_models(args), window, args.refits)
    except (PlanError, ManifestError, WeightstoreError) as error:
        print(f"plan_capacity: {error}", file=sys.stderr)
        return 2
    print(json.dumps(plan.to_json(), indent=2) if args.json else table(plan))
    return 0


if __name__ == "__main__":
    sys.exit(main())
