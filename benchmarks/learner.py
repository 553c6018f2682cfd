"""The learner through pool and TorchTrainer against a plain loop, and its memory against the size of the pool."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import ray
import torch

from actors.home import Home
from actors.pool import SamplePool
from cluster.session import ResourcePlan, ray_session, spawn
from learner.loop import KEEP_FREED_MEMORY, learner_group
from learner.steps import plan_steps
from learner.update import update
from ript_ray.config import Config
from ript_ray.data.windows import seen_starts, shuffled_batches
from ript_ray.policies.flow import FlowConfig, FlowPolicy
from ript_ray.policies.transform import Transform
from ript_ray.types import Context, EpisodeReport, Shard, Trajectory

STEPS = 110
LOOK_EVERY = 10
_REPEATS = 2
"""Updates that are timed in each of the two plain loops; twice as many through Ray."""
_SETTLE_S = 30.0
"""Ray's own processes are busy with starting for so long, which a job of hours does not notice."""


@ray.remote(num_cpus=0)
class Recorder:
    """Takes the learner's rows in the place of a coordinator."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._starts: list[int] = []

    def learners_started(self, step: int) -> None:
        self._starts.append(step)

    def diagnosis(self) -> str | None:
        return None

    def diagnose(self, reason: str) -> None:
        pass

    def best_updates(self) -> list[int]:
        return []

    def log(self, row: dict[str, Any]) -> None:
        self._rows.append(row | {"seconds": time.perf_counter()})

    def learning(self, step: int, done: int, expected: int) -> None:
        pass

    def rows(self) -> list[dict[str, Any]]:
        return self._rows

    def starts(self) -> list[int]:
        return self._starts


@ray.remote(num_cpus=0)
class _Sink:
    """Takes the learner's weights in the place of a weight store, and offers the same samples for the next update."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def newer_than(self, version: int) -> None:
        pass

    def publish(self, version: int, lent: list[Any], sha256: str) -> None:
        ray.get(self._pool.seal.remote(version), timeout=60)


def measure_speed(config: Config) -> dict[str, Any]:
    """Samples per second of the same update, on the same data, in a plain loop and through Ray.

    Medians of several updates, the plain ones half before and half after, since a machine's speed drifts. Those through
    Ray take from one row of metrics to the next, with all that lies between: the checkpoint, the weights, the samples.
    The first update of each process is left out: what a process does once (imports, warming up) is not counted. The
    plain loop has the learners' settings of memory allocation.

    A third loop is plain, but runs while Ray is up with nothing to do: ``ratio_beside_idle_ray`` is what the way
    through Ray costs, the rest of ``ratio`` is what Ray's own processes take of the machine.
    """
    config = config.model_copy(update={"train": config.train.model_copy(update={"min_steps": 1})})  # minutes suffice
    plain = _in_a_learners_process(config)
    with ray_session(config.scaling, ResourcePlan.of(config.scaling)):
        time.sleep(_SETTLE_S)
        beside = _in_a_learners_process(config)
        rows = _through_ray(config, make_trajectories(80, config.env.image_size), updates=1 + 2 * _REPEATS)
    plain += _in_a_learners_process(config)
    through_ray = [
        row["learner/steps"] * config.train.batch_size / (row["seconds"] - before["seconds"])
        for before, row in itertools.pairwise(rows)
    ]
    return {
        "benchmark": "learner",
        "plain_samples_per_s": plain,
        "plain_beside_idle_ray_samples_per_s": beside,
        "ray_samples_per_s": through_ray,
        "ratio": statistics.median(through_ray) / statistics.median(plain),
        "ratio_beside_idle_ray": statistics.median(through_ray) / statistics.median(beside),
    }


