"""What one update trains on: samples, their windows, advantages and order, all fixed by configuration and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from ript_ray.algos.advantages import AdvantageCounts, against_task, credit_fastest, process
from ript_ray.config import Config, DataConfig, ObjectiveConfig
from ript_ray.config.learning import OWN, TRAITS
from ript_ray.data.windows import batches_with_good, seen_starts, shuffled_batches, window_starts
from ript_ray.errors import UserError
from ript_ray.types import EpisodeReport, Shard

Demos = Mapping[int, tuple[EpisodeReport, Any]]
"""Demonstrations by identifiers below 0: report, and trajectory or reference."""


def make_shard(
    step: int,
    reports: Mapping[int, EpisodeReport],
    advantages: Mapping[int, float],
    trajectories: Mapping[int, Any],
    config: Config,
    demos: Demos = MappingProxyType({}),
) -> tuple[Shard, AdvantageCounts]:
    """The shard of an update, whole, for all learners together.

    Args:
        step: of the update, from 0.
        reports: of the trajectories to train on, by identifier.
        advantages: leave-one-out, by identifier.
        trajectories: or references of them, by identifier.
        config: the whole configuration.
        demos: to make up ``data.demo_share`` of each batch, by identifiers below 0.

    Returns:
        The shard, without steps when nothing in it is good; and what was met in processing the advantages.

    Raises:
        UserError: when demonstrations have more or fewer cameras than rollouts.
    """
    train = config.train
    cameras = {report.cameras for report in [*reports.values(), *(demo for demo, _ in demos.values())]}
    if len(cameras) > 1:
        raise UserError(
            f"data.demos={config.data.demos!r} with data.demo_share={config.data.demo_share:g}: demonstrations and "
            f"rollouts have {' and '.join(map(str, sorted(cameras)))} cameras; expected as many (data.cameras)"
        )
    identifiers = sorted(reports)  # whichever finished first
    windows = np.array(
        [(i, start) for i in identifiers for start in trained_starts(reports[i], config.data)], dtype=np.int32
    ).reshape(-1, 2)
    if config.data.distinct is not None and config.data.distinct < len(windows):
        rng = np.random.default_rng([config.run.seed, step, 1])
        windows = windows[np.sort(rng.choice(len(windows), config.data.distinct, replace=False))]
    raw, neither = credited(
        [reports[i] for i in identifiers], np.array([advantages[i] for i in identifiers]), config.objective
    )
    # What counts as neither good nor bad has no weight, and no say in how the others are normalised.
    weights = np.zeros_like(raw)
    weights[~neither], counts = process(raw[~neither], config.objective)
    good = np.isin(windows[:, 0], np.array(identifiers)[raw > 0])
    counting = np.array(identifiers)[_teaching(raw, weights, config.objective)]
    if config.objective.name != "imitation" and not np.isin(windows[:, 0], counting).any():
        windows = windows[:0]  # from failures alone nothing is learnt: the policy that acts goes on acting
        good = good[:0]
    seed = [config.run.seed, step]
    shown = round(config.data.demo_share * train.batch_size) if demos else 0
    order = batches_with_good(
        good, config.data.good_share, train.epochs, train.batch_size - shown, seed, train.min_steps
    )
    if shown and len(order):  # without rollouts there is no update
        starts = [(i, s) for i, (demo, _) in demos.items() for s in starts_seen(demo, config.data)]
        rows = len(windows) + shuffled_batches(len(starts), 0, shown, [*seed, 2], len(order))
        # Learners take columns, so demonstrations must not stand in the last.
        order = np.random.default_rng([*seed, 3]).permuted(np.concatenate([order, rows], 1), axis=1).astype(np.int32)
        windows = np.concatenate([windows, np.array(starts, dtype=np.int32)])
    sure = dict.fromkeys(demos, 1.0)
    shard = Shard(
        step=step,
        trajectories={i: trajectories[i] for i in identifiers} | {i: demo for i, (_, demo) in demos.items()},
        advantages=dict(zip(identifiers, raw.tolist(), strict=True)) | sure,
        weights=dict(zip(identifiers, weights.tolist(), strict=True)) | sure,
        windows=windows,
        order=order,
        batch_size=train.batch_size,
    )
    return shard, counts


def _teaching(advantages: np.ndarray, weights: np.ndarray, objective: ObjectiveConfig) -> np.ndarray:
    """Which trajectories are good, and count as such for the objective: bool[N]."""
    good = advantages > 0
    return (
        good & (weights > 0) if TRAITS.get(objective.name, OWN).weighs else good
    )  # normalising may have left nothing of it


def number_demos(demos: Sequence[tuple[EpisodeReport, Any]]) -> Demos:
    """Demonstrations for `make_shard`, with identifiers that no rollout has."""
    return {-1 - i: demo for i, demo in enumerate(demos)}


def credited(
    reports: Sequence[EpisodeReport], advantages: np.ndarray, objective: ObjectiveConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Advantages as ``objective.baseline`` and ``objective.fastest`` want them.

    Args:
        reports: of all trajectories of an update.
        advantages: leave-one-out within each group, float[N].
        objective: its settings.

    Returns:
        float64[N], and which of them ``fastest`` left without credit: bool[N].
    """
    successes = np.array([report.success for report in reports], dtype=bool)
    tasks = [report.context.env_id for report in reports]
    if objective.baseline == "task":
        advantages = against_task(successes, tasks)
    if objective.fastest < 1.0:
        lengths = np.array([report.length for report in reports])
        fast = credit_fastest(advantages, lengths, successes, tasks, objective.fastest)
        return fast, (advantages != 0) & (fast == 0)
    return np.asarray(advantages, dtype=np.float64), np.zeros(len(advantages), dtype=bool)


def trained_starts(report: EpisodeReport, data: DataConfig) -> list[int]:
    """Starts of the windows of a trajectory that are trained on, as ``data.windows`` says."""
    if data.windows == "all":
        return list(window_starts(report.length, short=data.short, tail=data.tail))
    return starts_seen(report, data)


def starts_seen(report: EpisodeReport, data: DataConfig) -> list[int]:
    """Starts of its windows that have a frame, because the policy, or the camera of a demonstration, looked there."""
    return seen_starts(report.length, report.frame_steps, data.short, data.tail)
