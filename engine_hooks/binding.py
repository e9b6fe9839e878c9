"""Moving a component's tensors into its image, and out again.

Invariants:
- tensor objects keep their identity: modules, optimizers and compiled code that hold them see the same
  objects at new, fixed addresses;
- every slot has a storage of its own, as an ordinary tensor has, so that code that asks which tensors
  share memory (saving, copying, functionalisation) sees the module's ties and no others;
- `bind` binds all of a component's tensors or none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import torch
from torch import nn

from engine_hooks.find import Found
from engine_hooks.groups import raw_bytes, span
from engine_hooks.survey import Member, Survey
from weightstore.errors import AttachError
from weightstore.tensors import bits_of


class Binding:
    """The tensors of one component, where `surveyed` says, in `image`: a uint8 tensor over all of it."""

    def __init__(self, surveyed: Survey, image: torch.Tensor) -> None:
        self._survey = surveyed
        self._image = image
        self._undo: list[Callable[[], None]] = []
        self._state: list[tuple[int, torch.Tensor]] = []
        self._weights: list[tuple[Found, int]] = []
        self._by_slot: dict[int, list[tuple[Found, int]]] = {}

    def copy_state_in(self) -> None:
        """Copy the engine state's bytes from where they were before `bind` to their place in the image, which
        has to be mapped."""
        for offset, raw in self._state:
            self._image[offset : offset + raw.numel()].copy_(raw)

    def bind(self) -> None:
        """Give every tensor its memory in the image, which need not be mapped yet: its bytes are not touched.
        AttachError names a tensor that refuses it."""
        members = self._survey.members
        self._state = [(m.offset, raw_bytes(m.found.tensor)) for m in members if not m.weight]
        slots: dict[tuple[int, int], torch.Tensor] = {}
        for member in self._survey.members:
            key = (member.slot, member.room)
            if key not in slots:
                slots[key] = _own_storage(self._image, *key)
            tensor = member.found.tensor
            try:
                self._undo.append(_rebind(tensor, _view(slots[key], member)))
            except RuntimeError as error:
                self.unbind()
                raise AttachError(
                    f"{member.found.name} cannot be given memory in the image: {error}",
                    unbindable=[member.found.name],
                ) from error
            if member.weight:
                self._weights.append((member.found, tensor.data_ptr()))
                self._by_slot.setdefault(member.slot, []).append(self._weights[-1])

    def unbind(self) -> None:
        """Put back what the tensors were before `bind`, in reverse order."""
        while self._undo:
            self._undo.pop()()
        self._state.clear()
        self._weights.clear()
        self._by_slot.clear()
        self.__dict__.pop("_expected", None)

    def forget_origin(self) -> None:
        """Let go of what the tensors were before, once there is no way back: its memory is freed."""
        self._undo.clear()
        self._state.clear()

    def moved(self, slots: Iterable[int] | None = None) -> list[str]:
        """Weights (of these slots; None: all) that somebody replaced, or gave other memory, since: the image
        no longer reaches them."""
        if slots is not None:
            return _strays(weight for slot in slots for weight in self._by_slot.get(slot, ()))
        # On the path of every wake, so what usually holds is asked of all tensors at once.
        tensors, addresses, places = self._expected
        in_place = [tensor.data_ptr() for tensor in tensors] == addresses
        if in_place and all(table.get(key) is tensor for table, key, tensor in places):
            return []
        return _strays(self._weights)

    def take_back(self) -> list[str]:
        """Put back into the image what only moved: weights whose tensors have their dtype, shape and bits
        still, but other memory, as ``module.to(memory_format=…)`` gives them. They get the image's memory
        order. The image must be mapped. Returns the names of those that are gone: replaced, or changed.
        """
        lost = []
        for member in self._members_moved():
            tensor = member.found.tensor
            view = _view(_own_storage(self._image, member.slot, member.room), member)
            shown = all(table.get(key) is tensor for table, key in member.found.places)
            same = tensor.dtype == view.dtype and tensor.shape == view.shape and tensor.device == view.device
            if shown and same and torch.equal(bits_of(tensor), bits_of(view)):
                _rebind(tensor, view)
            else:
                lost.append(member.found.name)
        return lost

    def _members_moved(self) -> list[Member]:
        names = set(self.moved())
        return [m for m in self._survey.members if m.weight and m.found.name in names] if names else []

    @cached_property
    def _expected(self) -> tuple[list[torch.Tensor], list[int], list[tuple[Any, Any, torch.Tensor]]]:
        """The bound weights, their addresses, and where modules must show each of them."""
        founds = [found for found, _ in self._weights]
        places = [(table, key, found.tensor) for found in founds for table, key in found.places]
        return [found.tensor for found in founds], [address for _, address in self._weights], places

    def mark_changed(self, slots: Iterable[int]) -> None:
        """Raise autograd's version of every tensor in these slots, so that caches keyed on it see it."""
        for slot in slots:
            for found, _ in self._by_slot.get(slot, ()):
                torch.autograd.graph.increment_version(found.tensor)

    def leave(self, keep_weights: bool, state: torch.Tensor) -> None:
        """Move every tensor out of the image: engine state to private copies (its bytes are given as
        `state`), weights to private copies too or to the meta device."""
        base = self._survey.state_offset
        private: dict[tuple[int, int], torch.Tensor] = {}
        for member in self._survey.members:
            if member.weight and not keep_weights:
                _to_meta(member.found)
                continue
            key = (member.slot, member.room)
            if key not in private:
                source, start = (self._image, member.slot) if member.weight else (state, member.slot - base)
                private[key] = source[start : start + member.room].to(self._image.device, copy=True)
            _rebind(member.found.tensor, _view(private[key], member))
        self._weights.clear()
        self._by_slot.clear()
        self._undo.clear()
        self.__dict__.pop("_expected", None)


