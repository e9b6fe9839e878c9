"""One error about all the rows that are wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from weightstore.errors import CoverageError
from weightstore.names.rows import PROBLEMS, Kind, Row

_SHOWN: Final = 8


def refusal(what: str, rows: Iterable[Row], end: str, more: Sequence[str] = ()) -> CoverageError:
    """What is wrong with `rows`, and what `more` there is to say; `end` is what came of it. `details` has
    stored names by kind."""
    wrong: dict[Kind, list[Row]] = {}
    for row in rows:
        if row.kind in PROBLEMS:
            wrong.setdefault(row.kind, []).append(row)
    reasons = []
    details: dict[str, Any] = {}
    for kind, some in wrong.items():
        shown = [_shown(row) for row in some[:_SHOWN]] + (["…"] if len(some) > _SHOWN else [])
        reasons.append(f"{len(some)} {kind.value} ({', '.join(shown)})")
        details["duplicate" if kind is Kind.CONFLICT else kind.value] = [row.target for row in some]
    return CoverageError(f"{what}: {'; '.join([*reasons, *more])}; {end}", **details)


def _shown(row: Row) -> str:
    text = row.target or ""
    if row.source is not None and row.source != row.target:
        text = f"{row.source} as {row.target}"
    remark = "; ".join(filter(None, (row.note, f"perhaps {row.hint}?" if row.hint else "")))
    return f"{text}: {remark}" if remark else text
