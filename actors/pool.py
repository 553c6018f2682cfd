"""The sample pool: trajectories stay in the object store; here are only references, advantages and indices.

Guarantees. A group is accepted or rejected exactly once, when its last rollout has arrived. `seal` fixes what a step
may train on, after the sweep that drops everything older than ``max_staleness`` versions: nothing stale gets past it.
`next_shard` serves a sealed step, so every rank gets the same number of steps and a restarted learner the same answer.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray

from actors.rollout import EpisodeReport
from ript_ray.algos.advantages import is_mixed, leave_one_out
from ript_ray.config import Config
from ript_ray.data.windows import shuffled_batches, window_starts
from ript_ray.types import Shard


@dataclass(slots=True)
class _Sample:
    report: EpisodeReport
    reference: Any
    advantage: float


@dataclass(slots=True)
class _Counters:
    accepted: int = 0
    rejected: int = 0
    windows: int = 0
    trained: int = 0
    stale_dropped: int = 0
    stored_bytes: int = 0
    staleness: list[int] = field(default_factory=list)


@ray.remote(num_cpus=0)
class SamplePool:
    """Groups of K → leave-one-out advantages → mixed groups kept → an index of SO100 windows → shards."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._pending: dict[int, list[tuple[EpisodeReport, Any]]] = {}
        self._samples: dict[int, _Sample] = {}
        self._next_id = 0
        self._sealed: dict[int, Shard] = {}
        self._newly_sealed = asyncio.Condition()
        self._count = _Counters()

    def __repr__(self) -> str:
        return "SamplePool"

    async def add(self, group: int, report: EpisodeReport, reference: list[Any]) -> list[int] | None:
        """Add one rollout of a group; ``reference`` is a list of one, so that the trajectory is not fetched here.

        Returns:
            None while the group is incomplete; then the identifiers of its samples, empty when it was rejected.
        """
        members = self._pending.setdefault(group, [])
        members.append((report, reference[0]))
        if len(members) < self._config.sampling.group_size:
            return None
        del self._pending[group]
        rewards = np.array([float(member.success) for member, _ in members])
        if self._config.train.objective == "cfg" and not is_mixed(rewards):
            self._count.rejected += 1
            return []
        self._count.accepted += 1
        identifiers = []
        for (member, ref), advantage in zip(members, leave_one_out(rewards), strict=True):
            self._samples[self._next_id] = _Sample(member, ref, float(advantage))
            self._count.stored_bytes += member.nbytes
            identifiers.append(self._next_id)
            self._next_id += 1
        return identifiers

    async def references(self, identifiers: list[int]) -> dict[int, list[Any]]:
        """References of samples, each in a list of one."""
        return {i: [self._samples[i].reference] for i in identifiers}

    async def replace(self, identifier: int, report: EpisodeReport, reference: list[Any]) -> None:
        """Put a trajectory with more frames in the place of the one it was made from."""
        sample = self._samples[identifier]
        self._count.stored_bytes += report.nbytes - sample.report.nbytes
        self._samples[identifier] = _Sample(report, reference[0], sample.advantage)

    async def discard(self, group: int) -> None:
        """Forget an incomplete group whose remaining rollouts were cancelled."""
        self._pending.pop(group, None)

    async def seal(self, step: int) -> None:
        """Fix the samples of ``step``, which makes weights version ``step + 1`` from version ``step``."""
        self._sweep(step)
        index = [(i, start) for i, sample in self._samples.items() for start in self._starts(sample.report)]
        windows = np.array(index, dtype=np.int32).reshape(-1, 2)
        train = self._config.train
        order = shuffled_batches(len(windows), train.epochs, train.batch_size, [self._config.run.seed, step])
        self._count.windows += len(windows)
        self._count.trained += order.size
        self._count.staleness += [step - sample.report.policy_version for sample in self._samples.values()]
        self._sealed[step] = Shard(
            step=step,
            trajectories={i: sample.reference for i, sample in self._samples.items()},
            advantages={i: sample.advantage for i, sample in self._samples.items()},
            windows=windows,
            order=order,
            batch_size=train.batch_size,
        )
        for old in [s for s in self._sealed if s < step - 1]:
            del self._sealed[old]
        async with self._newly_sealed:
            self._newly_sealed.notify_all()

    async def next_shard(self, step: int, rank: int, world: int, timeout_s: float) -> Shard | None:
        """The share of ``rank`` in a step; waits until the step is sealed, None after ``timeout_s``."""
        async with self._newly_sealed:
            try:
                await asyncio.wait_for(self._newly_sealed.wait_for(lambda: step in self._sealed), timeout_s)
            except TimeoutError:
                return None
        whole = self._sealed[step]
        columns = np.array_split(np.arange(whole.order.shape[1]), world)[rank]
        return Shard(
            step, whole.trajectories, whole.advantages, whole.windows, whole.order[:, columns], whole.batch_size
        )

    async def stats(self) -> dict[str, Any]:
        """Counters for the summary and the metrics."""
        count = self._count
        return {
            "groups": {"accepted": count.accepted, "rejected": count.rejected},
            "samples": {"windows": count.windows, "trained": count.trained},
            "staleness": {
                "mean": float(np.mean(count.staleness)) if count.staleness else 0.0,
                "max": max(count.staleness, default=0),
                "dropped": count.stale_dropped,
            },
            "stored_bytes": count.stored_bytes,
        }

    def _sweep(self, step: int) -> None:
        limit = step - self._config.train.max_staleness
        for i in [i for i, sample in self._samples.items() if sample.report.policy_version < limit]:
            del self._samples[i]
            self._count.stale_dropped += 1

    def _starts(self, report: EpisodeReport) -> list[int]:
        data = self._config.data
        starts = window_starts(report.length, short=data.short, tail=data.tail)
        # With data.windows=all the frames were completed before, so every start has one.
        return [int(step) for step in report.frame_steps if int(step) in starts]
