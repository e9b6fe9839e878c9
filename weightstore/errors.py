"""Every error weightstore raises on purpose, in one tree.

Three branches say whose fault it is: `UsageError` (the caller asked for something that cannot be
done), `CircumstanceError` (the host, another process or the store got in the way) and
`ProtocolError` (the peer on the socket broke the protocol). A message names what was asked, the
numbers involved and what to do next. `details` holds the same facts for programs; it travels over
the control socket with the class name, so a client raises the very error the store raised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class WeightstoreError(Exception):
    """Base of all weightstore errors.

    Attributes:
        details: the facts behind the message (str, int, float, bool, None, lists and dicts of these).
    """

    registry: ClassVar[dict[str, type[WeightstoreError]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        WeightstoreError.registry[cls.__name__] = cls

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.details: dict[str, Any] = details

    @property
    def message(self) -> str:
        return str(self.args[0])


def from_wire(name: str, message: str, details: Mapping[str, Any]) -> WeightstoreError:
    """The error a peer reported, as the class it was raised with (or the base, if unknown here)."""
    error = WeightstoreError.registry.get(name, WeightstoreError)(message)
    error.details.update(details)
    return error


# -- the caller's fault ---------------------------------------------------------------------------


class UsageError(WeightstoreError):
    """The request itself is wrong; repeating it unchanged will fail again."""


class InvalidName(UsageError):
    """A model, tag or tensor name that the naming rules refuse."""


class UnknownTensor(UsageError, KeyError):
    """The version has no tensor of that name. Also a KeyError, as a mapping's should be."""

    __str__ = Exception.__str__  # KeyError's would show the message quoted


class InvalidTensor(UsageError):
    """A tensor whose dtype, shape, stride or layout the store cannot hold."""


class UnknownModel(UsageError):
    """No model of that name in the store."""


class UnknownTag(UsageError):
    """The model has no such tag."""


class UnknownVersion(UsageError):
    """The version never existed, or has been freed."""


class CoverageError(UsageError):
    """A refit did not write exactly what it declared; nothing changed.

    `details` may hold lists of names under `unknown`, `missing`, `duplicate`, `mismatched`,
    `overlapping`, `holes` and `undeclared`.
    """


class CastRefused(UsageError):
    """Values that do not fit the dtype they are stored in; `details["overflow"]` has the largest by name."""


class RefitConflict(UsageError):
    """Another refit of the same model and tag is open; `details["holder"]` names it."""


class RefitClosed(UsageError):
    """The refit was already committed or aborted."""


class VersionInUse(UsageError):
    """The operation would change or remove bytes that somebody leases or tags."""


class TagTorn(UsageError):
    """An in-place refit of this tag was begun and never committed: its bytes are not a version."""


class LeaseLost(UsageError):
    """The lease was released, or the store no longer honours it."""


class CheckpointError(UsageError):
    """A checkpoint file that is truncated, overlapping, oversized, or lies about itself."""


class AttachError(UsageError):
    """Modules that cannot be bound to the store's model bit-exactly; names every reason."""


class EngineAsleep(UsageError):
    """A forward, verify or refit that needs weights on the device while they are not."""


class EngineBroken(UsageError):
    """The device image is half-updated; only a full wake makes it usable again."""


class EngineBusy(UsageError):
    """Requests were still running when the drain timeout ended; the state is unchanged."""


# -- circumstances --------------------------------------------------------------------------------


class CircumstanceError(WeightstoreError):
    """Something outside the request got in the way; it may work later or elsewhere."""


class ArenaFull(CircumstanceError):
    """The arena cannot hold the bytes asked for. `details` has the numbers."""


class ArenaUnusable(CircumstanceError):
    """The shared-memory object is not a weightstore arena, or one of another layout, or in use."""


class RefitAborted(CircumstanceError):
    """The refit ended without a version because of somebody else (a rank died or never came)."""


class StorageError(CircumstanceError):
    """Reading or writing a checkpoint failed: disk full, no permission, I/O error."""


class StoreGone(CircumstanceError):
    """The store does not answer on its socket. Mapped weights stay readable."""


class StoreTimeout(CircumstanceError):
    """The awaited event did not happen in time; nothing changed."""


class StoreSilent(StoreTimeout):
    """The store is connected and did not answer a request in time. Whether that takes effect is unknown."""


class AccessDenied(CircumstanceError):
    """The store refused this peer's user id."""


class DeviceError(CircumstanceError):
    """The device refused an operation (for CUDA: names the call and the result)."""


class DeviceMemoryError(DeviceError):
    """Too little free device memory; the engine stays asleep and the wake can be retried."""


class DependencyMissing(CircumstanceError):
    """An optional package is needed for this; the message names the extra to install."""


# -- the peer's fault -----------------------------------------------------------------------------


class ProtocolError(WeightstoreError):
    """The peer sent something the protocol does not allow."""
