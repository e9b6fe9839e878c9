"""A dry run: what would become of some tensors, before a byte moves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import prod
from typing import Any

import msgspec

from weightstore.names.hints import Hints
from weightstore.names.name_map import NameMap
from weightstore.names.refusal import refusal
from weightstore.names.resolve import resolve
from weightstore.names.router import Router
from weightstore.names.rows import PROBLEMS, WRITTEN, Given, Kind, Row, Stored
from weightstore.types import Box


class Plan(msgspec.Struct, frozen=True):
    """What would become of the tensors given, as if they were all that is written.

    ``print(plan)`` shows it as a table, layers that are alike in one line.

    Attributes:
        what: what would be written.
        rows: one per tensor or piece given, then one per stored tensor that nothing was given for.
        unused: rules that matched nothing and are not optional (not judged in a partial refit).
    """

    what: str
    rows: tuple[Row, ...]
    unused: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether a refit that writes exactly these tensors would commit."""
        return not self.problems

    @property
    def counts(self) -> dict[Kind, int]:
        """Rows of each kind, also of those that have none."""
        found = Counter(row.kind for row in self.rows)
        return {kind: found[kind] for kind in Kind}

    @property
    def problems(self) -> tuple[str, ...]:
        """Why it would not commit, a line for each kind of reason."""
        counts = self.counts
        lines = [f"{counts[kind]} {kind.value}" for kind in Kind if kind in PROBLEMS and counts[kind]]
        return (*lines, *self._beyond_rows())

    def raise_for_problems(self) -> None:
        """Raise CoverageError, with all names by kind, unless it would commit."""
        if not self.ok:
            more = [*self._beyond_rows(), *filter(None, [self.advice])]
            raise refusal(self.what, self.rows, "nothing was written", more)

    def _beyond_rows(self) -> list[str]:
        lines = [f"{rule} matches nothing; declare it optional if it need not" for rule in self.unused]
        if not any(row.kind in WRITTEN for row in self.rows):
            given = sum(1 for row in self.rows if row.source is not None)
            lines.append(f"nothing would be written: of {given} tensors given none has a place")
        return lines

    @property
    def advice(self) -> str:
        """What would mend most of the unknown names at once; empty if nothing stands out."""
        unknown = [row for row in self.rows if row.kind is Kind.UNKNOWN and row.target]
        added: Counter[str] = Counter()
        for row in unknown:
            if row.hint and row.target and row.hint.endswith(f".{row.target}"):
                added[row.hint.removesuffix(row.target)] += 1
        for prefix, count in added.most_common(1):
            if 2 * count >= len(unknown):
                return f"{count} unknown names would match with prefix={prefix!r}"
        return ""

    def to_builtins(self) -> dict[str, Any]:
        """Everything, for JSON."""
        plain: dict[str, Any] = {
            "what": self.what,
            "ok": self.ok,
            "counts": {kind.value: count for kind, count in self.counts.items()},
            "problems": list(self.problems),
            "advice": self.advice,
            "rows": [msgspec.to_builtins(row) for row in self.rows],
        }
        return plain

    def __str__(self) -> str:
        from weightstore.names.table import as_text

        return as_text(self)

    def __rich__(self) -> Any:
        from weightstore.names.table import page

        return page(self)


def plan(names: NameMap, given: Iterable[Given], stored: Stored) -> Plan:
    """What would become of `given` if exactly they were written into `stored`."""
    router = Router(names)
    rows = resolve(router, given, stored)
    missing = [] if not stored.records else _missing(rows, stored)
    used = {number for row in rows for number in row.rules}
    unused = [] if stored.partial else unused_rules(router, used)
    return Plan(stored.what, tuple(hinted(rows, missing, stored)), tuple(unused))


def unused_rules(router: Router, used: Iterable[int]) -> list[str]:
    """Rules that ought to have matched something."""
    used = set(used)
    return [str(rule) for number, rule in enumerate(router.rules) if number not in used and not rule.optional]


def _missing(rows: list[Row], stored: Stored) -> list[Row]:
    """Stored tensors of which nothing, or not all, is given. Tied names are given by any of theirs."""
    filled: dict[object, dict[Box | None, str]] = {}
    troubled = set()
    for row in rows:
        if row.target is None or row.source is None:
            continue
        if row.kind in WRITTEN:
            filled.setdefault(stored.bytes_of(row.target), {})[row.box] = row.source
        else:
            troubled.add(stored.bytes_of(row.target))
    missing = []
    for name, record in stored.records.items():
        key = stored.bytes_of(name)
        if not stored.in_scope(name) or key in troubled:
            continue
        boxes = filled.get(key)
        if boxes is None:
            if not stored.partial:
                missing.append(Row(Kind.MISSING, None, name, record.dtype, record.shape))
        elif None not in boxes and sum(box.numel for box in boxes if box is not None) != prod(record.shape):
            note = f"only in part: {', '.join(boxes.values())}"
            missing.append(Row(Kind.MISSING, None, name, record.dtype, record.shape, note=note))
    return missing


def hinted(rows: list[Row], missing: list[Row], stored: Stored) -> list[Row]:
    """All rows, the unknown and the missing ones with the name that was perhaps meant."""
    unknown = [row for row in rows if row.kind is Kind.UNKNOWN and row.target]
    if not unknown:
        return rows + missing
    wanted = Hints(row.target for row in missing if row.target)
    any_stored = Hints(stored.records)
    offered = {row.target: row.source for row in unknown}
    found = Hints(target for target in offered if target)

    def hint(row: Row) -> Row:
        if row.target is None:
            return row
        if row.kind is Kind.UNKNOWN:
            likeness = wanted.closest(row.target) or any_stored.closest(row.target)
        elif row.kind is Kind.MISSING:
            likeness = offered.get(found.closest(row.target))
        else:
            return row
        return row if likeness is None else msgspec.structs.replace(row, hint=likeness)

    return [hint(row) for row in (*rows, *missing)]
