"""What a server's control endpoints mean: verbs become calls of an `EngineHook`, results become answers.

There is no HTTP here (see `answers` for what an answer is). The shapes are those of SGLang Diffusion, with
`tags` as in SGLang's language model server, and of vLLM's sleep mode, so that their clients need no change:

    release, resume           {"success", "sleeping", "message"}
    update_from_store, check  {"success", "message"}
    checksum                  {module: digest | "not_found"}
    sleep, wake_up            no body

with further facts beside.

Verbs block for as long as the hook does (a sleep waits for generations): call them on any thread but an event
loop's.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from engine_hooks.components import ALL
from engine_hooks.hook import EngineHook
from engine_hooks.integrations.answers import (
    Answer,
    Shape,
    plain_error,
    status_of,
    unsuccessful,
    vllm_error,
)
from engine_hooks.integrations.checksums import module_checksum, tensor_checksums
from engine_hooks.lifecycle import State
from engine_hooks.reports import RefitReport, SleepReport, WakeReport
from weightstore.errors import UsageError, WeightstoreError
from weightstore.sizes import format_size

ELSEWHERE: Final = frozenset({"kv_cache", "cuda_graph", "scheduling"})
"""Tags of SGLang's and vLLM's that name nothing a diffusion engine keeps: accepted, and nothing is done."""
LEVELS: Final = (1, 2)
"""vLLM's sleep levels. Both do the same here: no weight stays on the device, and the store has them all."""
_TRIES: Final = 4
"""Refits that one update makes at most."""
_SHOWN: Final = 5
"""Names that a message lists."""

_log = logging.getLogger("engine_hooks")


