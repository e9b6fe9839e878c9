"""`python -m bench rl-step`: from the last image on the old weights to the first on the new, in every way."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import click

from bench.record import RESULTS, ROOT, machine, slug
from bench.rl_step import summary
from bench.rl_step.found import Found
from bench.rl_step.memory import Sampler, point
from bench.rl_step.processes import Child, Engine, Trainer, WayFailed
from bench.rl_step.ways import GIB, PHASES, WAYS, Marks, RelaunchCold, Way

ANSWER: Final = 300.0
"""Seconds that any one answer may take."""
GRACE: Final = 20.0
"""Seconds past the budget in which what was begun may end."""
TAKE_MORE: Final = 2 * GIB
"""How much more than is free beside the awake engine the trainer needs."""
TAKE_ON_CPU: Final = 32 << 20
LIMIT_ROUNDS: Final = 3
LIMIT_AGAIN: Final = 60.0
"""Seconds that must be left for measuring the link once more after way 1: hosts are noisy."""
MODEL_NAMES: Final = ("flux1-dev", "sd3.5-medium", "tiny")


class Run:
    """What all ways of a run share: the children started ahead, the store, the time, the pictures."""

    def __init__(self, held: ExitStack, found: Found, sampler: Sampler, **options: Any) -> None:
        self._held = held
        self.found = found
        self.sampler = sampler
        self.model: str = options["model"]
        self.device: str = "cuda:0" if options["device"] == "cuda" else "cpu"
        self.seed: int = options["seed"]
        self.cycles: int = options["cycles"]
        self.slow_cycles: int = options["slow_cycles"]
        self.scratch: Path = options["scratch"]
        self.logs: Path = options["logs"]
        self.configs: Path = options["configs"]
        self._deadline = time.monotonic() + options["budget"] if options["budget"] else None
        self._ahead: dict[str, list[Child]] = {"engine": [], "trainer": []}
        self._store: Any = None
        self._arena: Path | None = None
        self._service: int | None = None
        self._take: int | None = None
        self.capacity = 0
        self.pictures: dict[int, tuple[str, str, bytes]] = {}

    # -- time --------------------------------------------------------------------------------------

    def left(self) -> float:
        """Seconds left of the budget; many if there is none."""
        return 1e9 if self._deadline is None else self._deadline - time.monotonic()

    def patience(self) -> float:
        return min(ANSWER, max(self.left() + GRACE, 1.0))

    # -- children ----------------------------------------------------------------------------------

    def start_ahead(self, count: int) -> None:
        """Start engines and trainers for `count` ways, which import what they will need and then wait."""
        for role, waiting in self._ahead.items():
            for _ in range(count):
                child = self._new(role)
                waiting.append(child)
                self._held.callback(child.end)

    def wait_for_imports(self) -> None:
        for waiting in self._ahead.values():
            for child in waiting:
                child.imported()

    def engine(self) -> Engine:
        waiting = self._ahead["engine"]
        found = waiting.pop(0) if waiting else self._new("engine")
        assert isinstance(found, Engine)
        return found

    def trainer(self) -> Trainer:
        waiting = self._ahead["trainer"]
        found = waiting.pop(0) if waiting else self._new("trainer")
        assert isinstance(found, Trainer)
        return found

    def relaunched(self) -> Engine:
        """An engine started from nothing, now."""
        found = self._new("engine")
        assert isinstance(found, Engine)
        return found

    def _new(self, role: str) -> Child:
        log = self.logs / f"{role}-{len(list(self.logs.iterdir()))}.log"
        kind = Engine if role == "engine" else Trainer
        return kind(self.model, log, self.patience)

    # -- the store ---------------------------------------------------------------------------------

    def store(self) -> str:
        """The socket of the run's store, which is started when it is first needed."""
        from bench.rl_step.models import MODELS
        from bench.rl_step.sharing import service_of
        from weightstore.local import local_store
        from weightstore.paths import arena_name

        if self._store is None:
            window = MODELS[self.model].window
            self._store = ExitStack()
            store = self._store.enter_context(local_store(self.capacity, window=window))
            self._socket = store.socket
            self._arena = Path("/dev/shm") / arena_name(store.socket)
            self._service = service_of(store.socket)
        return self._socket

    def close_store(self) -> None:
        """Give the host's memory back, for ways that need it for themselves."""
        if self._store is not None:
            self._store.close()
            self._store = self._arena = self._service = None

    def memory(self, way: Way) -> dict[str, Any]:
        service = [] if self._service is None else [self._service]
        found: dict[str, Any] = point([*way.pids(), *service], self._arena)
        found["device"] = self.sampler.device_used()
        return found

    # -- one way -----------------------------------------------------------------------------------

    def measure(self, kind: type[Way]) -> None:
        """All cycles of one way, into the results; what goes wrong is its result."""
        found, key = self.found, kind.key
        found.way(key, title=kind.title, what=kind.what, status="running", reason=None, cycles=[])
        began = time.perf_counter()
        reason = kind.impossible(self.device)
        if reason is not None:
            found.way(key, status="cannot run", reason=reason)
            return
        if self.left() <= 0:
            found.way(key, status="skipped", reason="the time that the run was given (--budget) was over")
            return
        if not issubclass(kind, (WAYS["1"], WAYS["2"])):
            self.close_store()
        way = kind(self)
        before = point([], self._arena)
        found.way(key, baseline={"host": before["used"] - before["arena"]})
        try:
            with way:
                self._cycles(way)
        except WayFailed as error:
            found.way(key, status="failed", reason=str(error))
        except (OSError, subprocess.SubprocessError, RuntimeError) as error:
            found.way(key, status="failed", reason=f"{type(error).__name__}: {error}")
        found.way(key, notes=way.notes, wall=time.perf_counter() - began)

    def _cycles(self, way: Way) -> None:
        found, key = self.found, way.key
        setup = way.begin()
        first = self._picture(way, 0)
        own = self._picture(way, 0)["seconds"]
        if self._take is None:
            free = way.trainer.do("facts").get("free")
            self._take = TAKE_ON_CPU if free is None else free + TAKE_MORE
            found.note("trainer_needs", self._take)
        found.way(key, setup=setup | {"first_image": first["seconds"], "own_image": own})
        found.way(key, awake=self.memory(way))
        count = 1 if way.cold else self.slow_cycles if way.slow else self.cycles
        took = 0.0
        for number in range(1, count + 1):
            if took > self.left():
                reason = f"{number - 1} of {count} cycles: the time that the run was given was over"
                found.way(key, status="cut", reason=reason)
                return
            started = time.monotonic()
            cycle = self._cycle(way, number)
            took = time.monotonic() - started
            found.cycle(key, cycle)
            click.echo(
                f"  {key} cycle {number}: {cycle['overhead']:.3f} s "
                + " ".join(f"{name} {seconds:.3f}" for name, seconds in cycle["phases"].items()),
                err=True,
            )
        found.way(key, status="ok")

    def _cycle(self, way: Way, number: int) -> dict[str, Any]:
        self.sampler.begin()
        marks = Marks()
        with marks.phase("drain"):
            way.engine.post("/drain")
        with marks.phase("sleep"):
            way.sleep()
        with marks.phase("memory"):
            way.trainer.do("take", nbytes=self._take)
        asleep = self.memory(way)
        with marks.phase("step"):
            way.trainer.do("step", number=number)
        for name in way.after:
            if name == "wake" and isinstance(way, RelaunchCold):
                way.drop()
            with marks.phase(name):
                getattr(way, name)()
        with marks.phase("image"):
            picture = self._picture(way, number)
        curve = self.sampler.curve(marks.origin)
        again = self._picture(way, number)
        step = marks.seconds.pop("step")
        own = again["seconds"]
        return {
            "number": number,
            "phases": {name: marks.seconds[name] for name in PHASES},
            "step": step,
            "own_image": own,
            "overhead": sum(marks.seconds.values()) - own,
            "image": picture["sha256"],
            "same": picture["same"] and again["same"],
            "differs": picture["differs"],
            "spread": picture["spread"],
            "spans": [[name, began, ended] for name, began, ended in marks.spans],
            "memory": {"asleep": asleep, "awake": self.memory(way)},
            "curve": curve,
        }

    def _picture(self, way: Way, number: int) -> dict[str, Any]:
        """One picture, timed, and compared with what the first way drew after as many steps."""
        began = time.perf_counter()
        facts, pixels = way.engine.image()
        seconds = time.perf_counter() - began
        sha = facts["x-pixels-sha256"]
        differs = None
        if number not in self.pictures:
            self.pictures[number] = (way.key, sha, pixels)
        key, expected, reference = self.pictures[number]
        if sha != expected:
            differs = f"from way {key}: {_difference(pixels, reference)}"
        if number and self.pictures.get(number - 1, ("", "", b""))[1] == sha:
            differs = "it is the picture from before the step: the new weights did not arrive"
        return {
            "seconds": seconds,
            "sha256": sha,
            "same": differs is None,
            "differs": differs,
            "spread": float(facts["x-spread"]),
        }


