"""Metrics of all replicas in one response, with a label for the replica."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

LABEL = "replica"


class _Merged(Collector):
    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for replica, text in self._texts.items():
            for family in text_string_to_metric_families(text):
                merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    merged.add_sample(sample.name, {LABEL: replica, **sample.labels}, sample.value)
        return families.values()


def merged_metrics(texts: Mapping[str, str]) -> bytes:
    """Return the metrics of all replicas in Prometheus's text format.

    Args:
        texts: metrics of each replica in this format, by the replica's id.
    """
    # Without this, a registry collects all metrics once more to know their names.
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Merged(texts))
    return generate_latest(registry)
