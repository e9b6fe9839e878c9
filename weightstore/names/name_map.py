"""NameMap: what a trainer's names become, declared once. Immutable, comparable, and JSON.

The order of things, for every name:
1. wrappers are stripped (`wrappers`), unless ``strip=False``;
2. rules apply in the order they were declared. A rename hands its result to the rules after it; the first
   drop, fuse or split that matches is the end;
3. `prefix` is put in front of the stored name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import msgspec

from weightstore.errors import UsageError
from weightstore.names.rules import Drop, Fuse, Rename, Rule, Split


class NameMap(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How source names become stored names; each method returns a new map with one more rule.

        NameMap(prefix="transformer.").rename(r"^net\\.", "").fuse(["to_q", "to_k", "to_v"], "to_qkv")

    A rule that matches nothing is an error unless it is declared `optional`.

    Attributes:
        prefix: put in front of every stored name: ``transformer.`` for names that lack their component.
        strip: take off what DDP, FSDP, torch.compile and PEFT add to names.
        rules: in order.
        format: of the JSON form.
    """

    prefix: str = ""
    strip: bool = True
    rules: tuple[Rule, ...] = ()
    format: Literal[1] = 1

    def rename(self, pattern: str, to: str, *, optional: bool = False) -> NameMap:
        """Replace what the regular expression `pattern` finds by `to` (``\\1`` is its first group).

        Raises:
            UsageError: not a regular expression, or a replacement that does not fit it.
        """
        return self._with(Rename(pattern, to, optional))

    def fuse(
        self,
        sources: Sequence[str],
        into: str,
        *,
        dim: int = 0,
        shares: Sequence[int] | None = None,
        keep: bool = False,
        optional: bool = False,
    ) -> NameMap:
        """Write tensors one after another into one stored tensor, in the order of `sources`.

        Args:
            sources, into: templates: ``to_q`` stands for ``….to_q.weight`` and ``….to_q.bias``, ``*`` for
                any characters within a segment (see `templates`).
            dim: the dimension along which they follow one another; negative counts from the end.
            shares: their relative sizes along `dim`, for tensors of unequal size that are put one by one.
            keep: store each under its own name too, as diffusers' `fuse_qkv_projections` does.

        Raises:
            UsageError: fewer than two sources, templates that do not fit together, shares of another number.
        """
        return self._with(Fuse(tuple(sources), into, dim, _shares(shares), keep, optional))

    def split(
        self,
        source: str,
        into: Sequence[str],
        *,
        dim: int = 0,
        shares: Sequence[int] | None = None,
        optional: bool = False,
    ) -> NameMap:
        """The inverse of `fuse`: cut one tensor along `dim` into several stored ones.

        Raises:
            UsageError: as `fuse`.
        """
        return self._with(Split(source, tuple(into), dim, _shares(shares), optional))

    def drop(self, pattern: str, *, optional: bool = False) -> NameMap:
        """Write nothing for names in which the regular expression `pattern` is found.

        Raises:
            UsageError: not a regular expression.
        """
        return self._with(Drop(pattern, optional))

    def relaxed(self) -> NameMap:
        """The same map, none of whose rules need match."""
        return msgspec.structs.replace(
            self, rules=tuple(msgspec.structs.replace(rule, optional=True) for rule in self.rules)
        )

    def to_json(self) -> str:
        """Indented JSON that `from_json` reads."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> NameMap:
        """Raises UsageError saying what is wrong, and where."""
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise UsageError(f"not a name map: {error}") from None

    def _with(self, rule: Rule) -> NameMap:
        return msgspec.structs.replace(self, rules=(*self.rules, rule))


AS_STORED: Final = NameMap(strip=False)
"""The map that changes nothing: names are those of the store."""


def _shares(shares: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if shares is None else tuple(shares)
