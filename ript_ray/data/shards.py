"""What one update trains on: samples, their windows, advantages and order, all fixed by configuration and seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ript_ray.algos.advantages import AdvantageCounts, credit_fastest, process
from ript_ray.config import Config, DataConfig
from ript_ray.data.windows import shuffled_batches, window_starts
from ript_ray.types import EpisodeReport, Shard


def make_shard(
    step: int,
    reports: Mapping[int, EpisodeReport],
    advantages: Mapping[int, float],
    trajectories: Mapping[int, Any],
    config: Config,
) -> tuple[Shard, AdvantageCounts]:
    """The shard of an update, whole, for all learners together.

    Args:
        step: of the update, from 0.
        reports: of the trajectories to train on, by identifier.
        advantages: leave-one-out, by identifier.
        trajectories: or references of them, by identifier.
        config: the whole configuration.

    Returns:
        The shard, and what was met in processing the advantages.
    """
    train = config.train
    identifiers = sorted(reports)  # whichever finished first
    windows = np.array(
        [(i, start) for i in identifiers for start in trained_starts(reports[i], config.data)], dtype=np.int32
    ).reshape(-1, 2)
    if config.data.distinct is not None and config.data.distinct < len(windows):
        rng = np.random.default_rng([config.run.seed, step, 1])
        windows = windows[np.sort(rng.choice(len(windows), config.data.distinct, replace=False))]
    raw = np.array([advantages[i] for i in identifiers])
    if config.objective.fastest < 1.0:
        raw = credit_fastest(
            raw,
            np.array([reports[i].length for i in identifiers]),
            np.array([reports[i].success for i in identifiers], dtype=bool),
            [reports[i].context.env_id for i in identifiers],
            config.objective.fastest,
        )
    weights, counts = process(raw, config.objective)
    shard = Shard(
        step=step,
        trajectories={i: trajectories[i] for i in identifiers},
        advantages=dict(zip(identifiers, raw.tolist(), strict=True)),
        weights=dict(zip(identifiers, weights.tolist(), strict=True)),
        windows=windows,
        order=shuffled_batches(len(windows), train.epochs, train.batch_size, [config.run.seed, step], train.min_steps),
        batch_size=train.batch_size,
    )
    return shard, counts


def trained_starts(report: EpisodeReport, data: DataConfig) -> list[int]:
    """Starts of the windows of a trajectory that are trained on, as ``data.windows`` says."""
    starts = window_starts(report.length, short=data.short, tail=data.tail)
    if data.windows == "all":
        return list(starts)
    return [int(step) for step in report.frame_steps if int(step) in starts]
