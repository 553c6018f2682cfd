"""Pool, weight store and learner group on a real Ray session."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import ray.train
import torch
from conftest import make_policy, make_trajectory
from ray.train.torch import TorchTrainer

from actors.pool import SamplePool
from actors.rollout import make_report
from actors.weights import WeightStore
from benchmarks.learner import Recorder
from learner.loop import train_loop
from ript_ray.config import Config
from ript_ray.policies.checkpoints import cpu_weights, describe, load_policy, weights_sha256
from ript_ray.types import Trajectory

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def add_group(pool: Any, group: int, outcomes: list[bool], version: int = 0, length: int = 70) -> list[int] | None:
    """Add one group of random trajectories and return the pool's verdict."""
    verdict = None
    for k, outcome in enumerate(outcomes):
        trajectory = make_trajectory(length, outcome, version, seed=group * 10 + k)
        report = make_report(trajectory, trajectory.seconds, 0.0)
        verdict = ray.get(pool.add.remote(group, report, [ray.put(trajectory)]))
    return verdict


def test_uniform_groups_are_rejected_and_mixed_ones_carry_their_advantages(tiny_config: Config) -> None:
    pool = SamplePool.remote(tiny_config)
    assert add_group(pool, 0, [True] * 4) == []
    assert add_group(pool, 1, [False] * 4) == []
    assert add_group(pool, 2, [True, False, False]) is None
    assert add_group(pool, 3, [True, False, False, False]) == [0, 1, 2, 3]
    ray.get(pool.seal.remote(0))
    shard = ray.get(pool.next_shard.remote(0, 0, 1, 5.0))
    assert shard.advantages == pytest.approx({0: 1.0, 1: -1 / 3, 2: -1 / 3, 3: -1 / 3})
    # 70 steps have 21 windows; the policy looked at steps 0, 10, 20 of them.
    assert sorted(map(tuple, shard.windows.tolist())) == [(i, s) for i in range(4) for s in (0, 10, 20)]
    assert ray.get(pool.stats.remote())["groups"] == {"accepted": 1, "rejected": 2}


def test_ranks_share_a_step_evenly_and_get_the_same_answer_again(tiny_config: Config) -> None:
    pool = SamplePool.remote(tiny_config)
    for group in range(3):
        add_group(pool, group, [True, True, False, False])
    assert ray.get(pool.next_shard.remote(0, 0, 2, 0.2)) is None
    ray.get(pool.seal.remote(0))
    shards = [ray.get(pool.next_shard.remote(0, rank, 2, 5.0)) for rank in (0, 1)]
    whole = ray.get(pool.next_shard.remote(0, 0, 1, 5.0))
    np.testing.assert_array_equal(np.hstack([shard.order for shard in shards]), whole.order)
    assert shards[0].order.shape == shards[1].order.shape == (4, 4)
    add_group(pool, 9, [True, False, False, False])
    np.testing.assert_array_equal(ray.get(pool.next_shard.remote(0, 1, 2, 5.0)).order, shards[1].order)


def test_nothing_stale_is_served_and_what_is_dropped_is_counted(tiny_config: Config) -> None:
    config = tiny_config.model_copy(update={"train": tiny_config.train.model_copy(update={"max_staleness": 1})})
    pool = SamplePool.remote(config)
    add_group(pool, 0, [True, False, False, False], version=0)
    add_group(pool, 1, [True, False, False, False], version=2)
    ray.get(pool.seal.remote(2))
    shard = ray.get(pool.next_shard.remote(2, 0, 1, 5.0))
    assert set(shard.trajectories) == {4, 5, 6, 7}
    assert ray.get(pool.stats.remote())["staleness"] == {"mean": 0.0, "max": 0, "dropped": 4}


def test_a_trajectory_is_stored_once() -> None:
    trajectory = make_trajectory(120)
    buffers: list[pickle.PickleBuffer] = []
    header = pickle.dumps(trajectory, protocol=5, buffer_callback=buffers.append)
    stored = len(header) + sum(buffer.raw().nbytes for buffer in buffers)
    assert stored <= 1.02 * trajectory.nbytes


def test_the_store_serves_the_newest_weights_and_waits_with_a_limit() -> None:
    store = WeightStore.remote()
    assert ray.get(store.newest.remote(-1)) is None
    assert not ray.get(store.wait_for.remote(0, 0.1))
    waiting = store.wait_for.remote(2, 20.0)
    for version in range(5):
        ray.get(store.publish.remote(version, {"w": np.full(3, version)}, f"hash{version}"))
    assert ray.get(waiting, timeout=20)
    version, (reference,) = ray.get(store.newest.remote(1))
    assert (version, ray.get(reference)["w"].tolist()) == (4, [4, 4, 4])
    assert ray.get(store.newest.remote(4)) is None
    assert ray.get(store.newest_version.remote()) == (4, "hash4")


def learn(config: Config, run_dir: Path, learners: int) -> dict[str, Any]:
    """Run the learner group on fixed samples and return the last weights it published."""
    pool, store, log = SamplePool.remote(config), WeightStore.remote(), Recorder.remote()
    for step in range(config.train.updates):
        add_group(pool, step, [True, False, True, False], version=step)
        ray.get(pool.seal.remote(step))
    policy = make_policy()
    TorchTrainer(
        train_loop,
        train_loop_config={
            "config": config,
            "description": describe(policy),
            "weights": [ray.put(cpu_weights(policy))],
            "pool": pool,
            "store": store,
            "coordinator": log,
            "run_dir": str(run_dir),
        },
        scaling_config=ray.train.ScalingConfig(num_workers=learners, resources_per_worker={"CPU": 0.5}),
        run_config=ray.train.RunConfig(name="learners", storage_path=str(run_dir)),
    ).fit()
    version, (reference,) = ray.get(store.newest.remote(-1))
    assert version == config.train.updates
    weights = {name: torch.tensor(array) for name, array in ray.get(reference).items()}
    saved = load_policy(run_dir / "checkpoints" / f"{version:04d}")
    assert weights_sha256(cpu_weights(saved)) == weights_sha256(weights) == ray.get(store.newest_version.remote())[1]
    assert len(ray.get(log.rows.remote())) == config.train.updates
    assert weights_sha256(weights) != weights_sha256(cpu_weights(policy))
    return weights


def test_the_learner_group_trains_and_publishes(tiny_config: Config, tmp_path: Path) -> None:
    in_worker = learn(tiny_config, tmp_path / "one", learners=1)
    in_driver = learn(tiny_config, tmp_path / "driver", learners=0)
    for name, tensor in in_worker.items():
        torch.testing.assert_close(in_driver[name], tensor)


def test_two_learners_agree(tiny_config: Config, tmp_path: Path) -> None:
    learn(tiny_config, tmp_path / "two", learners=2)


def test_trajectories_keep_their_values_through_the_object_store() -> None:
    trajectory = make_trajectory(60)
    returned: Trajectory = ray.get(ray.put(trajectory))
    np.testing.assert_array_equal(returned.frames, trajectory.frames)
    assert not returned.frames.flags.owndata
