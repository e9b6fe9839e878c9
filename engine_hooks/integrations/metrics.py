"""What Prometheus is told of an engine: read from its `Controls` when somebody asks, kept nowhere else.

Operations that the engine's own code does with the hook, past `Controls`, show in the gauges of state and
version only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from engine_hooks.integrations.controls import Controls
from engine_hooks.lifecycle import State

PREFIX: Final = "weightstore_engine"

_LAST: Final = {
    "sleep": {
        "freed_bytes": "Device memory that the last sleep gave back, measured.",
        "residual_bytes": "Device memory still in use after the last sleep, by whatever.",
        "drain_seconds": "Seconds that the last sleep waited for generations.",
        "seconds": "Seconds of the last sleep.",
    },
    "wake": {
        "copied_bytes": "Weights that the last wake copied to the device.",
        "seconds": "Seconds of the last wake.",
    },
    "refit": {
        "copied_bytes": "Weights that the last refit copied to the device.",
        "drain_seconds": "Seconds that the last refit waited for generations.",
        "seconds": "Seconds of the last refit.",
    },
}
"""Gauges of the last operation that did something: names of its report, and what they mean."""


class EngineCollector(Collector):
    """Register it with the server's own registry: ``REGISTRY.register(EngineCollector(controls))``."""

    def __init__(self, controls: Controls) -> None:
        self._controls = controls

    def collect(self) -> Iterator[Metric]:
        hook = self._controls.hook
        facts = {"model": hook.model, "tag": hook.tag, "device": str(hook.backend.device)}
        yield InfoMetricFamily(PREFIX, "What this engine follows.", value=facts)
        state = GaugeMetricFamily(
            f"{PREFIX}_state", "1 for the state that a component is in.", labels=["component", "state"]
        )
        for name, actual in hook.states.items():
            for possible in State:
                state.add_metric([name, possible.value], float(actual is possible))
        yield state
        yield GaugeMetricFamily(
            f"{PREFIX}_version", "The version on the device, or that a wake would bring.", value=hook.version
        )
        yield GaugeMetricFamily(
            f"{PREFIX}_store_connected",
            "1 while this engine is connected to its store.",
            value=float(hook.store.link.connection is not None),
        )
        for operation, report in list(self._controls.last.items()):
            for fact, meaning in _LAST[operation].items():
                name = f"{PREFIX}_last_{operation}_{fact}"
                yield GaugeMetricFamily(name, meaning, value=float(getattr(report, fact)))
        operations = CounterMetricFamily(
            f"{PREFIX}_operations", "Operations that were asked for.", labels=["operation", "outcome"]
        )
        for (operation, outcome), count in self._controls.counted().items():
            operations.add_metric([operation, outcome], count)
        yield operations


def registry_of(controls: Controls) -> CollectorRegistry:
    """A registry with this engine's metrics and nothing else."""
    registry = CollectorRegistry()
    registry.register(EngineCollector(controls))
    return registry
