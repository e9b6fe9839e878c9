"""A transformer that the store has is built without its files; of another, what its loader did is noted.

SGLang builds a transformer on meta, reads its checkpoint tensor by tensor, renames, and assigns. All of that
is one function, with an iterator over files that are not opened before the first tensor is asked for. If
the store holds exactly the parameters that the module has, they get placeholders instead: of the right shape
and dtype on the right device, over one element of memory. They become meta tensors just before the hook is
attached, and are filled from the arena then.

Invariants:
- a module with placeholders is never left to SGLang: what would leave it is looked at before;
- the version is leased from the moment it was looked at until the hook holds it;
- a module that computes something from its weights while it is loaded is read from its files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from engine_hooks.integrations.sglang_diffusion.names import Example
from engine_hooks.integrations.sglang_diffusion.ownership import rereads
from weightstore.errors import AttachError, TagTorn, UnknownModel, UnknownTag
from weightstore.types import TensorRecord, component_of

if TYPE_CHECKING:
    from weightstore.client import Store
    from weightstore.reader import Lease

Mapped = Callable[[str], tuple[str | None, int | None, int | None]]
"""SGLang's own answer to a checkpoint's name: the parameter's name, and which of how many pieces of it."""

_log = logging.getLogger("engine_hooks")


class Loaded(NamedTuple):
    """What was noted of one component's load."""

    model: nn.Module
    placeholders: bool
    examples: list[Example]


