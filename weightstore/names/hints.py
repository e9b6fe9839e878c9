"""Which name was perhaps meant: close matches that stay fast for thousands of names."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from difflib import SequenceMatcher
from itertools import islice
from typing import Final

from weightstore.types import component_of

CUTOFF: Final = 0.7
"""Of difflib's ratio: below it a name is no likeness."""
NUMBER: Final = re.compile(r"(?<![^.])\d+(?![^.])")
"""A segment that is a layer's number."""

_LOOKED_AT: Final = 4
"""Names of which a prefix is guessed."""
_RANKED: Final = 8
"""Names that are compared letter by letter: those with the most words in common."""
_WORD: Final = re.compile(r"[A-Za-z]+|\d+")


def prefix_advice(astray: Collection[str], known: Collection[str]) -> str:
    """The prefix with which most of the names `astray` would be `known` ones; empty if none does that."""
    found: Counter[str] = Counter()
    for one in islice(astray, _LOOKED_AT):
        for prefix in {name.removesuffix(one) for name in known if name.endswith(f".{one}")}:
            found[prefix] = sum(prefix + name in known for name in astray)
    for component in {component_of(name) for name in known}:
        # Somebody wrote prefix='transformer'.
        rest = [name.removeprefix(component) for name in astray if name.startswith(component)]
        found[f"{component}."] += sum(f"{component}.{name}" in known for name in rest)
    prefix, count = found.most_common(1)[0] if found else ("", 0)
    return f"{count} would match with prefix={prefix!r}" if count and 2 * count >= len(astray) else ""


class Hints:
    """Finds likenesses among `names`."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = dict.fromkeys(names)
        self._with_word: defaultdict[str, list[str]] = defaultdict(list)
        for name in self._names:
            for word in set(_WORD.findall(name)):
                self._with_word[word].append(name)
        self._of_layers: dict[str, str | None] = {}

    def closest(self, name: str) -> str | None:
        """The likest name other than `name` itself: one that differs by a prefix, else by a few letters."""
        alike = NUMBER.sub("*", name)
        if alike in self._of_layers:
            # What was found for one layer is what is meant for the others, if they have it.
            known = self._of_layers[alike]
            numbers = iter(NUMBER.findall(name))
            meant = None if known is None else NUMBER.sub(lambda old: next(numbers, old[0]), known)
            if meant is None or (meant in self._names and meant != name):
                return meant
        found = self._search(name)
        self._of_layers[alike] = found
        return found

    def _search(self, name: str) -> str | None:
        # Rare words tell more: `norm_q` of block 17 is not likened to every `weight` there is.
        score: Counter[str] = Counter()
        for word in set(_WORD.findall(name)):
            having = self._with_word.get(word, ())
            for other in having:
                score[other] += 1 + 1000 // len(having)
        candidates = [other for other, _ in score.most_common(_RANKED + 1) if other != name]
        if not candidates and len(self._names) <= _RANKED:
            candidates = [other for other in self._names if other != name]
        best, best_ratio = None, CUTOFF
        for other in candidates:
            if other.endswith(f".{name}") or name.endswith(f".{other}"):
                return other
            ratio = SequenceMatcher(None, name, other, autojunk=False).ratio()
            if ratio > best_ratio:
                best, best_ratio = other, ratio
        return best
