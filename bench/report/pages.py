"""The words around the numbers: docs/benchmarks.md, and the README's part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from bench.report import sglang
from bench.report.results import Entry, Group
from bench.rl_step import summary
from bench.rl_step.summary import seconds
from bench.rl_step.ways import PHASES, WAYS
from weightstore.sizes import format_size

Json = Mapping[str, Any]

HEAD: Final = """# Benchmarks: an RL step's sleep, refit and wake

<!-- Made by `python -m bench report` from the files in bench/results; changes here are lost. -->

A trainer and an image server take turns on one device. The server is a diffusers pipeline with random
weights in a process of its own, the trainer another process with a transformer of its own; on a GPU the
device does not hold what both need at once. Timed is what lies between the last image on the old weights and
the first image on the new ones, from outside, as the loop that drives them sees it:

- *drain*: no request is in flight any more; *sleep*: the engine gives the device's memory back; *memory*:
  the trainer has what it needs;
- the trainer's step is not counted: AdamW on some layers and weight decay of every tensor, so that all of
  the transformer changes; it is the same in every way;
- *refit*: the new weights are where the engine gets them from, or has them; *wake*: the engine is ready to
  draw; *image*: what the first image takes beyond the usual, if it takes more. Images vary from one to the
  next, so the usual is the median of all that the way drew again, in every cycle, right after the first one.

*Overhead* is the sum. The first cycle stands apart; of those after it, the steady ones, each phase shows the
median, and *steady* is the sum of these medians. A way with one cycle shows that one's phases and factor.
Where there are several runs, each way is shown from the newest in which it has steady cycles. *× weightstore*
is against way 1 of the same run; for an engine with runs of its own, against way 1 as shown.
*Pictures* says whether every image equals, bit for bit, what the other ways drew after as many steps.
"""

NONE: Final = "No results yet: run `python -m bench rl-step`, then `python -m bench report`.\n"


def benchmarks(groups: Sequence[Group]) -> str:
    """The whole of docs/benchmarks.md."""
    parts = [HEAD]
    if not groups:
        parts.append(NONE)
    for group in groups:
        parts += list(_group(group))
    return "\n".join(parts)


def readme(groups: Sequence[Group]) -> str:
    """What stands between the README's markers: of the largest model on a GPU."""
    shown = [group for group in groups if group.on_gpu and summary.OURS in _measured(group)]
    if not shown:
        return f"{NONE}\n"
    group = shown[0]
    lines = [
        f"{group.model} on {_device(group)}: {_model(group)}. Timed is from the last image on the old "
        "weights to the first on the new ones, without the trainer's step.",
        "",
        _headline(group),
        "",
    ]
    lines += _table(("", "steady overhead", "first cycle"), _headline_rows(group))
    lines += [
        "",
        f"![Seconds by phase, from image to image](docs/pictures/{phases_picture(group)})",
        "",
        "Every way, its phases, memory over time and how it was measured: "
        "[docs/benchmarks.md](docs/benchmarks.md).",
        "",
    ]
    return "\n".join(lines)


def phases_picture(group: Group) -> str:
    return f"rl-step-{group.model}{_suffix(group)}.png"


def memory_picture(group: Group) -> str:
    return f"rl-step-{group.model}{_suffix(group)}-memory.png"


def sharing_picture(group: Group) -> str:
    return f"rl-step-{group.model}{_suffix(group)}-engines.png"


def _suffix(group: Group) -> str:
    return "" if group.on_gpu else "-cpu"


# -- one model on one device ----------------------------------------------------------------------------


