"""Dotted templates: how fuse and split rules pick out a run of segments of a name, whatever surrounds it.

`to_q` matches ``blocks.0.attn.to_q.weight`` and not ``blocks.0.attn.to_q_norm.weight``: a template stands
for whole segments, anywhere in the name (the last place, if there are several), and what comes before and
after is kept. ``*`` stands for any characters within one segment, also kept: the first star of one
template is the first star of the other.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from weightstore.errors import UsageError


class Match(NamedTuple):
    """What a template leaves open in a name. Equal for names that are alike but for the template."""

    head: str
    stars: tuple[str, ...]
    tail: str


class Template:
    """Raises UsageError for a text that is no dotted name."""

    def __init__(self, text: str) -> None:
        if not re.fullmatch(r"[!-~]+", text) or "" in text.split(".") or "**" in text:
            raise UsageError(
                f"template {text!r} is not made of whole segments of a tensor name, as 'to_q' or 'to_*' is"
            )
        self.text = text
        self.stars = text.count("*")
        inner = "([^.]*)".join(re.escape(fixed) for fixed in text.split("*"))
        self._pattern = re.compile(rf"((?:.+\.)?){inner}((?:\..+)?)")

    def match(self, name: str) -> Match | None:
        found = self._pattern.fullmatch(name)
        if found is None:
            return None
        head, *stars, tail = found.groups()
        return Match(head, tuple(stars), tail)

    def fill(self, match: Match) -> str:
        """The name that another template's match makes of this one; both have equally many stars."""
        fixed, *rest = self.text.split("*")
        middle = fixed + "".join(star + text for star, text in zip(match.stars, rest, strict=True))
        return f"{match.head}{middle}{match.tail}"
