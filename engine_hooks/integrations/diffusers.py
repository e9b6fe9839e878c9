"""diffusers pipelines: every model of a pipeline bound to the store, or a pipeline built without its weights.

`attach_pipeline` hooks a pipeline that exists; `load_pipeline` builds one from its directory's configs
and fills it from the arena. Both return an `EngineHook`, which does the rest:

    with hook.running():
        images = pipe(prompt).images
    hook.sleep(); hook.wake(); hook.refit()

Invariants:
- every model of the pipeline is bound, or named in `skip`, or the pipeline is refused and nothing changed;
- a module that the pipeline has under several names, or inside another, is bound once;
- `load_pipeline` reads no weight file, except of components in `skip`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from engine_hooks.find import unwrap
from engine_hooks.hook import EngineHook
from engine_hooks.integrations.from_config import build
from engine_hooks.integrations.unfit import refuse_unfit
from weightstore.errors import AttachError, DependencyMissing, UnknownModel, UsageError
from weightstore.types import DEFAULT_TAG, component_of

if TYPE_CHECKING:
    from weightstore.client import Store

Dtypes = torch.dtype | Mapping[str, torch.dtype] | None


def components_of(pipe: Any, skip: Collection[str] = ()) -> dict[str, nn.Module]:
    """The pipeline's models by component name, each once; None, schedulers, tokenizers and the like left out.

    Of several names for one module the first counts; a module inside another component's is that one's.

    Raises:
        AttachError: a component that is a list of modules, whose tensors have no names.
        UsageError: not a pipeline, or `skip` names what it does not have.
    """
    return _modules(pipe, skip)[0]


def attach_pipeline(
    store: Store,
    model: str,
    pipe: Any,
    *,
    device: str | torch.device | None = None,
    tag: str = DEFAULT_TAG,
    skip: Collection[str] = (),
    **options: Any,
) -> EngineHook:
    """Bind all models of a diffusers pipeline to the version that `tag` names; they are then AWAKE.

    If the store lacks the model it is published from the pipeline.

    Args:
        pipe: anything with diffusers' `components`.
        device: where to (default: where the pipeline runs).
        skip: components to leave alone, where they are and as they are.
        options: `ignore`, `drain_timeout`, `publish_timeout`, `backend`, as `EngineHook.attach` takes them.

    Raises:
        AttachError: components that cannot be bound bit for bit, each with the reason and what to do.
        and whatever `EngineHook.attach` raises. On any error the pipeline is as before.
    """
    modules, inside = _modules(pipe, skip)
    if not modules:
        raise AttachError("there is nothing to attach: the pipeline has no models, or all are in skip")
    runs_on = getattr(pipe, "_execution_device", pipe.device) if device is None else device
    target = torch.device(runs_on)
    if target.type == "meta":
        raise UsageError(
            "the pipeline is on the meta device: say where it is to run, device='cuda:0' or 'cpu'"
        )
    refuse_unfit(pipe, modules, target)
    if inside:
        _refuse_stored_apart(store, model, tag, inside)
    return EngineHook.attach(store, model, modules, device=target, tag=tag, **options)


def load_pipeline(
    store: Store,
    model: str,
    directory: str | Path,
    *,
    device: str | torch.device = "cpu",
    tag: str = DEFAULT_TAG,
    dtype: Dtypes = None,
    pipeline_class: Any = None,
    components: Mapping[str, Any] | None = None,
    skip: Collection[str] = (),
    **options: Any,
) -> tuple[Any, EngineHook]:
    """A diffusers pipeline from its directory, its weights from the arena: no weight file is read or needed.

    Schedulers, tokenizers and processors are loaded as usual. What is built equals what
    `from_pretrained(directory, dtype=…)` makes of the same weights, buffers and tables too.

    Args:
        directory: a local pipeline directory, with `model_index.json` and the components' configs.
        dtype: as in `from_pretrained`, also by component; default: what each has most of in the store.
        pipeline_class: another pipeline for the same components (default: the index's).
        components: given instead of built, as `from_pretrained` takes them; None leaves a component out.
        skip: components to load from the directory as usual and not to bind.
        options: as for `attach_pipeline`.

    Raises:
        AttachError: components that a config alone does not determine, or that differ in the store, by name.
        UnknownModel, UnknownTag: the store does not have it; nothing is published from here.
        UsageError: not a pipeline directory.
        DependencyMissing: without diffusers and transformers.
    """
    diffusers = _diffusers()
    root = Path(directory)
    if not (root / "model_index.json").is_file():
        raise UsageError(f"{str(root)!r} is not a pipeline directory: it has no model_index.json")
    index = diffusers.DiffusionPipeline.load_config(str(root), local_files_only=True)
    given = dict(components or {})
    stored = _stored_dtypes(store, model, tag)
    built: dict[str, nn.Module] = {}
    for name, kind in _model_classes(diffusers, index, left={*given, *skip}):
        built[name] = build(name, kind, _config_directory(root, name), _dtype_for(name, dtype, stored))
    maker = _pipeline_class(diffusers, index) if pipeline_class is None else pipeline_class
    usual = {} if dtype is None else {_dtype_keyword(diffusers): dtype}
    pipe = maker.from_pretrained(str(root), local_files_only=True, **usual, **built, **given)
    hook = attach_pipeline(store, model, pipe, device=device, tag=tag, skip=skip, **options)
    return pipe, hook


# -- a pipeline's models -------------------------------------------------------------------------------


def _modules(pipe: Any, skip: Collection[str]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The modules to bind, and for each name that is left out the component that has its module."""
    parts = getattr(pipe, "components", None)
    if not isinstance(parts, Mapping):
        raise UsageError(f"a {type(pipe).__name__} is no pipeline: it has no components")
    unknown = set(skip) - parts.keys()
    if unknown:
        raise UsageError(f"skip names {', '.join(sorted(unknown))}; the pipeline has {', '.join(parts)}")
    for name, part in parts.items():
        if name not in skip and isinstance(part, (list, tuple)) and _has_modules(part):
            raise AttachError(
                f"component {name!r} is a {type(part).__name__} of modules, whose tensors have no names; put "
                f"them into an nn.ModuleList, or leave them out: skip=[{name!r}]",
                components=[name],
            )
    modules = {n: part for n, part in parts.items() if isinstance(part, nn.Module) and n not in skip}
    owner: dict[int, str] = {}
    for name, module in modules.items():
        owner.setdefault(id(unwrap(module)), name)
    inside = {n: owner[id(unwrap(m))] for n, m in modules.items() if owner[id(unwrap(m))] != n}
    for name, module in modules.items():
        if name not in inside:
            for part in unwrap(module).modules():
                held = owner.get(id(part), name)
                if held != name:
                    inside[held] = name
    return {name: module for name, module in modules.items() if name not in inside}, inside


def _has_modules(parts: list[Any] | tuple[Any, ...]) -> bool:
    return any(isinstance(part, nn.Module) for part in parts)


def _refuse_stored_apart(store: Store, model: str, tag: str, inside: Mapping[str, str]) -> None:
    """AttachError if the store has weights of their own for names that are one module here: a refit of
    those would go by unseen."""
    try:
        with store.lease(model, tag=tag) as snapshot:
            stored = {component_of(name) for name in snapshot.names}
    except UnknownModel:
        return
    apart = {name: owner for name, owner in inside.items() if name in stored}
    if apart:
        shown = ", ".join(f"{name} is (in) the module of {owner}" for name, owner in apart.items())
        raise AttachError(
            f"in this pipeline {shown}, but {model!r} has weights for each; give each a module of its own",
            components=list(apart),
        )


# -- building from configs -----------------------------------------------------------------------------


def _diffusers() -> Any:
    try:
        import_module("transformers")
        return import_module("diffusers")
    except ImportError as error:
        raise DependencyMissing(
            f"load_pipeline builds models of diffusers and transformers: pip install weightstore[diffusers] "
            f"({error})"
        ) from error


def _pipeline_class(diffusers: Any, index: Mapping[str, Any]) -> Any:
    """The index's own class: the base class would not take what that one declares optional."""
    title = index.get("_class_name")
    kind = getattr(diffusers, title, None) if isinstance(title, str) else None
    if kind is None:
        raise AttachError(
            f"diffusers {diffusers.__version__} has no pipeline {title!r}, which model_index.json asks for; "
            "give one: pipeline_class=…"
        )
    return kind


def _dtype_keyword(diffusers: Any) -> str:
    """What `from_pretrained` calls the dtype; the other name is deprecated, or not known yet."""
    major, minor = (int(part) for part in diffusers.__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (0, 42) else "torch_dtype"


def _model_classes(
    diffusers: Any, index: Mapping[str, Any], left: Collection[str]
) -> Iterator[tuple[str, type[nn.Module]]]:
    """(component, class) of the index's models but those in `left`; all else is diffusers' to load."""
    for name, entry in index.items():
        if name in left or not isinstance(entry, (list, tuple)) or len(entry) != 2 or None in entry:
            continue
        library, title = entry
        home = getattr(diffusers.pipelines, library, None)
        ours = home is not None or library in ("diffusers", "transformers")
        if not ours or title.startswith("AutoModel"):
            raise AttachError(
                f"{name} is a {title} of {library!r}: which class that is, only its own loader knows; build "
                f"it yourself and give it, components={{{name!r}: …}}, or leave it, skip=[{name!r}]",
                components=[name],
            )
        kind = getattr(home or import_module(library), title, None)
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            yield name, kind


def _config_directory(root: Path, name: str) -> Path:
    inner = root / name
    if not (inner / "config.json").is_file():
        raise UsageError(f"{str(root)!r} has no {name}/config.json to build {name} from")
    return inner


def _stored_dtypes(store: Store, model: str, tag: str) -> dict[str, torch.dtype]:
    """For each component the floating dtype that most of its stored bytes have."""
    nbytes: dict[str, Counter[torch.dtype]] = {}
    with store.lease(model, tag=tag) as snapshot:
        for name, record in snapshot.records.items():
            dtype: torch.dtype = getattr(torch, record.dtype)
            if dtype.is_floating_point:
                nbytes.setdefault(component_of(name), Counter())[dtype] += record.nbytes
    return {component: counted.most_common(1)[0][0] for component, counted in nbytes.items()}


def _dtype_for(name: str, asked: Dtypes, stored: Mapping[str, torch.dtype]) -> torch.dtype:
    if isinstance(asked, Mapping):
        asked = asked.get(name, asked.get("default"))
    return stored.get(name, torch.float32) if asked is None else asked