def _group(group: Group) -> Iterator[str]:
    yield f"## {group.model} on {_device(group)}\n"
    if not group.on_gpu:
        yield (
            "Here engine and trainer share a CPU's memory: this shows that every way works and that the "
            "pictures are equal, not how fast anything is. Most of a relaunch is imports.\n"
        )
    yield f"{_model(group)}.\n"
    if group.on_gpu and summary.OURS in _measured(group):
        yield _headline(group) + "\n"
    yield from (_lines(_ways_table(group)), _lines(_explained(group)))
    if group.measured and group.on_gpu:
        yield f"![Seconds by phase, from image to image](pictures/{phases_picture(group)})\n"
        yield f"![Memory over the last cycle of each way](pictures/{memory_picture(group)})\n"
        yield (
            "White is not counted: the trainer's step, and in 3c the dropping of the page cache. Memory is "
            "the machine's: the device's by NVML, the host's without page cache, less what was in use before "
            "each way (without the arena). *Awake* is after the cycle's images; *asleep* is when the trainer "
            "has all it needs, so that what is on the device then is mostly the trainer's. *Processes* is "
            "what those that take part have by PSS (in which memory that a driver maps by itself may be "
            "missing), *arena* its pages, counted once:\n"
        )
        yield _lines(_memory_table(group))
    checks = group.checks
    if checks:
        yield "### What must hold\n"
        yield _lines(_checks_table(checks))
    if group.sharing:
        yield "### Host memory by the number of engines\n"
        yield (
            f"Real processes on one store, the arena's pages by PSS over all of them; "
            f"{_sizes(group.sharing)}. With one version, and after refits of which every engine took "
            "every one:\n"
        )
        yield _lines(_sharing_table(group.sharing))
        yield f"![Host memory by the number of engines](pictures/{sharing_picture(group)})\n"
    yield "### Where and how\n"
    yield _lines(_facts(group))


def _model(group: Group) -> str:
    model = group.newest["model"]
    return (
        f"{model['pipeline']}, {_gb(model['whole_bytes'])} of weights in {model['dtype']}, of which the "
        f"{model['trained']} has {_gb(model['trained_bytes'])} in {model['trained_tensors']} tensors; "
        f"images of {model['side']} × {model['side']} in {model['steps']} steps"
    )


def _measured(group: Group) -> dict[str, Entry]:
    return {entry.key: entry for entry in group.measured}


def _headline(group: Group) -> str:
    """In words what steady cycles take: ours, the goals' rivals, and the frozen parts waking early."""
    ours = _measured(group)[summary.OURS]
    text = f"In steady cycles weightstore takes {seconds(summary.overhead(ours.way))}"
    bound = summary.least(ours.found)
    if bound is not None:
        ratio = summary.overhead(ours.way) / bound
        text += f", {ratio:.2f} × what the link needs for the bytes, out and then in ({seconds(bound)})"
    text += "."
    rivals = [
        f"“{entry.title}” {seconds(summary.overhead(entry.way))}, {entry.times_ours:.0f} × as long"
        for key in ("3", "4", sglang.STOCK, "6")
        if (entry := _measured(group).get(key)) is not None and entry.times_ours is not None
    ]
    if rivals:
        apart = ", SGLang's against the time above" if sglang.STOCK in _measured(group) else ""
        text += f" Others: {'; '.join(rivals)} (factors are against weightstore in the same run{apart})."
    return text + _staged(group)


def _staged(group: Group) -> str:
    staged = _measured(group).get(summary.STAGED)
    if staged is None or not summary.has_steady(staged.way):
        return ""
    takes = f"{seconds(summary.overhead(staged.way))} with the frozen parts waking during the refit"
    bound = summary.least(staged.found)
    if bound is not None:
        takes += f", {summary.overhead(staged.way) / bound:.2f} × that run's link ({seconds(bound)})"
    plain = staged.found["ways"].get(summary.OURS)
    if plain is None or not summary.has_numbers(plain):
        return f" Weightstore takes {takes}."
    plainly = seconds(summary.overhead(plain))
    return f" In a run where weightstore took {plainly} so, it took {takes}."


def _headline_rows(group: Group) -> Iterator[list[str]]:
    for entry in group.measured:
        steady = seconds(summary.overhead(entry.way)) if summary.has_steady(entry.way) else "–"
        name = f"**{entry.title}**" if entry.key == summary.OURS else entry.title
        yield [name, steady, seconds(summary.first_overhead(entry.way))]


def _ways_table(group: Group) -> list[str]:
    titles = ["", "way", "first", "steady", *PHASES, "× weightstore", "pictures"]
    return _table(titles, (_way_row(entry) for entry in group.entries.values()))