def _strays(weights: Iterable[tuple[Found, int]]) -> list[str]:
    """Names of those that are not where they were bound, or that modules no longer show."""
    return [
        found.name
        for found, address in weights
        if found.tensor.data_ptr() != address
        or any(table.get(key) is not found.tensor for table, key in found.places)
    ]


def _own_storage(image: torch.Tensor, offset: int, nbytes: int) -> torch.Tensor:
    """A uint8 view of part of the image that has a storage of its own (DLPack makes one)."""
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8, device=image.device)
    part: torch.Tensor = torch.utils.dlpack.from_dlpack(image[offset : offset + nbytes])
    return part


def _view(slot: torch.Tensor, member: Member) -> torch.Tensor:
    """The member's tensor over its slot's bytes, with its dtype, shape, stride and conjugation."""
    like = member.found.tensor
    inside = member.offset - member.slot
    nbytes = span(like.shape, member.stride, like.itemsize)
    if nbytes:
        view = slot[inside : inside + nbytes].view(like.dtype).as_strided(like.shape, member.stride)
    else:
        view = torch.empty_strided(like.shape, member.stride, dtype=like.dtype, device=slot.device)
    if like.is_conj():
        view = view.conj()
    return torch._neg_view(view) if like.is_neg() else view


def _rebind(tensor: torch.Tensor, view: torch.Tensor) -> Callable[[], None]:
    """Make `tensor` the same object over other memory; returns how to take it back.

    torch refuses `.data` between meta and real devices, and leaves an inference tensor without a version
    to raise; then the innards of two tensors are swapped instead.
    """
    if tensor.device.type != "meta" and not tensor.is_inference():
        before = tensor.data
        tensor.data = view

        def restore() -> None:
            tensor.data = before

        return restore
    other = _disguised(view, tensor)
    _swap(tensor, other)
    return lambda: _swap(tensor, other)


def _disguised(view: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`view` with the class and the attributes of `like`, which change sides in a swap."""
    other = nn.Parameter(view, like.requires_grad) if isinstance(like, nn.Parameter) else view
    other.__class__ = type(like)
    other.__dict__.update(like.__dict__)
    return other


def _swap(one: torch.Tensor, other: torch.Tensor) -> None:
    """Exchange the innards of two tensor objects. RuntimeError if something holds on to one of them."""
    torch.utils.swap_tensors(one, other)  # type: ignore[no-untyped-call]


def _to_meta(found: Found) -> None:
    """Put a weight on the meta device; if the object itself cannot go there, a new one takes its places."""
    tensor = found.tensor
    shape, stride = tensor.shape, tensor.stride()
    other = _disguised(torch.empty_strided(shape, stride, dtype=tensor.dtype, device="meta"), tensor)
    try:
        _swap(tensor, other)
    except RuntimeError:
        # Somebody holds a weak reference (compiled code does): that object must not keep image memory.
        for table, key in found.places:
            table[key] = other
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
