"""A NameMap made ready: where a name goes, and by which rules. Nothing here knows shapes."""

from __future__ import annotations

import re
from typing import NamedTuple

from weightstore.names.name_map import NameMap
from weightstore.names.rules import Drop, Fuse, Rename, Rule, Split
from weightstore.names.templates import Template
from weightstore.names.wrappers import strip_wrappers


class Route(NamedTuple):
    """Where a name goes.

    `name` is the stored name it would have if no fuse or split took it, `rules` the numbers of those that
    matched. `end` is the one that ended it, if any: a Drop (`targets` empty), a Fuse (one target, of which
    this is number `piece`; `siblings` are the names of all pieces, as the rule sees them) or a Split.
    """

    name: str
    targets: tuple[str, ...]
    rules: tuple[int, ...] = ()
    end: Drop | Fuse | Split | None = None
    piece: int = 0
    siblings: tuple[str, ...] = ()


class Router:
    """Answers for one NameMap."""

    def __init__(self, names: NameMap) -> None:
        self.rules = names.rules
        self._prefix = names.prefix
        self._strip = names.strip
        self._steps = [(i, rule, _prepared(rule)) for i, rule in enumerate(names.rules)]

    def route(self, name: str) -> Route:
        used: list[int] = []
        if self._strip:
            name = strip_wrappers(name, after_component=not self._prefix)
        for number, rule, step in self._steps:
            if isinstance(step, re.Pattern):
                if not step.search(name):
                    continue
                used.append(number)
                if isinstance(rule, Drop):
                    return Route(self._prefix + name, (), tuple(used), rule)
                assert isinstance(rule, Rename)
                name = step.sub(rule.to, name)
            else:
                many, one = step
                route = self._fused(rule, many, one, name) or self._split(rule, many, one, name)
                if route is not None:
                    return route._replace(rules=(*used, number))
        return Route(self._prefix + name, (self._prefix + name,), tuple(used))

    def _fused(self, rule: Rule, many: list[Template], one: Template, name: str) -> Route | None:
        if isinstance(rule, Fuse):
            for piece, template in enumerate(many):
                if match := template.match(name):
                    siblings = tuple(other.fill(match) for other in many)
                    target = self._prefix + one.fill(match)
                    return Route(self._prefix + name, (target,), (), rule, piece, siblings)
        return None

    def _split(self, rule: Rule, many: list[Template], one: Template, name: str) -> Route | None:
        if isinstance(rule, Split) and (match := one.match(name)):
            targets = tuple(self._prefix + template.fill(match) for template in many)
            return Route(self._prefix + name, targets, (), rule)
        return None


def _prepared(rule: Rule) -> re.Pattern[str] | tuple[list[Template], Template]:
    if isinstance(rule, Fuse):
        return [Template(text) for text in rule.sources], Template(rule.into)
    if isinstance(rule, Split):
        return [Template(text) for text in rule.into], Template(rule.source)
    return re.compile(rule.pattern)
