"""A run's metrics where Prometheus finds them: one gauge for each number of a row, through Ray's exporter."""

from __future__ import annotations

import re
from typing import Any

from ray.util.metrics import Gauge

PREFIX = "ript_"
"""Ray puts ``ray_`` before it."""


class Metrics:
    """Shows the newest row of each section.

    A number ``rollout/success_rate`` becomes the gauge ``ray_ript_rollout_success_rate`` with the tag ``run``; those
    of a task, ``task/libero_object/3/success_rate``, become ``ray_ript_task_success_rate`` with the tag ``task``.

    Args:
        run: name of the run directory.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Gauge] = {}

    def __call__(self, row: dict[str, Any]) -> None:
        """Set every gauge that the row has a number for."""
        for key, value in row.items():
            if key != "time" and isinstance(value, (int, float)):
                name, task = gauge_name(key)
                gauge = self._gauges.get(name)
                if gauge is None:
                    tags = ("run", "task") if task else ("run",)
                    gauge = self._gauges[name] = Gauge(name, f"{key} of the newest update", tags)
                gauge.set(float(value), {"run": self._run} | ({"task": task} if task else {}))


def gauge_name(key: str) -> tuple[str, str]:
    """Name of a number's gauge, without Ray's own prefix, and the task it is of, or nothing."""
    if key.startswith("task/"):
        task, _, number = key.removeprefix("task/").rpartition("/")
        return f"{PREFIX}task_{number}", task
    return PREFIX + re.sub(r"\W", "_", key), ""
