"""Series of a gauge over a changing set, such as tenants, replaced as a whole.

Where processes share one directory of values (PROMETHEUS_MULTIPROC_DIR), a series cannot be
removed; there it becomes 0.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from prometheus_client import Gauge

Labels = tuple[str, ...]
_SHARED = "PROMETHEUS_MULTIPROC_DIR"


class Series:
    """The series of one gauge; give one gauge to one `Series` only."""

    def __init__(self, gauge: Gauge) -> None:
        self.gauge = gauge
        self._labels: set[Labels] = set()

    def replace(self, values: Mapping[Labels, float]) -> None:
        """Export exactly `values`, by labels in the gauge's order."""
        for removed in self._labels - values.keys():
            if os.environ.get(_SHARED):
                self.gauge.labels(*removed).set(0.0)
            else:
                self.gauge.remove(*removed)
        for labels, value in values.items():
            self.gauge.labels(*labels).set(value)
        self._labels = set(values)
