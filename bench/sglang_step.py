"""Section `step`: an RL step on one GPU with SGLang Diffusion as the engine, stock and through the store.

Timed from outside, phase by phase as `bench.rl_step` does it, from the last image delivered to the first one
with the new weights; what a trainer's step takes is not counted. In both ways the trainer's process, on the
engine's GPU, has the whole transformer there, changes every weight, and hands all of it over:

    stock       release -> trainer's memory -> (step) -> resume -> update_weights_from_tensor -> image
    plugin      release -> trainer's memory -> (step) -> refit of the store -> resume -> image

They run in the engines of the sections `stock` and `plugin`, before anything else has put these to sleep:
the first cycle is the process's first. After as many steps both must draw the same image, bit for bit. At
the end the checkpoint's weights are brought back, and the trainer gives its memory back: nothing of it is
left in what other sections find.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

from bench.rl_step.memory import host_used, point
from bench.rl_step.ways import GIB, PHASES, Marks
from bench.sglang_process import MODEL, Engine, Run, pixels_of

SECTION: Final = "step"
TAKE_MORE: Final = 2 * GIB
"""How much more than is free beside the awake engine the trainer needs."""
OWN_IMAGES: Final = 2
"""Images drawn again in each cycle: they say how long one usually takes."""
TAKE_ON_CPU: Final = 32 << 20
BACK: Final = 0.95
"""Of the trainer's tensors, what must be free again once it has dropped them."""


class StepFailed(Exception):
    """A way did not get to its end; the message is what the report says."""


class _Way:
    """What one way does in the phases that differ."""

    key: ClassVar[str]
    after: ClassVar[tuple[str, ...]]

    def __init__(self, run: Run, engine: Engine) -> None:
        self.run, self.engine = run, engine
        self.handed: dict[str, Any] = {}

    def prepare(self) -> None:
        """Once, before the first cycle; not timed."""

    def sleep(self) -> dict[str, Any]:
        return self.asked("release")

    def wake(self) -> dict[str, Any]:
        return self.asked("resume")

    def refit(self) -> None:
        raise TypeError(f"{type(self).__name__} does not say how it refits")

    def restore(self) -> None:
        """New weights for an engine that is awake; not timed."""
        self.refit()

    def asked(self, command: str, **arguments: Any) -> dict[str, Any]:
        answer = self.engine.ask(command, **arguments)
        if why := answer.get("failed") or answer.get("error"):
            raise StepFailed(f"{command}: {why}")
        return answer


class _Stock(_Way):
    key = "stock"
    after = ("wake", "refit")

    def refit(self) -> None:
        self.handed = self.run.trainer.do(
            "push", endpoint=self.engine.endpoint, bucket=self.run.options.bucket
        )
        if self.handed["error"]:
            raise StepFailed(f"update_weights_from_tensor: {self.handed['error']}")


class _Plugin(_Way):
    key = "plugin"
    after = ("refit", "wake")

    def prepare(self) -> None:
        self.run.trainer.do("prepare")

    def refit(self) -> None:
        self.handed = self.run.trainer.do("put", partial=False)

    def wake(self) -> dict[str, Any]:
        answer = super().wake()
        version = (answer["output"] or {}).get("version")
        if version != self.handed["version"]:
            raise StepFailed(f"it woke on version {version}, and {self.handed['version']} was written")
        return answer

    def restore(self) -> None:
        self.refit()
        self.asked("update", model_path=f"weightstore:{MODEL}")


_WAYS: Final = {way.key: way for way in (_Stock, _Plugin)}


def measure(run: Run, engine: Engine, key: str, before: tuple[str, str], host: int) -> None:
    """All cycles of one way.

    Args:
        key: ``stock`` or ``plugin``, as the engine is.
        before: the image with the checkpoint's weights.
        host: bytes of host memory in use before the engine was there (`baseline`).
    """
    way = _WAYS[key](run, engine)
    run.known.setdefault("pictures", {})[0] = (key, before)
    found: dict[str, Any] = {"status": "running", "reason": None, "baseline": {"host": host}, "cycles": []}
    run.found.add(SECTION, key, found)
    try:
        try:
            _cycles(way, found)
            found["status"] = "ok"
        except (StepFailed, RuntimeError) as error:
            found |= {"status": "failed", "reason": str(error)}
        run.found.check(SECTION, f"{key}: every cycle got to its end", found["status"] == "ok")
        if "trainer" in found:
            _end(way, before, found["status"] == "ok")
    finally:
        freed = run.trainer.do("drop")["freed"]
        run.found.write()
    if "trainer" in found:
        found["trainer"]["freed"] = freed
        if not run.options.cpu:
            what = f"{key}: the trainer's memory came free"
            run.found.check(SECTION, what, freed >= BACK * found["trainer"]["bytes"])