def _difference(pixels: bytes, reference: bytes) -> str:
    import numpy as np

    ours, others = (np.frombuffer(data, np.float32) for data in (pixels, reference))
    if ours.shape != others.shape:
        return f"{ours.size} values, not {others.size}"
    apart = np.abs(ours - others)
    return f"{float((apart > 0).mean()):.2%} of the values, by up to {float(apart.max()):.3g}"


def _sizes(model: str) -> dict[str, Any]:
    """Bytes of the pipeline and of its trained part, from a build without weights."""
    from bench.rl_step.models import MODELS, TRAINED, bytes_of, write_configs
    from engine_hooks.integrations.from_config import build

    wanted = MODELS[model]
    with tempfile.TemporaryDirectory() as directory:
        home = write_configs(wanted, Path(directory))
        built = {
            name: build(name, component.cls(), home / name, wanted.dtype)
            for name, component in wanted.components.items()
        }
    components = {name: bytes_of(module) for name, module in built.items()}
    return {
        "name": model,
        "pipeline": wanted.pipeline,
        "components": components,
        "whole_bytes": sum(components.values()),
        "trained": TRAINED,
        "trained_bytes": components[TRAINED],
        "trained_tensors": sum(1 for _ in built[TRAINED].parameters()),
        "dtype": str(wanted.dtype).removeprefix("torch."),
        "side": wanted.side,
        "steps": wanted.steps,
    }


