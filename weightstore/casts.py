"""Casting to the stored dtype: which casts a refit makes, and whether the values survive them.

A cast is torch's own, made on the device where the tensor is and equal bit for bit to ``tensor.to(dtype)``.
`refusal` decides from two dtypes alone and needs no torch; `refuse_overflow` looks at the values.

Invariant: under ``cast="safe"`` no finite number becomes infinite, is cut down to the largest there is or
wraps around, and numbers stay of their kind: floats floats, integers integers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Final, Literal, get_args

from weightstore.errors import CastRefused, UsageError
from weightstore.types import ITEMSIZE

if TYPE_CHECKING:
    import torch

Cast = Literal["safe", "any", "never"]
"""``safe``: between dtypes of one kind, if every value fits; ``any``: all that torch can; ``never``: none."""

OVERFLOWS_FROM: Final[dict[str, float]] = {
    "float8_e4m3fn": math.nextafter(464.0, math.inf),
    "float8_e5m2": 61440.0,
    "float16": 65520.0,
    "bfloat16": 2.0**128 - 2.0**119,
    "float32": 2.0**128 - 2.0**103,
    "float64": math.inf,
}
"""The least magnitude that no longer rounds to a finite number of that dtype, to nearest and ties to even."""

WITHOUT_INF: Final = frozenset({"float8_e4m3fn"})
"""Dtypes in which an infinity would become an ordinary number, or none."""

_SHOWN: Final = 8


def check_mode(cast: str) -> Cast:
    """Return a valid `cast`, or raise UsageError."""
    for mode in get_args(Cast):
        if cast == mode:
            return mode  # type: ignore[no-any-return]
    raise UsageError(f"cast is {cast!r}; it can be {', '.join(map(repr, get_args(Cast)))}")


def kind_of(dtype: str) -> str:
    """``bool``, ``int``, ``float`` or ``complex``."""
    if dtype in OVERFLOWS_FROM:
        return "float"
    return dtype if dtype == "bool" else "complex" if dtype.startswith("complex") else "int"


def refusal(given: str, stored: str, cast: Cast) -> str:
    """Why values of dtype `given` are not cast to `stored`, whatever they are; empty if they may be."""
    if given == stored or cast == "any":
        return ""
    if cast == "never":
        return 'cast="never"'
    if kind_of(given) != kind_of(stored):
        return f'{kind_of(given)} becomes {kind_of(stored)} with cast="any" only'
    return ""


def always_fits(given: str, stored: str) -> bool:
    """Whether every value of dtype `given` has one of dtype `stored` to become, however rounded."""
    if given == stored:
        return True
    if kind_of(given) == kind_of(stored) == "float":
        return OVERFLOWS_FROM[given] <= OVERFLOWS_FROM[stored] and stored not in WITHOUT_INF
    if kind_of(given) == kind_of(stored) == "int":
        (low, high), (least, most) = range_of(given), range_of(stored)
        return least <= low and high <= most
    return False


def range_of(dtype: str) -> tuple[int, int]:
    """Least and largest value of an integer dtype."""
    bits = 8 * ITEMSIZE[dtype]
    return (0, 2**bits - 1) if dtype.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def refuse_overflow(wanted: Iterable[tuple[str, torch.Tensor, str]], what: str) -> None:
    """Look at the values of (name, tensor, stored dtype). One pass at memory speed where a cast narrows the
    range, none where it does not; tensors on a device are looked at there, and waited for once.

    Raises:
        CastRefused: with all names whose values do not fit, and the largest of each.
    """
    from weightstore.tensors import NAMES

    narrowed = [
        (name, tensor, stored)
        for name, tensor, stored in wanted
        if tensor.numel() and kind_of(NAMES[tensor.dtype]) == kind_of(stored) in ("int", "float")
        if not always_fits(NAMES[tensor.dtype], stored)
    ]
    found: dict[str, float] = {}
    notes = []
    for (name, tensor, stored), (low, high) in zip(
        narrowed, _extremes([tensor for _, tensor, _ in narrowed]), strict=True
    ):
        worst = _worst(tensor, stored, low, high)
        if worst is not None:
            found.setdefault(name, worst)
            notes.append(f"{name}: {worst:g} in {NAMES[tensor.dtype]} does not fit {stored}")
    if found:
        shown = "; ".join(notes[:_SHOWN]) + ("; …" if len(notes) > _SHOWN else "")
        raise CastRefused(
            f"{what}: values of {len(found)} tensors overflow the dtype they are stored in ({shown}); "
            "nothing was written by this call. Mend them, store the tensors in a wider dtype, or pass "
            'cast="any"',
            overflow=found,
        )


def _worst(tensor: torch.Tensor, stored: str, low: float, high: float) -> float | None:
    """The value furthest out of `stored`'s range, given the extremes of `tensor`."""
    if kind_of(stored) == "int":
        least, most = range_of(stored)
        if low >= least and high <= most:
            return None
        return high if high > most else low
    limit = OVERFLOWS_FROM[stored]
    if max(_rounded(-low, tensor, stored), _rounded(high, tensor, stored)) < limit:
        return None
    if math.isnan(low) or (math.isinf(max(-low, high)) and stored not in WITHOUT_INF):
        # Among numbers that stay what they are, the largest finite one decides.
        low, high = _finite_extremes(tensor, stored in WITHOUT_INF)
    far = high if high >= -low else low
    return far if _rounded(abs(far), tensor, stored) >= limit else None