def _way_row(entry: Entry) -> list[str]:
    name = f"**{entry.title}**" if entry.key == summary.OURS else entry.title
    if not entry.has_numbers:
        return [entry.key, name, *["–"] * (len(PHASES) + 4)]
    way = entry.way
    split = summary.phases(way)
    steady = seconds(summary.overhead(way)) if summary.has_steady(way) else "–"
    times = entry.times_ours
    return [
        entry.key,
        name,
        seconds(summary.first_overhead(way)),
        steady,
        *(seconds(split[name]) if split[name] else "0" for name in PHASES),
        "" if times is None else f"{times:.1f}",
        "equal" if summary.pictures_equal(way) else "differ",
    ]


def _explained(group: Group) -> Iterator[str]:
    """What each way does, why one has no numbers, and what differs."""
    for entry in group.entries.values():
        kind = WAYS.get(entry.key)
        # What was done in that run, which later versions of this benchmark may do in another way.
        run = "" if kind is None or len(group.runs) == 1 else f" (run {group.runs.index(entry.found) + 1})"
        text = f"- {entry.key}{run}: {_engine(entry, group) if kind is None else entry.way['what']}"
        if not entry.has_numbers:
            text += f". **No numbers: {entry.way['status']}**: {_short(entry.way['reason'])}"
        elif entry.way["status"] == "cut":
            text += f". Cut short: {entry.way['reason']}"
        differing = [c["differs"] for c in entry.way["cycles"] if c.get("differs")]
        if differing and entry.has_numbers:
            text += f". Pictures differ {differing[0]}"
        yield f"{text}."


def _engine(entry: Entry, group: Group) -> str:
    """What is done with an engine of its own, and in what it differs from the other ways."""
    text = "SGLang's own server processes, unmodified, asked through its scheduler"
    if "model" not in entry.way:
        return text
    way, theirs = entry.way, entry.found["model"]
    its = way["model"]
    text += "; "
    if entry.has_numbers:
        handed = way["cycles"][-1]["handed"]
        whole = f"the whole transformer ({_gb(handed['bytes'])} in {handed['tensors']} tensors)"
        if entry.key == sglang.STOCK:
            text += f"after the resume {whole} in {len(handed['requests'])} flattened buckets by CUDA IPC; "
        else:
            text += f"{whole} is written while it sleeps; "
    if sglang.comparable(way, entry.found):
        text += f"the transformer is that of the other ways, the pipeline has {_gb(its['whole_bytes'])} "
        text += f"(theirs {_gb(theirs['whole_bytes'])}, with larger text encoders)"
    else:
        text += f"its transformer has {_gb(its['trained_bytes'])} (theirs {_gb(theirs['trained_bytes'])}), "
        text += "so there is no factor"
    through = group.entries.get(sglang.PLUGIN)
    if entry.key == sglang.STOCK and entry.has_numbers and through is not None and through.has_numbers:
        steady = summary.overhead(way) / summary.overhead(through.way)
        first = summary.first_overhead(way) / summary.first_overhead(through.way)
        text += f"; {steady:.1f} × as long as the same engine through weightstore, in the first cycle "
        text += f"{first:.1f} ×"
    text += f"; {sglang.STOCK} and {sglang.PLUGIN} have their pictures compared with each other"
    return f"{text}; again: `{way['notes']['command']}`" if way["notes"]["command"] else text


def _short(reason: str | None) -> str:
    """The first line: what a child said in its log is in the file."""
    if not reason:
        return "no reason was recorded"
    return reason.splitlines()[0].removesuffix("; its log ends with").rstrip(".;")


def _memory_table(group: Group) -> list[str]:
    rows = []
    for entry in group.measured:
        last = entry.way["cycles"][-1].get("memory")
        if last is None:
            continue
        base = entry.way["baseline"]["host"]
        row = [entry.title]
        for state in ("awake", "asleep"):
            point = last[state]
            device = "–" if point["device"] is None else format_size(point["device"])
            row += [
                device,
                format_size(max(point["used"] - base, 0)),
                format_size(point["processes"]),
                format_size(point["arena"]) if point["arena"] else "–",
            ]
        rows.append(row)
    titles = [f"{state}: {what}" for state in ("awake", "asleep") for what in _KINDS]
    return _table(["", *titles], rows)


