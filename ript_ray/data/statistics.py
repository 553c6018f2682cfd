"""Normalisation statistics of demonstrations, as openpi computes them: over whole chunks, in two passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from ript_ray.data.windows import HORIZON
from ript_ray.policies.transform import check_relative
from ript_ray.types import Trajectory

_BINS = 5000
"""Of the histograms from which the quantiles are read, between the smallest and the largest value."""

Stats = dict[str, dict[str, list[float]]]


def norm_stats(source: Callable[[], Iterable[Trajectory]], relative: int = 0, horizon: int = HORIZON) -> Stats:
    """``state`` and ``actions`` → ``mean``, ``std``, ``q01``, ``q99``, one number for each dimension.

    The actions of every chunk count, from each step of each trajectory on; behind the end the last one is repeated.

    Args:
        source: opens the demonstrations; called twice, and one trajectory is in memory at a time.
        relative: so many first action dimensions are taken relative to the state at the start of the chunk.
        horizon: actions in a chunk.

    Raises:
        ValueError: when there are no demonstrations.
        UserError: when they have fewer dimensions than shall be relative.
    """
    groups = {"state": _Running(), "actions": _Running()}
    for change in (_Running.add, _Running.count):
        for trajectory in source():
            change(groups["state"], trajectory.states)
            change(groups["actions"], _chunks(trajectory, relative, horizon))
    return {name: running.result() for name, running in groups.items()}


def _chunks(trajectory: Trajectory, relative: int, horizon: int) -> np.ndarray:
    """All actions of all chunks: float64[L·horizon, A]."""
    actions = trajectory.actions if trajectory.labels is None else trajectory.labels
    steps = np.minimum(np.arange(len(actions))[:, None] + np.arange(horizon), len(actions) - 1)
    chunks = actions[steps].astype(np.float64)
    check_relative("convert.relative", relative, actions.shape[1], trajectory.states.shape[1])
    chunks[..., :relative] -= trajectory.states[:, None, :relative]
    return chunks.reshape(-1, actions.shape[1])


class _Running:
    """Moments and range in the first pass, histograms in the second."""

    def __init__(self) -> None:
        self._rows = 0
        self._sum = self._squares = self._low = self._high = np.zeros(0)
        self._counts = np.zeros((0, _BINS))

    def add(self, rows: np.ndarray) -> None:
        rows = rows.astype(np.float64)
        low, high = rows.min(0), rows.max(0)
        if self._rows == 0:
            self._low, self._high = low, high
            self._sum, self._squares = np.zeros((2, rows.shape[1]))
            self._counts = np.zeros((rows.shape[1], _BINS))
        self._low, self._high = np.minimum(self._low, low), np.maximum(self._high, high)
        self._rows += len(rows)
        self._sum = self._sum + rows.sum(0)
        self._squares = self._squares + np.square(rows).sum(0)

    def count(self, rows: np.ndarray) -> None:
        for column, (low, high) in enumerate(zip(self._low, self._high, strict=True)):
            self._counts[column] += np.histogram(rows[:, column], _BINS, (low, high if high > low else low + 1))[0]

    def result(self) -> dict[str, list[float]]:
        if self._rows == 0:
            raise ValueError("no demonstrations to compute statistics of")
        mean = self._sum / self._rows
        deviation = np.sqrt(np.maximum(self._squares / self._rows - mean**2, 0.0))
        rows = {"mean": mean, "std": deviation, "q01": self._quantile(0.01), "q99": self._quantile(0.99)}
        return {name: values.tolist() for name, values in rows.items()}

    def _quantile(self, share: float) -> np.ndarray:
        """The upper edge of the bin in which the share is reached."""
        reached = (self._counts.cumsum(1) >= share * self._rows).argmax(1) + 1
        span = np.where(self._high > self._low, self._high - self._low, 0.0)
        return self._low + reached / _BINS * span