def _rounded(value: float, tensor: torch.Tensor, stored: str) -> float:
    """`value`, an element of `tensor`, as it is when torch rounds it to `stored`: on the way from float64 to
    less than float32 it was rounded to that before."""
    import torch

    if tensor.dtype != torch.float64 or stored == "float32":
        return value
    return torch.tensor(value, dtype=torch.float64).float().item()


def _extremes(tensors: Sequence[torch.Tensor]) -> list[tuple[float, float]]:
    """Least and largest value of each; NaN for both if there is one."""
    import torch

    found: list[tuple[float, float]] = []
    for _, group in groupby(tensors, key=lambda tensor: (tensor.device, tensor.dtype)):
        same = list(group)
        each = [torch.stack(_aminmax(tensor.detach())) for tensor in same]
        for low, high in torch.stack(each).tolist():  # one wait for all of them
            wrapped = same[0].dtype == torch.uint64 and low < 0
            found.append((0, low + 2**64) if wrapped else (low, high))
    return found


def _aminmax(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.aminmax, also of dtypes that it does not know."""
    import torch

    wider = {1: torch.float32, 2: torch.int64, 4: torch.int64}
    if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32):
        parts = [torch.stack(torch.aminmax(part)) for part in _pieces(tensor, wider[tensor.element_size()])]
        lows, highs = torch.stack(parts).unbind(1)
        return lows.amin(), highs.amax()
    # The large half of uint64 looks negative here.
    low, high = torch.aminmax(tensor.view(torch.int64) if tensor.dtype == torch.uint64 else tensor)
    return low, high


def _finite_extremes(tensor: torch.Tensor, infinite: bool) -> tuple[float, float]:
    """Least and largest number in `tensor` (at most and at least 0), NaNs aside, and infinities too unless
    `infinite`."""
    import torch

    low = high = 0.0
    for part in _pieces(tensor.detach(), torch.float64):
        part = part.nan_to_num(0.0, math.inf if infinite else 0.0, -math.inf if infinite else 0.0)
        least, most = torch.aminmax(part)
        low, high = min(low, float(least)), max(high, float(most))
    return low, high


def _pieces(tensor: torch.Tensor, dtype: torch.dtype) -> Iterable[torch.Tensor]:
    """All elements as `dtype`, some at a time."""
    from weightstore.tensors import PIECE, tiles

    for tile in tiles(tensor.shape, PIECE):
        yield tensor[tile].to(dtype)