_KINDS: Final = ("device", "host", "processes", "arena")


def _checks_table(checks: Iterable[summary.Check]) -> list[str]:
    rows = [
        [
            check.what,
            f"{check.value:.3g} {check.unit}" if check.value < 1000 else f"{check.value:.0f} {check.unit}",
            f"{'≥' if check.goal.at_least else '≤'} {check.goal.bound:g}",
            "met" if check.met else "**missed**",
        ]
        for check in checks
    ]
    return _table(("", "measured", "goal", ""), rows)


def _sharing_table(rows: Sequence[Json]) -> list[str]:
    cells = [
        [
            str(row["engines"]),
            format_size(row["one_version"]),
            f"{summary.copies_of_one(row):.3f} ×",
            format_size(row["after_refits"]),
            f"{summary.copies_of_trained(row):.3f} ×",
        ]
        for row in rows
    ]
    return _table(("engines", "one version", "of the model", "after refits", "trained part"), cells)


def _sizes(rows: Sequence[Json]) -> str:
    row = rows[0]
    return f"frozen {format_size(row['frozen_bytes'])}, trained {format_size(row['trained_bytes'])}"


def _facts(group: Group) -> Iterator[str]:
    if group.measured:
        counts: dict[int, list[str]] = {}
        for entry in group.measured:
            counts.setdefault(len(entry.way["cycles"]), []).append(entry.key)
        cycles = "; ".join(f"{count} of {', '.join(keys)}" for count, keys in counts.items())
        drawn = [each for entry in group.measured for each in summary.drawn_again(entry.way)]
        yield (
            f"- Cycles, with the first: {cycles}. An image that was drawn again took "
            f"{seconds(min(drawn))} to {seconds(max(drawn))}."
        )
    for number, run in enumerate(group.runs, 1):
        machine, limit = run["machine"], run["limit"]
        device = limit["device"]
        name = "This run" if len(group.runs) == 1 else f"Run {number}"
        facts = [device["device"]]
        if "driver" in device:
            facts.append(f"driver {device['driver']}, CUDA {device['torch_cuda']}, /dev/shm {device['shm']}")
        facts.append(f"{machine['cores']} cores ({machine['cpu']}), {machine['memory']} of memory")
        facts.append(f"Python {machine['python']}, torch {machine['torch']}, kernel {machine['kernel']}")
        changes = machine.get("changed_files")
        since = f" and changes in {changes} files since" if changes else ""
        facts.append(f"revision {machine['revision'][:12].strip()}{since}")
        yield f"- {name}, {machine['date'][:10]}: {'; '.join(facts)}."
        into, out = summary.rate(run, "h2d"), summary.rate(run, "d2h")
        if into is not None and out is not None and group.on_gpu:
            yield (
                f"- Its link, one pinned copy of the same bytes: {into / 1e9:.1f} GB/s to the device, "
                f"{out / 1e9:.1f} GB/s from it."
            )
        if run.get("trainer_needs"):
            kind = "device memory" if group.on_gpu else "memory"
            yield f"- For its step the trainer took {format_size(run['trainer_needs'])} of {kind}."
        if why := _not_shared(run):
            yield f"- Host memory by the number of engines, left out: {why}."
        if not run["complete"]:
            yield f"- It was cut off after {run['seconds']:.0f} s; what it had found until then is here."
        yield f"- Again: `{run['command']}`, then `python -m bench report`."


def _not_shared(run: Json) -> str | None:
    """Why rows that were asked for are not there."""
    if run.get("sharing_left_out"):
        return _short(run["sharing_left_out"])
    asked = run.get("sharing") is not None
    return "the run ended before that" if asked and not run["sharing"] else None


def _device(group: Group) -> str:
    return "a CPU" if not group.on_gpu else group.device


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else format_size(int(nbytes))


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(titles) + " |", "|" + "|".join(["---"] * len(titles)) + "|"]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(lines) + "\n"
