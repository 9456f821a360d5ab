"""A gauge's series as one whole: set what is there now, let go of what is not there any more.

For gauges that tell of a changing set, such as tenants. Where processes share one directory of
values (PROMETHEUS_MULTIPROC_DIR), a series cannot be taken back; there it becomes 0.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from prometheus_client import Gauge

Labels = tuple[str, ...]
_SHARED = "PROMETHEUS_MULTIPROC_DIR"


class Series:
    """The series of one gauge that this object has set; give one gauge to one `Series` only."""

    def __init__(self, gauge: Gauge) -> None:
        self.gauge = gauge
        self._there: set[Labels] = set()

    def replace(self, values: Mapping[Labels, float]) -> None:
        """`values` by labels in the gauge's order, and nothing else."""
        for gone in self._there - values.keys():
            if os.environ.get(_SHARED):
                self.gauge.labels(*gone).set(0.0)
            else:
                self.gauge.remove(*gone)
        for labels, value in values.items():
            self.gauge.labels(*labels).set(value)
        self._there = set(values)