def _limit(device: str, sizes: dict[str, Any], warm: int, patience: float) -> dict[str, Any]:
    """The link's limit, from a process that has the memory to itself."""
    command = [sys.executable, "-m", "bench.rl_step.limit", "cpu" if device == "cpu" else "cuda"]
    numbers = (sizes["trained_bytes"], sizes["whole_bytes"], LIMIT_ROUNDS, warm)
    done = subprocess.run(
        [*command, *map(str, numbers)], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=patience
    )
    if done.returncode:
        raise RuntimeError(f"measuring the link's limit ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _limit_or_why(*arguments: Any) -> dict[str, Any]:
    """The limit, or what kept it from being measured: the ways can be compared without."""
    try:
        return _limit(*arguments)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return {"device": {"device": "unknown"}, "failed": str(error)}


def _chosen(ways: str) -> list[type[Way]]:
    asked = ways.split(",")
    unknown = [key for key in asked if key not in WAYS]
    if unknown:
        there = "; ".join(f"{key} {way.title}" for key, way in WAYS.items())
        raise click.BadParameter(f"no way {', '.join(unknown)}; there are: {there}")
    return [way for key, way in WAYS.items() if key in asked]


def _sharing(counts: Sequence[int], patience: float) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-m", "bench.rl_step.sharing", ",".join(map(str, counts))]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=patience)
    for line in done.stdout.splitlines():
        yield json.loads(line)


@click.command("rl-step")
@click.option("--model", type=click.Choice(MODEL_NAMES), default="tiny", show_default=True)
@click.option(
    "--ways",
    metavar="1,2,…",
    default=",".join(WAYS),
    show_default=True,
    help="Which; they run in an order of their own. 3c: with a cold page cache; 6k: with its backup kept.",
)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cpu", show_default=True)
@click.option("--cycles", type=click.IntRange(min=1), default=5, show_default=True, help="Of way 1.")
@click.option(
    "--slow-cycles", type=click.IntRange(min=1), default=2, show_default=True, help="Of all others; 3c: 1."
)
@click.option("--seed", type=int, default=7, show_default=True)
@click.option("--budget", type=float, metavar="SECONDS", help="No way and no cycle begins after that time.")
@click.option(
    "--scratch",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where checkpoints go: room for the whole pipeline.  [default: a temporary directory]",
)
@click.option("--engines", metavar="1,2,…", default="", help="Also host memory by the number of engines.")
@click.option("--warm/--no-warm", default=True, help="Touch a GPU machine's memory first.")
@click.option(
    "--out",
    metavar="PATH",
    type=click.Path(dir_okay=False, path_type=Path),
    help="JSON, whole after every cycle.  [default: bench/results/rl-step-MODEL-DEVICE.json; tiny: none]",
)
def rl_step_command(
    model: str,
    ways: str,
    device: str,
    cycles: int,
    slow_cycles: int,
    seed: int,
    budget: float | None,
    scratch: Path | None,
    engines: str,
    warm: bool,
    out: Path | None,
) -> None:
    """Sleep + refit + wake against kill + relaunch, and what else people do, with real processes.

    flux1-dev needs an 80 GB GPU, 128 GiB of memory, 64 GiB in /dev/shm and 40 GB for checkpoints.
    """
    from bench.rl_step.models import MODELS, write_configs

    chosen = _chosen(ways)
    command = "python -m bench rl-step " + shlex.join(sys.argv[2:])
    with ExitStack() as held:
        logs = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="rl-step-")))
        configs = write_configs(MODELS[model], logs / "configs")
        if scratch is None:
            scratch = logs / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        (logs / "logs").mkdir()
        found = Found(None, machine=machine(), command=command)
        options = {
            "model": model,
            "device": device,
            "seed": seed,
            "cycles": cycles,
            "slow_cycles": slow_cycles,
            "budget": budget,
        }
        found.all["settings"] = {**options, "ways": [way.key for way in chosen]}
        sampler = held.enter_context(Sampler(device))
        run = Run(
            held,
            found,
            sampler,
            **options,
            scratch=scratch,
            logs=logs / "logs",
            configs=configs,
        )
        held.callback(run.close_store)
        run.start_ahead(sum(way.impossible(device) is None for way in chosen))
        sizes = _sizes(model)
        run.capacity = _capacity(sizes, MODELS[model].window)
        found.all["model"] = sizes
        click.echo("the link's limit …", err=True)
        limit = _limit_or_why(device, sizes, MODELS[model].warm if warm else 0, run.patience())
        run.wait_for_imports()
        if out is None and model != "tiny":
            out = RESULTS / f"rl-step-{model}-{slug(limit['device']['device'])}.json"
        found.to(out)
        found.note("limit", limit)
        for way in chosen:
            click.echo(f"{way.key}: {way.title}", err=True)
            run.measure(way)
            state = found.all["ways"][way.key]
            if state["status"] != "ok":
                click.echo(f"  {state['status']}: {state['reason']}", err=True)
            if way.key == "1" and device != "cpu" and run.left() > LIMIT_AGAIN:
                again = _limit_or_why(device, sizes, 0, run.patience())
                for link in ("h2d", "d2h"):
                    if link in again and link in limit:
                        limit[link]["seconds"] += again[link]["seconds"]
                found.note("limit", limit)
        run.close_store()
        if engines:
            found.note("sharing", [])
            for row in _sharing([int(count) for count in engines.split(",")], run.patience()):
                found.all["sharing"].append(row)
                found.write()
        found.complete()
        shutil.rmtree(scratch / model, ignore_errors=True)
    summary.print_table(found.all)
    if out is not None:
        click.echo(f"written to {out}")
    wrong = [key for key, way in found.all["ways"].items() if not summary.pictures_equal(way)]
    if wrong:
        raise click.ClickException(f"pictures differ in way {', '.join(wrong)}; the results say how")


def _capacity(sizes: dict[str, Any], window: int) -> int:
    """The pipeline, a second version of what is trained, and room for alignment."""
    needed = sizes["whole_bytes"] + sizes["trained_bytes"]
    return -(-(needed + needed // 1000 + 4 * window) // window) * window


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    rl_step_command()
