"""An exponential moving average of a tag's weights, kept as another tag and updated inside the arena.

    ema ← ema + (1 - decay) · (policy - ema)

One pass: the bytes of both versions are read where they are, and the new version is written beside them.
Nothing else is copied. Arithmetic is float32 (float64 for float64); the result is rounded to the stored dtype
once.

With a bfloat16 tag alone, updates below half a unit in the last place are lost: at decay 0.999 that is most
of them. ``shadow="float32"`` keeps the unrounded average in the arena too, in the component ``shadow``, which
engines do not read.

Invariants:
- equal places of two versions held at one moment are equal bytes: what the average and its source share is
  frozen, and stays shared;
- a shadow refines its tensor. Where it does not round to it (the tag was moved, or written to), the
  tensor counts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from weightstore.bulk import Span, each
from weightstore.errors import UsageError
from weightstore.lora.stored import COMPONENT as ADAPTERS
from weightstore.lora.stored import SCALE
from weightstore.mapping import ArenaMapping
from weightstore.names import AS_STORED
from weightstore.snapshot import Snapshot
from weightstore.tensors import DTYPES, tensor_of
from weightstore.types import TensorRecord, TensorSpec, component_of

if TYPE_CHECKING:
    from weightstore.client import Store
    from weightstore.trainer import Refit

SHADOW: Final = "shadow"
"""Component of the unrounded averages: ``shadow.transformer.x.weight`` is that of
``transformer.x.weight``."""

_BLOCK: Final = 511 * 64
"""Elements per operation: just too few for torch to spread over its own threads, whose barriers cost more
than the work on a busy host (see `bulk`), and few enough to stay in a core's cache from one operation to the
next."""

_LERPED: Final = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
"""Dtypes that torch.lerp reads and writes directly, computing in float32 or wider."""
_ROUNDED: Final = frozenset({"bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"})
"""Stored dtypes that a float32 shadow refines."""


@dataclass(frozen=True)
class EmaReport:
    """`version` is what the target names now. `averaged` counts tensors (tied ones once), `nbytes` the bytes
    written, both 0 where there was nothing to average; `created` says that the target was made just now."""

    model: str
    target: str
    version: int
    created: bool
    averaged: int
    nbytes: int
    seconds: float


class _Mean(NamedTuple):
    """One tensor to be averaged: its records in both versions, and that of its shadow if there is one."""

    source: TensorRecord
    target: TensorRecord
    shadow: TensorRecord | None


def update_ema(
    store: Store,
    model: str,
    source: str = "policy",
    target: str = "ema",
    decay: float = 0.999,
    *,
    components: Sequence[str] | None = None,
    shadow: str | None = None,
) -> EmaReport:
    """Move the average that tag `target` names one step towards what tag `source` names.

    The first call makes `target` name the source's version, and copies nothing. Afterwards every floating
    tensor that differs is averaged; all others, integers among them, are the source's. Adapters (see
    `docs/lora.md`) are averaged as A and B, which is what trainers do that average their parameters.

    Args:
        decay: 0 (the source) to 1 (no change).
        components: those averaged; None for all. The others are the source's.
        shadow: "float32" to keep the unrounded average of tensors stored in fewer bits; then for each call.

    Raises:
        UsageError: a decay out of range, a tag that is its own source, a component there is not, tensors
            that changed shape or dtype, or a shadow that the target has and this call does not declare.
        UnknownModel, UnknownTag, TagTorn: no such source.
        RefitConflict: the target is being written.
        ArenaFull: no room for one more copy of what is averaged (and its shadow).
    """
    began = time.perf_counter()
    _check(source, target, decay, components, shadow)

    def report(version: int, created: bool = False, averaged: int = 0, nbytes: int = 0) -> EmaReport:
        return EmaReport(model, target, version, created, averaged, nbytes, time.perf_counter() - began)

    if target not in store.tags(model):
        return report(store.tag(model, target, source), created=True)
    with store.lease(model, source) as policy:
        # The refit comes before the target's lease: from here on nobody else moves the target.
        with store.refit(
            model,
            tag=target,
            base=policy.version,
            partial=True,
            extend=shadow is not None,
            names=AS_STORED,
        ) as refit:
            with store.lease(model, target) as average:
                means = _means(policy, average, components, shadow)
                if means:
                    _write(refit, means, 1.0 - decay, shadow)
                else:
                    refit.abort("nothing to average")
        if means:
            return report(refit.report.version, averaged=len(means), nbytes=refit.report.nbytes)
        return report(store.tag(model, target, policy.version))


def _check(
    source: str, target: str, decay: float, components: Sequence[str] | None, shadow: str | None
) -> None:
    if not (math.isfinite(decay) and 0 <= decay <= 1):
        raise UsageError(f"decay is between 0 and 1, not {decay}")
    if source == target:
        raise UsageError(f"tag {source!r} cannot be the average of itself; name another target")
    if shadow not in (None, "float32"):
        raise UsageError(f"shadow is None or 'float32', not {shadow!r}")
    if isinstance(components, str):
        raise UsageError(f"components is a list of names: [{components!r}]")


def _means(
    policy: Snapshot, average: Snapshot, components: Sequence[str] | None, shadow: str | None
) -> list[_Mean]:
    """What there is to average; tied tensors once, under their first name."""
    present = {component_of(name) for name in policy.records} - {SHADOW}
    unknown = sorted(set(components or ()) - present)
    if unknown:
        raise UsageError(
            f"version {policy.version} of {policy.model!r} has no component {', '.join(unknown)}; it has "
            f"{', '.join(sorted(present))}",
            unknown=unknown,
        )
    if shadow is None:
        _refuse_shadows(policy, average)
    found: list[_Mean] = []
    misfits: list[str] = []
    seen: set[int] = set()
    for name, new in policy.records.items():
        old = average.records.get(name)
        if old is None or not new.nbytes or new.offset in seen or not _averaged(name, new, components):
            continue
        if (old.dtype, old.shape) != (new.dtype, new.shape):
            was = f"{old.dtype}{list(old.shape)}"
            misfits.append(f"{name} is {new.dtype}{list(new.shape)}, its average {was}")
            continue
        kept = average.records.get(f"{SHADOW}.{name}") if new.dtype in _ROUNDED else None
        if kept is not None or old.offset != new.offset:
            seen.add(new.offset)
            found.append(_Mean(new, old, kept))
    if misfits:
        raise UsageError(
            f"{len(misfits)} tensors of {policy.model!r} have changed since they were last averaged: "
            f"{'; '.join(misfits[:5])}{'; …' if len(misfits) > 5 else ''}. Remove the tag and begin anew",
            mismatched=misfits,
        )
    return found


def _averaged(name: str, record: TensorRecord, components: Sequence[str] | None) -> bool:
    """Whether this tensor is averaged if it differs."""
    component = component_of(name)
    if component == SHADOW or (components is not None and component not in components):
        return False
    if component == ADAPTERS and name.endswith(f".{SCALE}"):
        return False
    dtype = DTYPES[record.dtype]
    return dtype.is_floating_point or dtype.is_complex


def _refuse_shadows(*versions: Snapshot) -> None:
    for snapshot in versions:
        if any(component_of(name) == SHADOW for name in snapshot.records):
            raise UsageError(
                f"version {snapshot.version} of {snapshot.model!r} holds a shadow, which this call would "
                "leave behind: give shadow='float32'"
            )


def _write(refit: Refit, means: Sequence[_Mean], weight: float, shadow: str | None) -> None:
    """Average into fresh places, blocks of all tensors on a few threads."""
    specs = [TensorSpec(m.source.name, m.source.dtype, m.source.shape, m.source.stride) for m in means]
    refined = [m.source for m in means if shadow is not None and m.source.dtype in _ROUNDED]
    specs += [TensorSpec(f"{SHADOW}.{r.name}", "float32", r.shape, r.stride) for r in refined]
    places = {record.name: record for record in refit.reserve(specs)}
    mapping = refit.mapping
    passes = [_Pass.of(mean, places, mapping) for mean in means]

    def work(span: Span) -> None:
        # Counted in elements, not bytes.
        start, end = span.target, span.target + span.nbytes
        one = passes[span.number]
        for written in (one.result, one.new_shadow):
            if written is not None:
                size = written.element_size()
                place = written.data_ptr() - mapping.address
                mapping.prefault(place + start * size, span.nbytes * size)
        for at in range(start, end, _BLOCK):
            one.block(at, min(at + _BLOCK, end), weight)

    each((Span(number, 0, 0, one.numel) for number, one in enumerate(passes)), work)
    refit.wrote(places)


class _Pass(NamedTuple):
    """One tensor's bytes as flat tensors, all in the memory order of the source.

    All are read through the writable mapping too: the trainer that wrote the source has its pages there.
    """

    source: torch.Tensor
    average: torch.Tensor
    result: torch.Tensor
    shadow: torch.Tensor | None
    new_shadow: torch.Tensor | None

    @classmethod
    def of(cls, mean: _Mean, places: Mapping[str, TensorRecord], mapping: ArenaMapping) -> _Pass:
        def flat(record: TensorRecord) -> torch.Tensor:
            return _flat(tensor_of(mapping, record), mean.source.stride)

        shadow, new_shadow = mean.shadow, places.get(f"{SHADOW}.{mean.source.name}")
        return cls(
            flat(mean.source),
            flat(mean.target),
            flat(places[mean.source.name]),
            None if shadow is None else flat(shadow),
            None if new_shadow is None else flat(new_shadow),
        )

    @property
    def numel(self) -> int:
        return self.result.numel()

    def block(self, start: int, end: int, weight: float) -> None:
        source, average, result = self.source[start:end], self.average[start:end], self.result[start:end]
        if self.new_shadow is None:
            if result.dtype in _LERPED:
                torch.lerp(average, source, weight, out=result)
            else:
                result.copy_(torch.lerp(average.float(), source.float(), weight))
            return
        exact = average.float() if self.shadow is None else _refined(average, self.shadow[start:end])
        refined = torch.lerp(exact, source.float(), weight, out=self.new_shadow[start:end])
        result.copy_(refined)


def _refined(average: torch.Tensor, shadow: torch.Tensor) -> torch.Tensor:
    """The unrounded average: the shadow's, where it rounds to the stored one."""
    apart = shadow.to(average.dtype) != average
    return torch.where(apart, average.float(), shadow) if bool(apart.any()) else shadow


def _flat(tensor: torch.Tensor, stride: Iterable[int]) -> torch.Tensor:
    """The elements of a dense tensor in the order of `stride`, as real numbers; a view unless its own
    differs."""
    if tensor.stride() != tuple(stride):
        tensor = torch.empty_strided(tensor.shape, tuple(stride), dtype=tensor.dtype).copy_(tensor)
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return torch.view_as_real(flat).flatten() if flat.is_complex() else flat
