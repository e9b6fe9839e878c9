"""A name map from examples: what SGLang's loader made of each name in a checkpoint.

SGLang renames a checkpoint's tensors, and joins some of them, by the regular expressions in a model's
`param_names_mapping`, tried again and again and taken back where the model has no such parameter. What came
of it for every tensor of the checkpoint is known after a load. From that this module makes rules that do
the same to a trainer's names. Pure: neither torch nor SGLang.

Invariants:
- the map does to every example exactly what SGLang did, or `name_map` raises;
- examples that differ in layer numbers only share a rule, and every rule is anchored to a whole name, so
  names that SGLang leaves alone are left alone and the order of the rules means nothing.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from math import gcd
from typing import NamedTuple

from weightstore.errors import UsageError
from weightstore.names import NameMap
from weightstore.names.router import Router


class Example(NamedTuple):
    """One tensor of a checkpoint and what it became; names begin with the component.

    `target` None: nothing. `piece` of `pieces`: it is one of several joined along dimension 0, of `rows`.
    """

    source: str
    target: str | None
    piece: int | None = None
    pieces: int | None = None
    rows: int = 0


class _General(NamedTuple):
    """A name whose numbered segments that `target` repeats are left open (None)."""

    source: tuple[str | None, ...]
    target: tuple[str | None, ...]


def name_map(examples: Iterable[Example]) -> NameMap:
    """The map that does to each example's source what was done to it.

    Raises:
        UsageError: there is none, since two examples contradict each other.
    """
    examples = list(examples)
    literal: set[str] = set()
    while True:
        made = _made(examples, literal)
        wrong = {example.source for example in examples if not _agrees(made, example)}
        if not wrong:
            return NameMap(rules=made.rules)
        if wrong <= literal:
            raise UsageError(f"no name map does what SGLang did to {', '.join(sorted(wrong)[:5])}")
        literal |= wrong  # what was left open said something else of these: they get rules of their own


def _agrees(router: Router, example: Example) -> bool:
    route = router.route(example.source)
    targets = () if example.target is None else (example.target,)
    return route.targets == targets and (example.piece is None or route.piece == example.piece)


def _made(examples: Sequence[Example], literal: Collection[str]) -> Router:
    names = NameMap()
    joined: defaultdict[str, list[Example]] = defaultdict(list)
    moved: dict[tuple[tuple[str | None, ...], tuple[str | None, ...]], dict[str, None]] = {}
    dropped: dict[str, None] = {}
    # Rules for one name only come before those that would say something else of it.
    for example in sorted(examples, key=lambda example: example.source not in literal):
        if example.target is None:
            dropped[_pattern(_general(example.source, "", example.source in literal).source)] = None
        elif example.piece is not None:
            joined[example.target].append(example)
        elif example.target != example.source:
            general = _general(example.source, example.target, example.source in literal)
            # The last segment (weight, bias) is usually kept: one rule for all that a module has.
            if general.source[-1] == general.target[-1] and general.source[-1] is not None:
                moved.setdefault((general.source[:-1], general.target[:-1]), {})[general.source[-1]] = None
            else:
                moved.setdefault(general, {})
    for (source, target), leaves in moved.items():
        names = _renamed(names, source, target, list(leaves))
    for fuse, shares in _fuses(joined, literal).items():
        sources, into = fuse
        shared = next(iter(shares)) if len(shares) == 1 else None
        equal = shared is None or len(set(shared)) == 1
        names = names.fuse(sources, into, shares=None if equal else shared, optional=True)
    for pattern in dropped:
        names = names.drop(pattern, optional=True)
    return Router(names)


def _renamed(
    names: NameMap, source: tuple[str | None, ...], target: tuple[str | None, ...], leaves: list[str]
) -> NameMap:
    numbers = iter(range(1, 1 + len(target)))
    # `\g<1>`: a digit may follow.
    to = ".".join(f"\\g<{next(numbers)}>" if part is None else part.replace("\\", r"\\") for part in target)
    pattern = _pattern(source)
    if leaves:
        pattern = f"{pattern[:-1]}(\\.(?:{'|'.join(map(re.escape, leaves))}))$"
        to += f"\\g<{next(numbers)}>"
    return names.rename(pattern, to, optional=True)


def _pattern(parts: Sequence[str | None]) -> str:
    return "^" + r"\.".join(r"(\d+)" if part is None else re.escape(part) for part in parts) + "$"


def _fuses(
    joined: dict[str, list[Example]], literal: Collection[str]
) -> dict[tuple[tuple[str, ...], str], set[tuple[int, ...]]]:
    """Templates of the pieces and of what they become, with the pieces' proportions in every example."""
    fuses: defaultdict[tuple[tuple[str, ...], str], set[tuple[int, ...]]] = defaultdict(set)
    for target, members in joined.items():
        members = sorted(members, key=lambda member: member.piece or 0)
        if [member.piece for member in members] != list(range(members[0].pieces or 0)):
            raise UsageError(
                f"{target} is made of {members[0].pieces} pieces, of which the checkpoint has "
                f"{', '.join(member.source for member in members)}"
            )
        alone = any(member.source in literal for member in members)
        generals = [_general(member.source, target, alone) for member in members]
        if len({general.target for general in generals}) != 1:
            generals = [_general(member.source, target, True) for member in members]
        sources = tuple(_template(general.source) for general in generals)
        into = _template(generals[0].target)
        while _last(into) and all(_last(text) == _last(into) for text in sources):
            sources, into = tuple(text.rpartition(".")[0] for text in sources), into.rpartition(".")[0]
        common = gcd(*(member.rows for member in members)) or 1
        fuses[sources, into].add(tuple(member.rows // common for member in members))
    return fuses


def _template(parts: Sequence[str | None]) -> str:
    return ".".join("*" if part is None else part for part in parts)


def _last(template: str) -> str:
    """The last segment of a template that has others and is not open."""
    head, _, last = template.rpartition(".")
    return last if head and last != "*" else ""


def _general(source: str, target: str, literal: bool) -> _General:
    """Leave open the numbers that `target` has from `source`, in order; without `target`, all of them."""
    given, wanted = source.split("."), target.split(".")
    if literal:
        return _General(tuple(given), tuple(wanted))
    if not target:
        return _General(tuple(None if part.isdigit() else part for part in given), ())
    opened: list[str | None] = list(given)
    made: list[str | None] = list(wanted)
    start = 0
    for i, part in enumerate(wanted):
        if part.isdigit() and part in given[start:]:
            at = given.index(part, start)
            opened[at] = made[i] = None
            start = at + 1
    return _General(tuple(opened), tuple(made))