class Loading:
    """The loads of one engine's components, before its hook is attached."""

    def __init__(self, store: Callable[[], Store], model: str, tag: str) -> None:
        self._store = store
        self._model = model
        self._tag = tag
        self._component: str | None = None
        self._lease: Lease | None = None
        self.loaded: dict[str, Loaded] = {}

    @contextmanager
    def of(self, component: str | None) -> Iterator[None]:
        """Around the load of a component; None if its weights are not to come from the store."""
        outer, self._component = self._component, component
        try:
            yield
        finally:
            self._component = outer

    def load(
        self,
        original: Callable[..., Any],
        model: nn.Module,
        weights: Iterable[tuple[str, Any]],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """In place of SGLang's function; `weights` are the checkpoint's names and tensors."""
        component = self._component
        mapped: Mapped | None = kwargs.get("param_names_mapping")
        if component is None or mapped is None or kwargs.get("preconverted_state_dict") is not None:
            return original(model, weights, *args, **kwargs)
        why = self._unlike(component, model)
        if why is None:
            device: Any = kwargs["checkpoint_load_device"] if "checkpoint_load_device" in kwargs else args[0]
            answer = fill_with_placeholders(model, torch.device(device))
            self.loaded[component] = Loaded(model, True, [])
            return answer
        _log.info("weightstore: %s is read from its files, since %s", component, why)
        examples: list[Example] = []
        self.loaded[component] = Loaded(model, False, examples)
        targets = set(model.state_dict())
        noted = noting(
            weights, lambda name, rows: examples.append(example(component, name, rows, mapped, targets))
        )
        return original(model, noted, *args, **kwargs)

    def _unlike(self, component: str, model: nn.Module) -> str | None:
        """Why the store cannot fill this module, or None; leases the version if it can."""
        lease = self._held()
        if lease is None:
            return f"the store has no {self._model!r} yet"
        return unlike(component, model, lease.records) or computed(model)

    def _held(self) -> Lease | None:
        if self._lease is None:
            try:
                self._lease = self._store().lease(self._model, tag=self._tag)
            except UnknownModel:
                return None
            except (UnknownTag, TagTorn) as error:
                raise AttachError(f"the engine cannot start: {error}") from error
        return self._lease

    @property
    def records(self) -> Mapping[str, TensorRecord] | None:
        """Those of the version that the tag names; None if the store lacks the model."""
        lease = self._held()
        return None if lease is None else lease.records

    def take_placeholders_away(self, modules: Mapping[str, nn.Module]) -> None:
        """Put every module that has placeholders on meta, ready to be attached.

        Raises:
            AttachError: the pipeline has another module in its place.
        """
        for component, loaded in self.loaded.items():
            if loaded.placeholders:
                if modules.get(component) is not loaded.model:
                    raise AttachError(
                        f"{component} was built without weights, to be filled from the store, and then "
                        "replaced or left to SGLang; unset WEIGHTSTORE_MODEL"
                    )
                to_meta(loaded.model)

    def close(self) -> None:
        """Let go of the version: the hook holds it now, or nobody will."""
        if self._lease is not None:
            self._lease.release()
            self._lease = None


def example(component: str, name: str, rows: int, mapped: Mapped, targets: set[str]) -> Example:
    """What SGLang makes of one name of the checkpoint; where its model lacks the result it keeps the name."""
    target, piece, pieces = mapped(name)
    if target and target != name and target not in targets and name in targets:
        target, piece, pieces = name, None, None
    source = f"{component}.{name}"
    if not target:
        return Example(source, None)
    return Example(source, f"{component}.{target}", piece, pieces, rows)


def noting(weights: Iterable[tuple[str, Any]], note: Callable[[str, int], None]) -> Iterator[tuple[str, Any]]:
    """The same tensors, each noted with its rows as it passes."""
    for name, tensor in weights:
        note(name, int(tensor.shape[0]) if tensor.ndim else 0)
        yield name, tensor


def unlike(component: str, model: nn.Module, records: Mapping[str, TensorRecord]) -> str | None:
    """How the module's state differs from a version's records in names, shapes or dtypes; None if it does
    not."""
    wanted = {f"{component}.{name}": tensor for name, tensor in model.state_dict().items()}
    stored = {name: record for name, record in records.items() if component_of(name) == component}
    if wanted.keys() != stored.keys():
        only = sorted(wanted.keys() ^ stored.keys())
        return f"{len(only)} tensors are in the store or in the module only, as {only[0]}"
    for name, tensor in wanted.items():
        record = stored[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        if (record.dtype, record.shape, record.encoding) != (dtype, tuple(tensor.shape), "raw"):
            return (
                f"{name} is {dtype}{list(tensor.shape)} in the module, {record.dtype}{list(record.shape)} in "
                "the store"
            )
    return None


def computed(model: nn.Module) -> str | None:
    """What of a module would be computed from the weights while it is loaded, or None."""
    if getattr(model, "preprocess_loaded_state_dict", None) is not None:
        return "its model rewrites the checkpoint's tensors"
    for path, part in model.named_modules():
        method = getattr(part, "quant_method", None)
        if method is not None and "Unquantized" not in type(method).__name__:
            return f"{path} is quantised by {type(method).__name__}"
    why = rereads(model)
    return None if why is None else f"its model {why}"


def fill_with_placeholders(model: nn.Module, device: torch.device) -> Any:
    """Give every parameter and persistent buffer one element of memory under its full shape."""
    filled: dict[str, torch.Tensor] = {}
    parameters = dict(model.named_parameters())
    for name, tensor in model.state_dict().items():
        empty = torch.zeros((), dtype=tensor.dtype, device=device).expand(tensor.shape)
        like = parameters.get(name)
        filled[name] = empty if like is None else like_parameter(like, empty)
    return model.load_state_dict(filled, strict=True, assign=True)


def like_parameter(like: nn.Parameter, data: torch.Tensor) -> nn.Parameter:
    """A parameter of the same class and with the same attributes over other data, without gradient."""
    made = nn.Parameter(data, requires_grad=False)
    made.__class__ = type(like)
    made.__dict__.update(like.__dict__)
    return made


def to_meta(model: nn.Module) -> None:
    """Put all parameters and persistent buffers on meta; the objects stay the same."""
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.device.type == "meta":
            continue
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        like = like_parameter(tensor, empty) if isinstance(tensor, nn.Parameter) else empty
        torch.utils.swap_tensors(tensor, like)  # type: ignore[no-untyped-call]
