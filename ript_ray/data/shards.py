"""What one update trains on: samples, their windows, advantages and order, all fixed by configuration and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from ript_ray.algos.advantages import AdvantageCounts, against_task, credit_fastest, leave_one_out, process
from ript_ray.config import Config, DataConfig, ObjectiveConfig
from ript_ray.config.learning import OWN, TRAITS
from ript_ray.data.windows import batches_with_good, seen_starts, shuffled_batches, window_starts
from ript_ray.errors import UserError
from ript_ray.types import EpisodeReport, Sample, Shard


def samples_of(group: int, reports: Sequence[EpisodeReport], trajectories: Sequence[Any]) -> dict[int, Sample]:
    """Samples of a group's rollouts, by identifiers that follow from its number.

    Args:
        group: its number.
        reports: of all its K rollouts.
        trajectories: or references of them, in the same order.
    """
    advantages = leave_one_out(np.array([float(report.success) for report in reports])).tolist()
    members = zip(reports, trajectories, advantages, strict=True)
    return {identifier: Sample(*member) for identifier, member in enumerate(members, group * len(reports))}


def number_demos(demos: Sequence[tuple[EpisodeReport, Any]]) -> dict[int, Sample]:
    """Samples of demonstrations (report, and trajectory or reference), by identifiers that no rollout has."""
    return {-1 - i: Sample(report, demo, 1.0) for i, (report, demo) in enumerate(demos)}


def drop_older_than(samples: dict[int, Sample], version: int) -> int:
    """Drop what was played with weights before ``version``; how many there were."""
    stale = [i for i, sample in samples.items() if sample.report.policy_version < version]
    for i in stale:
        del samples[i]
    return len(stale)


def make_shard(
    step: int, samples: Mapping[int, Sample], config: Config, demos: Mapping[int, Sample] = MappingProxyType({})
) -> tuple[Shard, AdvantageCounts]:
    """The shard of an update, whole, for all learners together.

    Args:
        step: of the update, from 0.
        samples: to train on, by identifier.
        config: the whole configuration.
        demos: to make up ``data.demo_share`` of each batch, by identifiers below 0.

    Returns:
        The shard, without steps when nothing in it is good; and what was met in processing the advantages.

    Raises:
        UserError: when demonstrations have more or fewer cameras than rollouts.
    """
    _check_cameras([*samples.values(), *demos.values()], config.data)
    train = config.train
    identifiers = np.array(sorted(samples), dtype=np.int32)  # whichever finished first
    windows = _windows(samples, identifiers.tolist(), step, config)
    raw, neither = credited([samples[i] for i in identifiers.tolist()], config.objective)
    # What counts as neither good nor bad has no weight, and no say in how the others are normalised.
    weights = np.zeros_like(raw)
    weights[~neither], counts = process(raw[~neither], config.objective)
    good = np.isin(windows[:, 0], identifiers[raw > 0])
    counting = identifiers[_teaching(raw, weights, config.objective)]
    if config.objective.name != "imitation" and not np.isin(windows[:, 0], counting).any():
        windows = windows[:0]  # from failures alone nothing is learnt: the policy that acts goes on acting
        good = good[:0]
    seed = [config.run.seed, step]
    shown = round(config.data.demo_share * train.batch_size) if demos else 0
    order = batches_with_good(
        good, config.data.good_share, train.epochs, train.batch_size - shown, seed, train.min_steps
    )
    if shown and len(order):  # without rollouts there is no update
        windows, order = _with_demonstrations(windows, order, demos, shown, seed, config.data)
    sure = dict.fromkeys(demos, 1.0)
    shard = Shard(
        step=step,
        trajectories={i: sample.trajectory for i, sample in {**samples, **demos}.items()},
        advantages=dict(zip(identifiers.tolist(), raw.tolist(), strict=True)) | sure,
        weights=dict(zip(identifiers.tolist(), weights.tolist(), strict=True)) | sure,
        windows=windows,
        order=order,
        batch_size=train.batch_size,
    )
    return shard, counts


def without_frame(shard: Shard, samples: Mapping[int, Sample]) -> list[tuple[int, int]]:
    """Windows of rollouts that a shard draws, but that their trajectory has no frame for: (trajectory, step), in the
    order of their first use.
    """
    rows, first = np.unique(shard.order, return_index=True)
    seen = {i: set(sample.report.frame_steps.tolist()) for i, sample in samples.items()}
    drawn = shard.windows[rows[np.argsort(first)]].tolist()
    return [(i, start) for i, start in drawn if i in seen and start not in seen[i]]


def _check_cameras(samples: Sequence[Sample], data: DataConfig) -> None:
    cameras = {sample.report.cameras for sample in samples}
    if len(cameras) > 1:
        raise UserError(
            f"data.demos={data.demos!r} with data.demo_share={data.demo_share:g}: demonstrations and rollouts have "
            f"{' and '.join(map(str, sorted(cameras)))} cameras; expected as many (data.cameras)"
        )


def _windows(samples: Mapping[int, Sample], identifiers: Sequence[int], step: int, config: Config) -> np.ndarray:
    """All windows to train on, or as many as ``data.distinct`` allows: int32[N, 2]."""
    found = [(i, start) for i in identifiers for start in trained_starts(samples[i].report, config.data)]
    windows = np.array(found, dtype=np.int32).reshape(-1, 2)
    if config.data.distinct is None or config.data.distinct >= len(windows):
        return windows
    rng = np.random.default_rng([config.run.seed, step, 1])
    return windows[np.sort(rng.choice(len(windows), config.data.distinct, replace=False))]


def _with_demonstrations(
    windows: np.ndarray,
    order: np.ndarray,
    demos: Mapping[int, Sample],
    shown: int,
    seed: Sequence[int],
    data: DataConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """Windows and batches with ``shown`` windows of demonstrations in each batch."""
    starts = [(i, start) for i, demo in demos.items() for start in starts_seen(demo.report, data)]
    rows = len(windows) + shuffled_batches(len(starts), 0, shown, [*seed, 2], len(order))
    # Learners take columns, so demonstrations must not stand in the last.
    mixed = np.random.default_rng([*seed, 3]).permuted(np.concatenate([order, rows], 1), axis=1)
    return np.concatenate([windows, np.array(starts, dtype=np.int32)]), mixed.astype(np.int32)


def _teaching(advantages: np.ndarray, weights: np.ndarray, objective: ObjectiveConfig) -> np.ndarray:
    """Which trajectories are good, and count as such for the objective: bool[N]."""
    good = advantages > 0
    return (
        good & (weights > 0) if TRAITS.get(objective.name, OWN).weighs else good
    )  # normalising may have left nothing of it


def credited(samples: Sequence[Sample], objective: ObjectiveConfig) -> tuple[np.ndarray, np.ndarray]:
    """Advantages as ``objective.baseline`` and ``objective.fastest`` want them.

    Args:
        samples: all N of an update.
        objective: its settings.

    Returns:
        float64[N], and which of them ``fastest`` left without credit: bool[N].
    """
    reports = [sample.report for sample in samples]
    successes = np.array([report.success for report in reports], dtype=bool)
    tasks = [report.context.env_id for report in reports]
    advantages = np.array([sample.advantage for sample in samples], dtype=np.float64)
    if objective.baseline == "task":
        advantages = against_task(successes, tasks)
    if objective.fastest < 1.0:
        lengths = np.array([report.length for report in reports])
        fast = credit_fastest(advantages, lengths, successes, tasks, objective.fastest)
        return fast, (advantages != 0) & (fast == 0)
    return advantages, np.zeros(len(advantages), dtype=bool)


def trained_starts(report: EpisodeReport, data: DataConfig) -> list[int]:
    """Starts of the windows of a trajectory that are trained on, as ``data.windows`` says."""
    if data.windows == "all":
        return list(window_starts(report.length, short=data.short, tail=data.tail))
    return starts_seen(report, data)


def starts_seen(report: EpisodeReport, data: DataConfig) -> list[int]:
    """Starts of its windows that have a frame, because the policy, or the camera of a demonstration, looked there."""
    return seen_starts(report.length, report.frame_steps, data.short, data.tail)
