"""Forwards of a component whose weights are not there raise before they touch unmapped memory.

Two layers. One pre-hook on the component's own module stays for good: it is traced into compiled
code, whose guards then hold for as long as the component is awake. While the component is not awake
every submodule that owns tensors carries the pre-hook as well, because pipelines also enter below
the top (`vae.decode`, one block of many); those are taken away at wake, so that forwards pay
nothing. A state dict is refused meanwhile too: what is saved from it would be zeros, or the end of the
process. A function that reads a weight outside any module call cannot be guarded.

A guard also says that its module is taken: two hooks would each move weights that the other answers for.
"""

from __future__ import annotations

from typing import Any, Final
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import nn
from torch.utils.hooks import RemovableHandle

from engine_hooks.find import owners, unwrap
from engine_hooks.lifecycle import State, refusal

_TAKEN: Final[WeakKeyDictionary[nn.Module, ReferenceType[Guard]]] = WeakKeyDictionary()
"""Modules with their guards; a hook that nobody holds any more takes nothing."""


def taken(module: nn.Module) -> bool:
    """Whether a hook that lives has a guard on `module`."""
    guard = _TAKEN.get(unwrap(module))
    return guard is not None and guard() is not None


class Gate:
    """The pre-hook. Callable and with one plain attribute, so that compilers can trace and guard it."""

    def __init__(self, component: str) -> None:
        self.component = component
        self.shut: State | None = None

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.shut is not None:
            raise refusal(self.shut, f"forward of {self.component!r} ({type(module).__name__})")

    def save(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        """The pre-hook of state dicts, which stands only while the component is not awake."""
        if self.shut is not None:
            raise refusal(self.shut, f"state_dict of {self.component!r} ({type(module).__name__})")


class Guard:
    """The gate of one component and where it stands. Open at first."""

    def __init__(self, component: str, module: nn.Module) -> None:
        self._gate = Gate(component)
        self._owners = owners(module)
        # A wrapper made by torch.compile is guarded too: its code may have been compiled before.
        tops = {id(top): top for top in (module, unwrap(module))}
        self._standing = [top.register_forward_pre_hook(self._gate, prepend=True) for top in tops.values()]
        self._asleep: list[RemovableHandle] = []
        self._module = unwrap(module)
        _TAKEN[self._module] = ref(self)

    def shut(self, state: State) -> None:
        """Refuse forwards and state dicts, for the reason that the component is in `state`."""
        self._gate.shut = state
        if not self._asleep:
            self._asleep = [o.register_forward_pre_hook(self._gate, prepend=True) for o in self._owners]
            untyped: list[Any] = list(self._owners)
            self._asleep += [o.register_state_dict_pre_hook(self._gate.save) for o in untyped]

    def open(self) -> None:
        for handle in self._asleep:
            handle.remove()
        self._asleep.clear()
        self._gate.shut = None

    def remove(self) -> None:
        """Take every hook off the modules. Idempotent."""
        self.open()
        for handle in self._standing:
            handle.remove()
        self._standing.clear()
        _TAKEN.pop(self._module, None)
