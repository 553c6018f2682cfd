"""The sample pool: trajectories stay in the object store; here are only references, advantages and indices.

Guarantees. A group is accepted or rejected exactly once, as a whole. `seal` fixes what a step
may train on, after the sweep that drops everything older than ``max_staleness`` versions: nothing stale gets past it.
No frame is asked for that no window of a sealed step needs, hence none of a rejected group, and none twice.
`next_shard` serves a sealed step, so every rank gets the same number of steps and a restarted learner the same answer.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import ray

from ript_ray.algos.advantages import AdvantageCounts, is_kept
from ript_ray.config import Config
from ript_ray.data.shards import drop_older_than, make_shard, number_demos, samples_of, without_frame
from ript_ray.types import EpisodeReport, Finished, FrameBatch, FrameJob, Sample, Shard

_FRAMES_PER_JOB = 16
"""Small, so that the first ones arrive soon and all actors share the work."""


@dataclass(slots=True)
class _Counters:
    accepted: int = 0
    rejected: int = 0
    windows: int = 0
    trained: int = 0
    stale_dropped: int = 0
    frames: int = 0
    """Rendered for training."""
    stored_bytes: int = 0
    advantages: AdvantageCounts = field(default_factory=lambda: AdvantageCounts(0, 0, 0))
    """Of the newest update."""
    staleness: Counter[int] = field(default_factory=Counter)
    """How many samples of each age were trained on."""


@ray.remote(num_cpus=0)
class SamplePool:
    """Groups of K → leave-one-out advantages → kept or rejected → an index of windows of 50 actions → shards.

    Args:
        config: the whole configuration.
        demos: reports and references of demonstrations, which are in every step (``data.demo_share``).
    """

    def __init__(self, config: Config, demos: Sequence[tuple[EpisodeReport, Any]] = ()) -> None:
        self._config = config
        self._demos = number_demos(demos)
        self._samples: dict[int, Sample] = {}
        self._sealed: dict[int, Shard] = {}
        self._sealing: tuple[Shard, list[tuple[int, int]]]
        """The step that is being sealed, and which of its windows have no frame of their trajectory's own."""
        self._rendered: dict[tuple[int, int], FrameBatch] = {}
        """Frames made for training, by trajectory and step; kept as long as the trajectory."""
        self._counted: set[tuple[int, int]] = set()
        """Frames for training that were counted, by trajectory and step."""
        self._end: int | None = None
        """The first step that there will not be, once that is known."""
        self._newly_sealed = asyncio.Condition()
        self._count = _Counters()

    def __repr__(self) -> str:
        return "SamplePool"

    async def add(self, group: int, reports: list[EpisodeReport], references: list[Any]) -> bool:
        """Add the rollouts of a group, accepted or rejected as `is_kept` says.

        Args:
            group: its number; identifiers of samples follow from it.
            reports: of its ``sampling.group_size`` rollouts.
            references: of their trajectories, in the same order; not needed of a group that is rejected.
        """
        rewards = np.array([float(report.success) for report in reports])
        if not is_kept(rewards, self._config.objective):
            self._count.rejected += 1
            return False
        self._count.accepted += 1
        self._samples |= samples_of(group, reports, references)
        self._count.stored_bytes += sum(report.nbytes for report in reports)
        return True

    async def seal(self, step: int) -> list[FrameJob]:
        """Fix the samples of ``step``, which makes weights version ``step + 1`` from version ``step``.

        Returns:
            The frames that its windows lack, in the order of their first use. The step is served once `rendering` has
            said who makes them, at once when there are none.
        """
        self._sweep(step)
        shard, self._count.advantages = make_shard(step, self._samples, self._config, self._demos)
        self._count.windows += len(shard.windows)
        self._count.trained += shard.order.size
        self._count.staleness.update(step - sample.report.policy_version for sample in self._samples.values())
        self._sealing = shard, without_frame(shard, self._samples)
        jobs = self._missing_frames(self._sealing[1])
        if not jobs:
            await self.rendering([], [])
        return jobs

    async def rendering(self, jobs: list[FrameJob], references: list[Any]) -> None:
        """The frames of the step that was sealed last are being made; each reference may not be there yet.

        Args:
            jobs: as `seal` returned them.
            references: of the frames of each job.
        """
        for job, reference in zip(jobs, references, strict=True):
            self._count_frames(job.keys)
            self._rendered |= dict.fromkeys(job.keys, FrameBatch(job, [reference]))
        whole, keys = self._sealing
        needed = dict.fromkeys(self._rendered[key] for key in keys if key in self._rendered)
        self._sealed[whole.step] = replace(whole, rendered=tuple(needed))
        async with self._newly_sealed:
            self._newly_sealed.notify_all()

    async def skip(self, step: int) -> None:
        """Nobody will train on this step, which was sealed last: an earlier session did, with frames made then."""
        self._sealed.pop(step, None)
        self._count_frames(self._sealing[1])

    async def finish(self, step: int) -> None:
        """There will be no step from ``step`` on."""
        async with self._newly_sealed:
            self._end = step
            self._newly_sealed.notify_all()

    async def next_shard(self, step: int, rank: int, world: int, timeout_s: float) -> Shard | Finished | None:
        """The share of ``rank`` in a step; waits until the step is sealed, None after ``timeout_s``."""

        def known() -> bool:
            return step in self._sealed or self._is_over(step)

        async with self._newly_sealed:
            try:
                await asyncio.wait_for(self._newly_sealed.wait_for(known), timeout_s)
            except TimeoutError:
                return None
        if self._is_over(step):
            return Finished()
        # A learner that asks for a step has done all before; rollouts, though, may be several steps ahead of it.
        for old in [s for s in self._sealed if s < step - 1]:
            del self._sealed[old]
        whole = self._sealed[step]
        columns = np.array_split(np.arange(whole.order.shape[1]), world)[rank]
        return replace(whole, order=whole.order[:, columns])

    async def stats(self) -> dict[str, Any]:
        """Counters for the summary and the metrics."""
        count, ages = self._count, self._count.staleness
        return {
            "groups": {"accepted": count.accepted, "rejected": count.rejected},
            "samples": {"windows": count.windows, "trained": count.trained},
            "staleness": {
                "mean": sum(age * n for age, n in ages.items()) / max(1, ages.total()),
                "max": max(ages, default=0),
                "histogram": {str(age): n for age, n in sorted(ages.items())},
                "dropped": count.stale_dropped,
            },
            "advantages": asdict(count.advantages),
            "stored_bytes": count.stored_bytes,
            "training_frames": count.frames,
        }

    def _count_frames(self, keys: Sequence[tuple[int, int]]) -> None:
        """Frames for training by trajectory and step, each of which counts once, whoever has made it."""
        for i, start in keys:
            report = self._samples[i].report
            # Else every frame came with its step.
            if (i, start) not in self._counted and report.frames < report.eager_frames:
                self._count.frames += report.cameras
        self._counted.update(keys)

    def _is_over(self, step: int) -> bool:
        return self._end is not None and step >= self._end

    def _sweep(self, step: int) -> None:
        self._count.stale_dropped += drop_older_than(self._samples, step - self._config.train.max_staleness)
        self._rendered = {key: batch for key, batch in self._rendered.items() if key[0] in self._samples}
        self._counted = {key for key in self._counted if key[0] in self._samples}

    def _missing_frames(self, keys: list[tuple[int, int]]) -> list[FrameJob]:
        missing = [key for key in keys if key not in self._rendered]
        jobs = []
        for at in range(0, len(missing), _FRAMES_PER_JOB):
            steps: dict[int, list[int]] = {}
            for i, start in missing[at : at + _FRAMES_PER_JOB]:
                steps.setdefault(i, []).append(start)
            tasks = dict.fromkeys(self._samples[i].report.context.env_id for i in steps)
            for env_id in tasks:
                parts = tuple(
                    (i, [self._samples[i].trajectory], tuple(starts))
                    for i, starts in steps.items()
                    if self._samples[i].report.context.env_id == env_id
                )
                jobs.append(FrameJob(env_id, parts))
        return jobs