def measure_memory(config: Config) -> dict[str, Any]:
    """The learner's peak private memory with 8 and with 80 trajectories in the pool, for the same number of steps."""
    peaks = {}
    for count in (8, 80):
        settings = config.model_copy(
            update={"train": config.train.model_copy(update={"epochs": max(1, 8 * config.train.epochs // count)})}
        )
        with ray_session(config.scaling, ResourcePlan.of(config.scaling)):
            row = _through_ray(settings, make_trajectories(count, config.env.image_size), updates=2)[-1]
        peaks[count] = row["learner/peak_memory_mb"]
    return {"benchmark": "memory", "peak_mb": peaks, "growth": peaks[80] / peaks[8] - 1}


def make_trajectories(count: int, image_size: int) -> list[Trajectory]:
    """Random trajectories of the size of real ones; every other one a success."""
    rng = np.random.default_rng(0)
    looks = np.arange(0, STEPS, LOOK_EVERY, dtype=np.int32)
    return [
        Trajectory(
            context=Context("libero_object/0", i % 25, i),
            policy_version=0,
            success=i % 2 == 0,
            actions=rng.uniform(-1, 1, (STEPS, 7)).astype(np.float32),
            states=rng.normal(size=(STEPS, 8)).astype(np.float32),
            frames=rng.integers(0, 256, (len(looks), 2, image_size, image_size, 3), dtype=np.uint8),
            frame_steps=looks,
            tickets={"qpos": rng.normal(size=(STEPS, 60)), "site_alpha": np.zeros((STEPS, 60), dtype=np.float32)},
            scene={"body_pose": rng.normal(size=(60, 7))},
            state_hashes=np.arange(STEPS + 1, dtype=np.uint64),
            instruction="pick up the alphabet soup and place it in the basket",
        )
        for i in range(count)
    ]


def make_policy(image_size: int, sizes: FlowConfig | None = None) -> FlowPolicy:
    """A small policy with random weights."""
    torch.manual_seed(0)
    transform = Transform(
        state_mean=(0.0,) * 8,
        state_std=(1.0,) * 8,
        action_mean=(0.0,) * 7,
        action_std=(1.0,) * 7,
        relative=(False,) * 7,
        image_size=image_size,
    )
    return FlowPolicy(sizes or FlowConfig(), transform, torch.zeros(50, 7), torch.ones(50, 7))


def _in_a_learners_process(config: Config) -> list[float]:
    """`_plain_loop` in a process whose memory is allocated as that of learners."""
    with mock.patch.dict(os.environ, KEEP_FREED_MEMORY), multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_plain_loop, (config,))


def _plain_loop(config: Config) -> list[float]:
    """Samples per second of each update but the first, without Ray: everything in this process."""
    trajectories = make_trajectories(80, config.env.image_size)
    torch.set_num_threads(config.scaling.learner_threads)
    train = config.train
    index = [
        (i, int(start))
        for i, t in enumerate(trajectories)
        for start in seen_starts(len(t), t.frame_steps, tail=config.data.tail)
    ]
    order = shuffled_batches(len(index), train.epochs, train.batch_size, [config.run.seed, 0])
    advantages = {i: 1.0 if t.success else -1.0 for i, t in enumerate(trajectories)}
    shard = Shard(0, {}, advantages, advantages, np.array(index, dtype=np.int32), order, train.batch_size)
    steps = plan_steps(shard, dict(enumerate(trajectories)), train.micro_batch)
    policy = make_policy(config.env.image_size)
    rates = []
    for _ in range(1 + _REPEATS):
        started = time.perf_counter()
        update(policy, steps, train, config.objective, torch.Generator().manual_seed(0))
        rates.append(order.size / (time.perf_counter() - started))
    return rates[1:]


def _through_ray(config: Config, trajectories: list[Trajectory], updates: int) -> list[dict[str, Any]]:
    """The learner's metrics of each update, with the data in the object store and a learner group."""
    size = config.sampling.group_size
    config = config.model_copy(update={"train": config.train.model_copy(update={"updates": updates})})
    pool, recorder = spawn(SamplePool, config), spawn(Recorder)
    for group, first in enumerate(range(0, len(trajectories), size)):
        members = trajectories[first : first + size]
        reports = [EpisodeReport.of(trajectory) for trajectory in members]
        ray.get(pool.add.remote(group, reports, [ray.put(trajectory) for trajectory in members]))
    policy = make_policy(config.env.image_size)
    ray.get(pool.seal.remote(0))
    with tempfile.TemporaryDirectory() as folder:
        learner_group(config, policy, pool, spawn(_Sink, pool), recorder, Home.here(Path(folder), 60.0)).fit()
    return list(ray.get(recorder.rows.remote()))
