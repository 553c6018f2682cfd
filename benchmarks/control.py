"""The control plane at a size that this machine cannot play: simulated rollout actors, everything else real.

Coordinator, dispatcher, journal, pool and weight store are those of a training job in ``async`` mode. Only the episodes
are waits of random, long-tailed length, of which one process hosts thousands, and the learner is a wait, too.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.coordinator import Coordinator
from actors.home import Home
from actors.pool import SamplePool
from actors.weights import WeightStore, publish
from cluster.session import ResourcePlan, ray_session, spawn
from ript_ray.config import Config
from ript_ray.errors import UserError
from ript_ray.types import Context, EpisodeReport

_HOSTS = 2
_EPISODE_S = 10.0
"""Mean length of an episode."""
_SPREAD = 0.6
"""Deviation of the logarithm of its length: one in twenty takes more than two and a half times the median."""
_TRAJECTORY_BYTES = 250_000
_LEARNER_SHARE = 0.5
"""What the learner takes for an update, of the time that its rollouts take."""


@ray.remote(num_cpus=0)
class _Host:
    """Plays for many seats."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._store = ray.get_actor("WeightStore")
        self._versions: Counter[int] = Counter()
        self._busy_s = 0.0
        self._playing: dict[int, tuple[float, float]] = {}
        """Beginning and length of the episode at each seat."""

    async def collect(self, seat: int, context: Context) -> tuple[EpisodeReport, np.ndarray]:
        """What `RolloutActor.collect` does, without the play."""
        found = await self._store.newer_than.remote(self._versions[seat])
        if found is not None:
            self._versions[seat] = found[0]
        rng = np.random.default_rng(context.seed)
        length = float(rng.lognormal(np.log(_EPISODE_S) - _SPREAD**2 / 2, _SPREAD))
        self._playing[seat] = time.monotonic(), length
        await asyncio.sleep(length)
        del self._playing[seat]
        self._busy_s += length
        steps = np.arange(0, 160, self._config.policy.execute, dtype=np.int32)
        report = EpisodeReport(
            context=context,
            policy_version=self._versions[seat],
            success=bool(rng.random() < 0.5),
            length=160,
            frame_steps=steps,
            nbytes=_TRAJECTORY_BYTES,
            seconds={"physics": length},
            frames=2 * len(steps),
            cameras=2,
            weights_wait_s=0.0,
        )
        return report, np.zeros(_TRAJECTORY_BYTES, dtype=np.uint8)

    async def busy(self) -> float:
        """Seconds in episodes so far, of all seats; of those that are not over, too."""
        now = time.monotonic()
        return self._busy_s + sum(min(now - began, length) for began, length in self._playing.values())


@dataclass(frozen=True)
class _Seat:
    """Looks like the handle of a rollout actor."""

    host: Any
    number: int

    @property
    def collect(self) -> _Seat:
        return self

    def options(self, **options: Any) -> _Seat:
        return self

    def remote(self, context: Context, guidance: float, exploring: bool, file: Path | None, home: Home | None) -> Any:
        """Play a context."""
        return self.host.collect.options(num_returns=2).remote(self.number, context)


@dataclass(frozen=True)
class _Mark:
    """What was when an update had its samples."""

    time: float
    busy: float
    """Seconds that all seats spent in episodes."""
    episodes: int
    cpu: dict[str, float]
    """Seconds of processor time, by process."""


def _cpu_seconds(actors: dict[str, Any]) -> dict[str, float]:
    asked = [actor.__ray_call__.remote(lambda _: time.process_time()) for actor in actors.values()]
    return dict(zip(actors, ray.get(asked, timeout=60), strict=True))


def measure(config: Config) -> dict[str, Any]:
    """Share of their time that simulated actors spend in episodes, and what goes through the control plane."""
    seats = config.bench.simulated
    if config.train.updates < 2:
        raise UserError("train.updates=1: expected two or more, since what is measured lies between them")
    size = config.sampling.group_size
    groups = max(1, seats // size)
    config = config.model_copy(
        update={
            "sampling": config.sampling.model_copy(update={"groups": groups, "max_groups": 4 * groups}),
            "train": config.train.model_copy(update={"mode": "async", "lead": 2}),
        }
    )
    with tempfile.TemporaryDirectory() as folder, ray_session(config.scaling, ResourcePlan.of(config.scaling)):
        store = spawn(WeightStore, name="WeightStore")
        publish(store, 0, {}, "")
        hosts = [_Host.options(max_concurrency=seats).remote(config) for _ in range(_HOSTS)]  # type: ignore[attr-defined]
        pool = spawn(SamplePool, config, name="SamplePool")
        actors = [_Seat(hosts[i % _HOSTS], i) for i in range(seats)]
        coordinator = spawn(Coordinator, config, actors, pool, store, Path(folder), [], name="Coordinator")
        control = {"coordinator": coordinator, "pool": pool, "weight store": store}
        limit = config.scaling.wait_timeout_s
        collecting = coordinator.run.remote()
        idle = 0.0
        marks: list[_Mark] = []
        for step in range(config.train.updates):
            waiting = time.perf_counter()
            ray.get(pool.next_shard.remote(step, 0, 1, limit), timeout=limit + 30)
            idle += time.perf_counter() - waiting if marks else 0.0
            busy = sum(ray.get([host.busy.remote() for host in hosts], timeout=60))
            episodes = ray.get(coordinator.totals.remote(), timeout=60)["episodes"]
            marks.append(_Mark(time.perf_counter(), busy, episodes, _cpu_seconds(control)))
            time.sleep(_LEARNER_SHARE * _EPISODE_S)
            publish(store, step + 1, {}, "")
        ray.get(collecting, timeout=limit)
        totals = ray.get(coordinator.totals.remote(), timeout=60)
        counts = ray.get(pool.stats.remote(), timeout=60)
    # From the first shard to the last: before, all begin at once, and at the end there is nothing left to open.
    first, last = marks[0], marks[-1]
    episodes, seconds = last.episodes - first.episodes, last.time - first.time
    return {
        "benchmark": "control",
        "actors": seats,
        "episode_seconds": {"mean": _EPISODE_S, "log_deviation": _SPREAD},
        "episodes": totals["episodes"],
        "episodes_per_second": episodes / seconds,
        "in_episodes": (last.busy - first.busy) / (seats * seconds),
        "measured": {
            "seconds": seconds,
            "episodes": episodes,
            "cpu_seconds": {name: last.cpu[name] - first.cpu[name] for name in control},
        },
        "bytes_per_episode": _TRAJECTORY_BYTES,
        "learner_idle": idle / seconds,
        "staleness": counts["staleness"],
    }
