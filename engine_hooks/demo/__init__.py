"""The main job on real data: ``weightstore demo``, or ``python -m engine_hooks.demo``.

A store, a trainer and an engine, each a process of its own, take turns as in RL post-training of
diffusion models. The trainer teaches a diffusers UNet to draw scikit-learn's handwritten digits;
the engine draws, sleeps while the trainer trains, wakes on the refitted weights and draws again.

    __main__   the command line
    loop       the driver: whose turn it is
    role       a process that answers commands, seen from both ends
    trainer, engine    the two roles
    model, digits      what is trained, on what, and who judges the result
    memory, timeline, pictures    what is measured, printed and painted

Everything printed or painted is measured in the run itself.
"""

from __future__ import annotations

from typing import Final

MODEL: Final = "digits"
"""The demo's model in the store, and `TAG` the tag that the engine follows."""
TAG: Final = "policy"
