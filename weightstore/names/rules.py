"""The rules of a NameMap as plain values: what each says, checked when it is made, and how JSON spells it."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from weightstore.errors import UsageError
from weightstore.names.templates import Template


class _Rule(msgspec.Struct, frozen=True, tag_field="rule", omit_defaults=True, forbid_unknown_fields=True):
    pass


class Rename(_Rule, frozen=True, tag="rename"):
    """Replace every match of a regular expression, as `re.sub` does, and go on with the next rule."""

    pattern: str
    to: str
    optional: bool = False

    def __post_init__(self) -> None:
        compiled = _regex(self.pattern)
        try:
            compiled.sub(self.to, "")
        except (re.error, IndexError) as error:
            raise UsageError(f"{self}: {self.to!r} cannot replace {self.pattern!r}: {error}") from None

    def __str__(self) -> str:
        return f"rename({self.pattern!r} to {self.to!r})"


class Drop(_Rule, frozen=True, tag="drop"):
    """Write nothing for names in which a regular expression is found."""

    pattern: str
    optional: bool = False

    def __post_init__(self) -> None:
        _regex(self.pattern)

    def __str__(self) -> str:
        return f"drop({self.pattern!r})"


class Fuse(_Rule, frozen=True, tag="fuse"):
    """Several tensors, one after another along `dim`, are one stored tensor.

    `shares` are their relative sizes along `dim`, equal if not given; needed only where they differ and
    the tensors come one by one. With `keep` each is stored under its own name as well.
    """

    sources: tuple[str, ...]
    into: str
    dim: int = 0
    shares: tuple[int, ...] | None = None
    keep: bool = False
    optional: bool = False

    def __post_init__(self) -> None:
        _check_pieces(self, self.sources, self.into, self.shares)

    def __str__(self) -> str:
        return f"fuse({', '.join(self.sources)} into {self.into})"


class Split(_Rule, frozen=True, tag="split"):
    """One tensor is several stored ones, cut along `dim`.

    Where the store has them their sizes are theirs; elsewhere `shares` says, equal if not given.
    """

    source: str
    into: tuple[str, ...]
    dim: int = 0
    shares: tuple[int, ...] | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        _check_pieces(self, self.into, self.source, self.shares)

    def __str__(self) -> str:
        return f"split({self.source} into {', '.join(self.into)})"


Rule = Rename | Drop | Fuse | Split


def _regex(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{pattern!r} is not a regular expression: {error}") from None


def _check_pieces(rule: Any, many: tuple[str, ...], one: str, shares: tuple[int, ...] | None) -> None:
    if len(many) < 2 or len(set(many)) != len(many):
        raise UsageError(f"{rule} needs two or more different templates on its many side")
    counts = {text: Template(text).stars for text in (*many, one)}
    if len(set(counts.values())) != 1:
        raise UsageError(f"{rule}: all its templates must have equally many stars, not {counts}")
    if shares is not None and (len(shares) != len(many) or min(shares) < 1):
        raise UsageError(f"{rule}: shares {shares} must be {len(many)} positive numbers")
