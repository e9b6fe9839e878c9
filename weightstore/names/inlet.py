"""The names of one refit at work: what is put goes through the map, and in the end every rule has been used.

Invariant: what `admit` lets through has a place of its dtype and shape; a call with one name that has none
is refused as a whole, with all such names.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from weightstore.errors import CoverageError
from weightstore.names.given import describe
from weightstore.names.hints import prefix_advice
from weightstore.names.name_map import NameMap
from weightstore.names.plan import hinted, unused_rules
from weightstore.names.refusal import refusal
from weightstore.names.resolve import resolve
from weightstore.names.router import Router
from weightstore.names.rows import PROBLEMS, Kind, Row, Stored

_HINT: Final = (
    "; names went through the map published with the model (store.names), give names=NameMap(strip=False) "
    "to refit under stored names"
)


class Inlet:
    """One refit's. Thread-safe, as far as a set is."""

    def __init__(self, names: NameMap, stored: Stored, published: bool = False) -> None:
        """`published`: the caller gave no map; it is the model's."""
        self._router = Router(names)
        self._hint = _HINT if published else ""
        self._stored = stored
        self._used: set[int] = set()
        self._given = 0
        self._admitted = 0

    def admit(self, items: Iterable[tuple[str, Any]]) -> list[tuple[str, Any, Row]]:
        """What these named tensors are in the store: stored name, value, and which of its elements go where.

        Raises:
            CoverageError: names that have no place, or not of their dtype or shape; with likely ones.
            InvalidTensor: something the store cannot hold.
        """
        items = [(name, _shaped(name, value)) for name, value in items]
        rows = resolve(self._router, [describe(name, value) for name, value in items], self._stored)
        if any(row.kind in PROBLEMS for row in rows):
            rows = hinted(rows, [], self._stored)
            undeclared = [row.target for row in rows if row.kind is Kind.UNDECLARED and row.target]
            astray = [name for name in undeclared if name not in self._stored.records]
            more = list(filter(None, [prefix_advice(astray, self._stored.records)]))
            raise refusal(self._stored.what, rows, f"nothing was written by this call{self._hint}", more)
        values = dict(items)
        routed = [
            (row.target, values[row.source], row)
            for row in rows
            if row.target is not None and row.source is not None
        ]
        self._given += len(items)
        self._admitted += len(routed)
        self._used.update(number for row in rows for number in row.rules)
        return routed

    def check_used(self, alone: bool, wrote: bool) -> None:
        """Before the commit. Ranks of a shared refit (not `alone`) may each put what no rule is about, or
        nothing; `wrote` is whether this one has written something, through the map or past it.

        Raises:
            CoverageError: nothing that was given was written, or a rule matched nothing.
        """
        if not wrote and not self._admitted and (alone or self._given):
            why = (
                f"all {self._given} tensors given are dropped by its rules"
                if self._given
                else "none was given"
            )
            raise CoverageError(f"{self._stored.what} writes nothing: {why}")
        unused = unused_rules(self._router, self._used)
        if unused and alone and not self._stored.partial:
            raise CoverageError(
                f"{self._stored.what}: of {len(self._router.rules)} name rules {len(unused)} matched nothing "
                f"({'; '.join(unused)}); declare a rule optional=True if it need not match",
                unused=unused,
            )


def _shaped(name: str, value: Any) -> Any:
    """`value`, imported if it is an array that does not tell its shape (DLPack does not ask for it)."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return value
    from weightstore.tensors import as_tensor

    return as_tensor(name, value)