def _cycles(way: _Way, found: dict[str, Any]) -> None:
    run = way.run
    found["trainer"] = run.trainer.do("load")
    way.prepare()
    found["pids"] = [way.engine.pid, way.engine.ask("facts")["pid"], run.trainer.pid]
    free = run.trainer.do("facts").get("free")
    take = TAKE_ON_CPU if free is None else free + TAKE_MORE
    found["trainer_needs"] = take
    found["awake"] = _memory(way, found["pids"])
    run.found.write()
    for number in range(1, run.options.cycles + 1):
        cycle = _cycle(way, number, take, found["pids"])
        found["cycles"].append(cycle)
        run.found.write()
        run.found.say(
            f"step: {way.key} {number}: about {cycle['overhead']:.3f} s, "
            + " ".join(f"{name} {seconds:.3f}" for name, seconds in cycle["phases"].items())
        )
        run.found.check(SECTION, f"{way.key}: image {number} is right", cycle["same"])


def _cycle(way: _Way, number: int, take: int, pids: list[int]) -> dict[str, Any]:
    run = way.run
    run.sampler.begin()
    marks = Marks()
    marks.seconds["drain"] = 0.0  # images are asked for one by one: none is in flight
    with marks.phase("sleep"):
        slept = way.sleep()
    with marks.phase("memory"):
        run.trainer.do("take", nbytes=take)
    asleep = _memory(way, pids)
    with marks.phase("step"):
        run.trainer.do("step", number=number)
    woken: dict[str, Any] = {}
    for name in way.after:
        with marks.phase(name):
            woken = getattr(way, name)() or woken
    with marks.phase("image"):
        drawn = way.asked("generate")
    curve = run.sampler.curve(marks.origin)
    own_images: list[float] = []
    image = pixels_of(drawn)
    differs = _differs(run, way.key, number, image)
    for _ in range(OWN_IMAGES):
        again = Marks()
        with again.phase("image"):
            repeated = way.asked("generate")
        own_images.append(again.seconds["image"])
        if differs is None and pixels_of(repeated) != image:
            differs = "from one drawn right after it"
    step, own = marks.seconds.pop("step"), statistics.median(own_images)
    for what, answer in (("release", slept), ("resume", woken)):
        run.known.setdefault(f"{way.key} {what}", []).append(answer)
    return {
        "number": number,
        "phases": {name: marks.seconds[name] for name in PHASES},
        "step": step,
        "own_images": own_images,
        # Of this cycle alone, for what is printed while it runs; the report's are `summary`'s, of all cycles.
        "own_image": own,
        "overhead": sum(marks.seconds.values()) - own,
        "handed": way.handed,
        "image": "/".join(image),
        "same": differs is None,
        "differs": differs,
        "spread": drawn.get("spread"),
        "spans": [[name, began, ended] for name, began, ended in marks.spans],
        "memory": {"asleep": asleep, "awake": _memory(way, pids)},
        "curve": curve,
    }


def _differs(run: Run, key: str, number: int, image: tuple[str, str]) -> str | None:
    """What is wrong with the image after that many steps, or None."""
    pictures: dict[int, tuple[str, tuple[str, str]]] = run.known["pictures"]
    if not image[0]:
        return "there is none"
    other, expected = pictures.setdefault(number, (key, image))
    if image == pictures[number - 1][1]:
        return "it is the picture from before the step: the new weights did not arrive"
    return None if image == expected else f"from {other}'s after as many steps"


def _memory(way: _Way, pids: list[int]) -> dict[str, Any]:
    """As `bench.rl_step` has it; of the device's memory in use also what is the trainer's, and the rest."""
    run = way.run
    stored = isinstance(way, _Plugin)
    everyone = [*pids, run.service] if stored else pids
    found: dict[str, Any] = point(everyone, run.arena if stored else None)
    found["device"] = run.sampler.device_used()
    if not run.options.cpu:
        facts = run.trainer.do("facts")
        if found["device"] is None:
            found["device"] = facts["total"] - facts["free"]
        found |= {"trainer_device": facts["own"], "engine_device": found["device"] - facts["own"]}
    return found


def _end(way: _Way, before: tuple[str, str], awake: bool) -> None:
    """Back to the checkpoint's weights, in whatever state a failure left the engine."""
    try:
        if not awake:
            way.engine.ask("resume")
        way.run.trainer.do("step", number=0)
        way.restore()
        image = way.engine.image("restored after the steps")
    except (StepFailed, RuntimeError) as error:
        way.run.found.check(SECTION, f"{way.key}: the old weights are brought back: {error}", False)
        return
    way.run.found.check(SECTION, f"{way.key}: the old weights bring the old image back", image == before)


def baseline(run: Run) -> int:
    """Bytes of host memory in use without the arena."""
    return host_used() - point([], run.arena)["arena"]


def sizes(model_dir: Path) -> dict[str, Any]:
    """Bytes of the pipeline and of what is trained of it, from the headers of its files."""
    components: dict[str, int] = {}
    tensors = 0
    dtypes: set[str] = set()
    for path in sorted(model_dir.glob("*/*.safetensors")):
        with open(path, "rb") as file:
            header: Mapping[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        name = path.parent.name
        nbytes = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in entries)
        components[name] = components.get(name, 0) + nbytes
        if name == "transformer":
            tensors += len(entries)
            dtypes |= {entry["dtype"] for entry in entries}
    return {
        "components": components,
        "whole_bytes": sum(components.values()),
        "trained": "transformer",
        "trained_bytes": components["transformer"],
        "trained_tensors": tensors,
        "dtypes": sorted(dtypes),
    }
