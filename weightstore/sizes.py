"""Byte counts as people write and read them. Pure."""

from __future__ import annotations

import re
from typing import Final

from weightstore.errors import UsageError

_UNITS: Final[dict[str, int]] = {
    "": 1,
    "b": 1,
    **{unit: 1000 ** (i + 1) for i, unit in enumerate(("k", "m", "g", "t"))},
    **{f"{unit}b": 1000 ** (i + 1) for i, unit in enumerate(("k", "m", "g", "t"))},
    **{f"{unit}ib": 1024 ** (i + 1) for i, unit in enumerate(("k", "m", "g", "t"))},
}
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_size(text: str) -> int:
    """Bytes in '64GiB', '1.5 GiB', '500MB' or '4096'. UsageError for anything else."""
    match = _SIZE.fullmatch(text)
    factor = _UNITS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise UsageError(
            f"{text!r} is not a size: write a number of bytes, or a number with KiB, MiB, GiB, TiB, kB, MB, "
            "GB or TB"
        )
    whole, _, fraction = match[1].partition(".")
    # In integers: a float would lose the last bytes of large exact sizes.
    return int(whole) * factor + (int(fraction) * factor // 10 ** len(fraction) if fraction else 0)


def format_size(nbytes: int) -> str:
    """`nbytes` with the largest binary unit that keeps it at least 1, e.g. '31.4 GiB', '512 B'."""
    value, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, larger
    text = f"{value:.1f}" if abs(value) < 100 and unit != "B" else f"{value:.0f}"
    return f"{text.removesuffix('.0')} {unit}"
