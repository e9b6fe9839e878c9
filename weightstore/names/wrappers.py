"""What wrappers add to the names of the module they wrap, and names without it.

torch.compile adds ``_orig_mod.``, FSDP1 ``_fsdp_wrapped_module.``, activation checkpointing
``_checkpoint_wrapped_module.``, each wherever a module was wrapped; PEFT renames a layer it adapts to
``.base_layer``. No module has an attribute of such a name by chance, so these go wherever they are.
DDP adds ``module.`` and PEFT ``base_model.model.`` in front of all names. These words do occur inside
models, so they go at the beginning only.
"""

from __future__ import annotations

from typing import Final

ANYWHERE: Final = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"})
LEADING: Final = (("module",), ("base_model", "model"))


def strip_wrappers(name: str, after_component: bool) -> str:
    """`name` as the module itself has it. With `after_component` leading wrappers are also looked for
    behind the first segment, as in ``transformer.module.proj.weight``."""
    *path, last = name.split(".")
    path = [segment for segment in path if segment not in ANYWHERE]
    for start in (0, 1) if after_component else (0,):
        while wrapper := next((w for w in LEADING if tuple(path[start : start + len(w)]) == w), None):
            del path[start : start + len(wrapper)]
    return ".".join([*path, last])