class Controls:
    """The verbs for one engine.

    Attributes:
        hook: the engine's.
        last: the last report of each operation that did something.
    """

    def __init__(self, hook: EngineHook) -> None:
        self.hook = hook
        self._counts: Counter[tuple[str, str]] = Counter()
        self.last: dict[str, SleepReport | WakeReport | RefitReport] = {}
        self._counting = threading.Lock()

    @property
    def sleeping(self) -> bool:
        """Whether any component is asleep."""
        return State.ASLEEP in self.hook.states.values()

    def counted(self) -> dict[tuple[str, str], int]:
        """How often each operation (sleep, wake, refit, checksum, check) was done, repeated, refused or
        failed, by (operation, outcome)."""
        with self._counting:
            return dict(self._counts)

    # -- SGLang's verbs ----------------------------------------------------------------------------

    def release(self, tags: Sequence[str] | None = None) -> Answer:
        """Sleep: all components, or those that `tags` name ("weights" and none at all mean all)."""
        return self._attempt("sleep", lambda: self._memory(self._sleep(tags)), self._memory_refused)

    def resume(self, tags: Sequence[str] | None = None) -> Answer:
        """Wake, as `release`. If everything slept, on the newest version."""
        return self._attempt("wake", lambda: self._memory(self._wake(tags)), self._memory_refused)

    def update_from_store(
        self, model: str | None = None, tag: str | None = None, version: int | None = None
    ) -> Answer:
        """Refit: have the version that the tag names now, at once or, if everything sleeps, at the next wake.

        Args:
            model, tag: what the caller means to update; refused if the engine follows something else.
            version: refused, before anything changes, unless the tag names this very version.
        """

        def work() -> dict[str, Any]:
            report = self._refit(model, tag, version)
            what = f"version {report.version} of {self.hook.model!r}"
            if report.asleep:
                message = f"the engine sleeps, and will wake on {what}"
            elif report.changed:
                message = f"the engine has {what}: {_count(len(report.changed), 'tensor')} changed"
            else:
                message = f"the engine has {what}; no tensor changed"
            return {
                "success": True,
                "message": message,
                "version": report.version,
                "previous": report.previous,
                "sleeping": self.sleeping,
                "copied_bytes": report.copied_bytes,
                "seconds": report.seconds,
            }

        return self._attempt("refit", work, self._refused)

    def checksum(self, module_names: Sequence[str] | None = None) -> Answer:
        """The checksum of each component named, or of all, on the device: they must be awake."""

        def work() -> dict[str, Any]:
            modules = self.hook.modules
            names = list(modules) if module_names is None else list(dict.fromkeys(module_names))
            known = [name for name in names if name in modules]
            with self.hook.running(known):
                found = {name: module_checksum(modules[name]) for name in known}
            self._count("checksum", "done")
            return {name: found.get(name, "not_found") for name in names}

        return self._attempt("checksum", work, plain_error)

    def check(self, target_module: str | None, expected: Mapping[str, str] | None) -> Answer:
        """Compare checksums of a component's tensors, by their names in its module, with expected ones."""

        def work() -> dict[str, Any]:
            if not target_module:
                raise UsageError("target_module is required")
            if not expected:
                raise UsageError("expected_named_tensors_sha256 is required")
            module = self.hook.modules.get(target_module)
            if module is None:
                raise UsageError(f"no module {target_module!r}; there are {', '.join(self.hook.modules)}")
            with self.hook.running([target_module]):
                found = tensor_checksums(module, expected)
            missing = [name for name in expected if name not in found]
            wrong = [name for name, digest in found.items() if digest != expected[name].lower()]
            if missing or wrong:
                reasons = [f"it has no {_listed(missing)}"] * bool(missing)
                reasons += [f"other bytes in {_listed(wrong)}"] * bool(wrong)
                raise UsageError(f"{target_module} is not as expected: {'; '.join(reasons)}")
            self._count("check", "done")
            message = f"{_count(len(found), 'tensor')} of {target_module} as expected"
            return {"success": True, "message": message}

        return self._attempt("check", work, unsuccessful)

    def weight_version(self) -> Answer:
        """The version on the device; while all sleep, the one that a wake would bring."""
        version = self.hook.version
        return Answer(
            200,
            {
                "weight_version": str(version),
                "version": version,
                "model": self.hook.model,
                "tag": self.hook.tag,
                "sleeping": self.sleeping,
            },
        )

    # -- vLLM's verbs ------------------------------------------------------------------------------

    def sleep(self, level: int = 1) -> Answer:
        """Sleep: all components. Generations in flight are waited for."""

        def work() -> None:
            if level not in LEVELS:
                raise UsageError(f"no sleep level {level}; there are {' and '.join(map(str, LEVELS))}")
            self._sleep(None)

        return self._attempt("sleep", work, vllm_error)

    def wake_up(self, tags: Sequence[str] | None = None) -> Answer:
        """Wake, as `resume`."""

        def work() -> None:
            self._wake(tags)

        return self._attempt("wake", work, vllm_error)

    def is_sleeping(self) -> Answer:
        return Answer(200, {"is_sleeping": self.sleeping})

    # -- serving -----------------------------------------------------------------------------------

    def health(self) -> Answer:
        """An engine that sleeps is healthy; one whose update failed half way is not, until it is woken."""
        states = {name: state.value for name, state in self.hook.states.items()}
        facts = {"state": self.hook.state.value, "components": states, "version": self.hook.version}
        if self.hook.state is State.BROKEN:
            error = "an update failed half way; call resume_memory_occupation to fill the weights anew"
            return Answer(503, {"status": "unhealthy", "error": error, **facts})
        return Answer(200, {"status": "ok", **facts})

    @contextmanager
    def generation(self, needs: Iterable[str] | None = None) -> Iterator[int]:
        """Around a generation: `release` and `update_from_store` wait for its end. Yields its version.

        Args:
            needs: the components that must be awake; None for all.

        Raises:
            EngineAsleep, EngineBroken: they are not (see `answers.generation_refused`).
            UsageError: called on an event loop, which would stand still for as long as a sleep or refit under
                way does, while that may be waiting for a request on the same loop.
        """
        _require_no_event_loop()
        with self.hook.running([ALL] if needs is None else needs) as version:
            yield version

    # -- doing and counting ------------------------------------------------------------------------

    def _sleep(self, tags: Sequence[str] | None) -> SleepReport:
        report = self.hook.sleep(_ours(tags))
        self._did("sleep", report if report.slept else None)
        return report

    def _wake(self, tags: Sequence[str] | None) -> WakeReport:
        report = self.hook.wake(_ours(tags))
        self._did("wake", report if report.woken else None)
        return report

    def _refit(self, model: str | None, tag: str | None, version: int | None) -> RefitReport:
        hook = self.hook
        for what, asked, bound in (("model", model, hook.model), ("tag", tag, hook.tag)):
            if asked not in (None, bound):
                raise UsageError(
                    f"this engine follows {what} {bound!r}, not {asked!r}; ask for that, or have the tag "
                    "name what it should run (`weightstore tag`)"
                )
        # The hook itself takes what it has heard of and does not mind a store that is away; who asks for an
        # update wants to know. And a lease has one offer at a time, so that of several versions committed
        # since the last refit the first may come first.
        reports: list[RefitReport] = []
        for _ in range(_TRIES):
            named = self._named()
            if version not in (None, named):
                raise UsageError(
                    f"tag {hook.tag!r} names version {named}, not {version}; the engine has {hook.version}",
                    version=named,
                )
            reports.append(hook.refit())
            if reports[-1].version == named:
                report = _together(reports)
                self._did("refit", report if report.version != report.previous else None)
                return report
        raise UsageError(
            f"tag {hook.tag!r} moves faster than refits: it names version {named}, and after {_TRIES} "
            f"of them the engine has {hook.version}",
            version=hook.version,
        )

    def _named(self) -> int:
        """The version that the tag names now. Raises StoreGone, StoreTimeout (the tag was removed)."""
        return self.hook.store.wait_for(self.hook.model, self.hook.tag, after=0, timeout=0)

    def _did(self, operation: str, report: SleepReport | WakeReport | RefitReport | None) -> None:
        self._count(operation, "repeated" if report is None else "done")
        if report is not None:
            self.last[operation] = report

    def _count(self, operation: str, outcome: str) -> None:
        with self._counting:
            self._counts[operation, outcome] += 1

    def _attempt(
        self,
        operation: str,
        work: Callable[[], dict[str, Any] | None],
        refused: Shape,
    ) -> Answer:
        """The answer of one verb, whatever becomes of it."""
        try:
            body = work()
        except Exception as error:
            status = status_of(error)
            if status == 500:
                _log.exception("%s failed", operation)
            else:
                _log.warning("%s refused: %s", operation, error)
            self._count(operation, "failed" if status >= 500 else "refused")
            known = isinstance(error, WeightstoreError)
            return Answer(status, refused(str(error) if known else f"{type(error).__name__}: {error}"))
        return Answer(200, body)

    # -- shapes ------------------------------------------------------------------------------------

    def _memory(self, report: SleepReport | WakeReport) -> dict[str, Any]:
        if isinstance(report, SleepReport):
            done, already = report.slept, "already sleeping"
            message = f"released {format_size(report.freed_bytes)}; the store keeps the weights"
            facts = {"freed_bytes": report.freed_bytes, "residual_bytes": report.residual_bytes}
        else:
            done, already = report.woken, "already awake"
            message = f"resumed on version {report.version}"
            facts = {"copied_bytes": report.copied_bytes, "mapped_bytes": report.mapped_bytes}
        if not done:
            message = already if report.already else "the tags name nothing that is held here"
        return {
            "success": True,
            "sleeping": self.sleeping,
            "message": message,
            "components": list(done),
            "version": self.hook.version,
            **facts,
            "seconds": report.seconds,
        }

    def _memory_refused(self, message: str) -> dict[str, Any]:
        return {**unsuccessful(message), "sleeping": self.sleeping}

    def _refused(self, message: str) -> dict[str, Any]:
        return {**self._memory_refused(message), "version": self.hook.version}


def _together(reports: Sequence[RefitReport]) -> RefitReport:
    """Several refits as one."""
    last = reports[-1]
    return RefitReport(
        version=last.version,
        previous=reports[0].previous,
        asleep=last.asleep,
        changed=tuple(dict.fromkeys(name for report in reports for name in report.changed)),
        copied_bytes=sum(report.copied_bytes for report in reports),
        merged=sum(report.merged for report in reports),
        runs=sum(report.runs for report in reports),
        drain_seconds=sum(report.drain_seconds for report in reports),
        seconds=sum(report.seconds for report in reports),
    )


def _ours(tags: Sequence[str] | None) -> list[str] | None:
    """The components that `tags` mean, None for all; empty if all of them name nothing held here."""
    return [tag for tag in tags if tag not in ELSEWHERE] if tags else None


def _require_no_event_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise UsageError(
        "generation() may have to wait and must not be called on an event loop; write the endpoint as `def`, "
        "or run it with asyncio.to_thread"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
