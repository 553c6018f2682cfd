"""Pool, weight store and learner group on a real Ray session."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from conftest import make_policy, make_trajectory
from ray.experimental import get_object_locations
from ray.util.state import list_actors
from safetensors.torch import load_file

from actors.dispatcher import Dispatcher, Episode
from actors.home import Home
from actors.pool import SamplePool
from actors.rollout import RolloutActor
from actors.weights import PolicyCopy, WeightStore, publish
from benchmarks.learner import Recorder
from learner.loop import learner_group
from ript_ray.config import Config, ScalingConfig, load_config
from ript_ray.policies.checkpoints import cpu_weights, load_policy, to_publish, weights_sha256
from ript_ray.policies.policy import Policy
from ript_ray.types import Context, EpisodeReport, Trajectory

ROOT = Path(__file__).parents[1]

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def add_group(pool: Any, group: int, outcomes: list[bool], version: int = 0, length: int = 70) -> bool:
    """Add one group of random trajectories and return the pool's verdict."""
    members = [make_trajectory(length, outcome, version, seed=group * 10 + k) for k, outcome in enumerate(outcomes)]
    reports = [EpisodeReport.of(trajectory) for trajectory in members]
    accepted: bool = ray.get(pool.add.remote(group, reports, [ray.put(trajectory) for trajectory in members]))
    return accepted


def test_uniform_groups_are_rejected_and_mixed_ones_carry_their_advantages(tiny_config: Config) -> None:
    pool = SamplePool.remote(tiny_config)
    assert not add_group(pool, 0, [True] * 4)
    assert not add_group(pool, 1, [False] * 4)
    assert add_group(pool, 3, [True, False, False, False])
    ray.get(pool.seal.remote(0))
    shard = ray.get(pool.next_shard.remote(0, 0, 1, 5.0))
    assert shard.advantages == pytest.approx({12: 1.0, 13: -1 / 3, 14: -1 / 3, 15: -1 / 3})
    # 70 steps have 21 windows; the policy looked at steps 0, 10, 20 of them.
    assert sorted(map(tuple, shard.windows.tolist())) == [(i, s) for i in range(12, 16) for s in (0, 10, 20)]
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
    assert ray.get(pool.stats.remote())["staleness"] == {
        "mean": 0.0,
        "max": 0,
        "histogram": {"0": 4},
        "dropped": 4,
    }


def test_a_frame_counts_once_whoever_made_it(tiny_config: Config) -> None:
    config = tiny_config.model_copy(update={"data": tiny_config.data.model_copy(update={"windows": "all"})})

    def frames(learnt: bool) -> int:
        pool = SamplePool.remote(config)
        add_group(pool, 0, [True, False, False, False])
        for step in (0, 1):
            jobs = ray.get(pool.seal.remote(step))
            if step == 0 and learnt:  # in an earlier session
                ray.get(pool.skip.remote(step))
            else:
                ray.get(pool.rendering.remote(jobs, [ray.put(None) for _ in jobs]))
        return int(ray.get(pool.stats.remote())["training_frames"])

    assert frames(learnt=True) == frames(learnt=False) > 0


def test_a_learner_that_is_several_steps_behind_gets_each_of_them(tiny_config: Config) -> None:
    pool = SamplePool.remote(tiny_config)
    add_group(pool, 0, [True, False, False, False])
    for step in range(4):
        ray.get(pool.seal.remote(step))
    for step in (0, 0, 1, 2, 3):  # the first one twice: the learner was started again
        assert ray.get(pool.next_shard.remote(step, 0, 1, 5.0)).step == step
    assert ray.get(pool.next_shard.remote(0, 0, 1, 0.2)) is None  # done with, and not kept for ever


def test_a_trajectory_is_stored_once() -> None:
    trajectory = make_trajectory(120)
    reference = ray.put(trajectory)
    stored = get_object_locations([reference])[reference]["object_size"]
    assert trajectory.nbytes < stored <= 1.02 * trajectory.nbytes


@pytest.fixture(scope="module")
def rollout_actor(ray_cluster: None) -> Any:
    """A real rollout actor: LIBERO, the shipped policy, its weight store."""
    config = load_config(ROOT / "configs" / "default.yaml", ["env.max_steps=40"])
    policy = load_policy(ROOT / "checkpoints" / "libero_object_0")
    store = WeightStore.options(name="Weights").remote()
    publish(store, 0, *to_publish(policy))
    actor = RolloutActor.options(num_cpus=0.5).remote(0, config, policy.describe(), "Weights")
    ray.get(actor.awake.remote(), timeout=120)
    return actor, store


def play_all(dispatcher: Dispatcher, seeds: list[int]) -> dict[int, Trajectory]:
    """Play one episode per seed and return the trajectories by seed."""
    for seed in seeds:
        dispatcher.submit(Episode(0, Context("libero_object/0", 1, seed), guidance=1.0))
    played = {}
    while (outcome := dispatcher.next()) is not None:
        assert outcome.report is not None
        seed = outcome.episode.context.seed
        played[seed] = ray.get(outcome.reference)
        assert outcome.report.length == len(played[seed])
    return played


@pytest.mark.libero
def test_an_actor_that_is_killed_costs_one_episode_which_is_played_again(rollout_actor: Any) -> None:
    actor, _ = rollout_actor
    undisturbed = play_all(Dispatcher([actor], ScalingConfig()), [5, 6])
    process = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))
    killer = threading.Timer(0.7, os.kill, [process, signal.SIGKILL])
    killer.start()
    dispatcher = Dispatcher([actor], ScalingConfig())
    played = play_all(dispatcher, [5, 6])
    killer.join()
    # One episode is concerned; what the simulator was at is known unless the policy was thinking.
    assert len({error.partition("): ")[0] for error in dispatcher.errors}) == 1
    assert len(dispatcher.errors) <= 2
    assert ray.get(actor.__ray_call__.remote(lambda _: os.getpid())) != process
    for seed in (5, 6):
        np.testing.assert_array_equal(played[seed].actions, undisturbed[seed].actions)
        np.testing.assert_array_equal(played[seed].state_hashes, undisturbed[seed].state_hashes)
        np.testing.assert_array_equal(played[seed].frames, undisturbed[seed].frames)


@pytest.mark.libero
def test_an_actor_that_hangs_is_ended_and_started_again(rollout_actor: Any) -> None:
    actor, _ = rollout_actor
    # As a simulator would hang: in C, and without letting other Python threads run.
    actor.__ray_call__.remote(lambda _: ctypes.PyDLL(None).sleep(600))
    dispatcher = Dispatcher([actor], ScalingConfig(episode_timeout_s=15))
    played = play_all(dispatcher, [7])
    assert len(played[7]) > 0
    assert any("no result after 15 s" in error for error in dispatcher.errors)


def test_a_surplus_is_dropped_from_the_queue() -> None:
    dispatcher = Dispatcher([], ScalingConfig())  # no actor takes anything from the queue
    for tag in (1, 1, 2):
        dispatcher.submit(Episode(tag, Context("libero_object/0", 0, 0), guidance=1.0))
    dispatcher.cancel({1})
    assert dispatcher.outstanding == 1


def test_the_store_serves_the_newest_weights_and_waits_with_a_limit() -> None:
    store = WeightStore.remote()
    assert ray.get(store.newer_than.remote(-1)) is None
    assert not ray.get(store.wait_for.remote(0, 0.1))
    waiting = store.wait_for.remote(2, 20.0)
    for version in range(5):
        publish(store, version, {"w": np.full(3, version)}, f"hash{version}")
    assert ray.get(waiting, timeout=20)
    version, (reference,) = ray.get(store.newer_than.remote(1))
    assert (version, ray.get(reference)["w"].tolist()) == (4, [4, 4, 4])
    assert ray.get(store.newer_than.remote(4)) is None
    assert ray.get(store.newest_version.remote()) == (4, "hash4")


@ray.remote(max_retries=0, num_cpus=0)
def publish_and_die(store: Any, weights: dict[str, np.ndarray]) -> None:
    """A learner whose process ends as soon as the store has its weights."""
    publish(store, 1, weights, "hash")
    os._exit(1)


def test_published_weights_outlive_the_learner() -> None:
    store, weights = WeightStore.remote(), {"w": np.arange(1_000_000.0)}
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(publish_and_die.remote(store, weights), timeout=60)
    _, (reference,) = ray.get(store.newer_than.remote(0))
    assert np.array_equal(ray.get(reference, timeout=60)["w"], weights["w"])


class Unputtable:
    """Arrives as something that cannot be put into the object store again."""

    def __reduce__(self) -> Any:
        return threading.Lock, ()


def test_weights_that_cannot_be_kept_are_not_announced() -> None:
    store = WeightStore.remote()
    publish(store, 0, {"w": np.zeros(3)}, "hash")
    with pytest.raises(TypeError):
        ray.get(store.publish.remote(1, [ray.put(Unputtable())], "other"), timeout=60)
    assert ray.get(store.newest_version.remote()) == (0, "hash")


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_a_copy_acts_as_the_policy_that_was_published_last(compiled: bool) -> None:
    policies = [make_policy(), make_policy()]
    with torch.no_grad():
        for parameter in policies[1].parameters():
            parameter.mul_(1.1)
    store = WeightStore.options(name=f"store-{compiled}").remote()
    copy = PolicyCopy(f"store-{compiled}", policies[0].describe(), torch.device("cpu"), 60.0, compiled)
    frames, states, noise = torch.zeros(1, 2, 32, 32, 3, dtype=torch.uint8), torch.ones(1, 8), torch.randn(1, 50, 7)
    acted: list[Policy] = []
    for version, policy in enumerate(policies):
        publish(store, version, *to_publish(policy))
        acting = copy.pull()
        acted.append(acting)
        assert hasattr(acting.velocity, "get_compiler_config") == compiled
        found, _ = acting.act(frames, states, ["go"], noise, guidance=2.0)
        assert copy.version == version
        torch.testing.assert_close(found, policy.act(frames, states, ["go"], noise, guidance=2.0)[0])
    assert (acted[0] is acted[1]) == compiled  # else each version would be compiled anew
    ray.kill(store)


def learn(
    config: Config, run_dir: Path, learners: int, meanwhile: Callable[[Any], None] | None = None
) -> dict[str, Any]:
    """Run the learner group on fixed samples and return the last weights it published.

    ``meanwhile`` runs in a thread, with the actor that takes the learner's rows.
    """
    scaling = config.scaling.model_copy(update={"learners": learners, "learner_cpus": 0.5})
    config = config.model_copy(update={"scaling": scaling})
    pool, store, log = SamplePool.remote(config), WeightStore.remote(), Recorder.remote()
    for step in range(config.train.updates):
        add_group(pool, step, [True, False, True, False], version=step)
        ray.get(pool.seal.remote(step))
    policy = make_policy()
    thread = threading.Thread(target=meanwhile or (lambda _: None), args=(log,), daemon=True)
    thread.start()
    learner_group(config, policy, pool, store, log, Home.here(run_dir, 60.0)).fit()
    thread.join(timeout=60)
    version, (reference,) = ray.get(store.newer_than.remote(-1))
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


@pytest.mark.slow
def test_a_learner_that_is_killed_starts_again_at_its_update(tiny_config: Config, tmp_path: Path) -> None:
    config = tiny_config.model_copy(update={"train": tiny_config.train.model_copy(update={"epochs": 100})})
    killed = []

    def kill_in_second_update(log: Any) -> None:
        workers: list[Any] = []
        while not workers or not ray.get(log.rows.remote()):
            time.sleep(0.05)
            workers = workers or list_actors(
                address=ray.get_runtime_context().gcs_address,
                filters=[("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")],
            )
        os.kill(workers[0]["pid"], signal.SIGKILL)
        killed.append(len(ray.get(log.rows.remote())))
        while len(starts := ray.get(log.starts.remote())) < 2:
            time.sleep(0.2)
        killed.extend(starts)

    disturbed = learn(config, tmp_path / "disturbed", 1, kill_in_second_update)
    assert killed == [1, 0, 1]  # rows at the kill, then the updates at which the group started
    undisturbed = learn(config, tmp_path / "undisturbed", 1)
    for name, tensor in undisturbed.items():
        torch.testing.assert_close(disturbed[name], tensor)


@pytest.mark.slow
def test_two_learners_agree_whether_or_not_they_divide_the_weights(tiny_config: Config, tmp_path: Path) -> None:
    shared, whole = (
        learn(
            tiny_config.model_copy(update={"train": tiny_config.train.model_copy(update={"shard": shard})}),
            tmp_path / str(shard),
            learners=2,
        )
        for shard in (True, False)
    )
    for name, tensor in whole.items():
        torch.testing.assert_close(shared[name], tensor, rtol=1e-3, atol=2e-5)


def test_samples_that_break_an_update_are_kept_and_its_weights_are_not(tiny_config: Config, tmp_path: Path) -> None:
    train = tiny_config.train.model_copy(update={"lr": 1e30, "warmup": 0.0, "epochs": 20})
    config = tiny_config.model_copy(update={"train": train})
    with pytest.raises(Exception, match=r"update 1, step \d+: loss .* the samples of this step are in"):
        learn(config, tmp_path, learners=0)
    (file,) = (tmp_path / "faults").iterdir()
    kept = load_file(file)
    assert kept["0.frames"].shape == (8, 2, 32, 32, 3)
    assert torch.isfinite(kept["0.actions"]).all()
    assert not (tmp_path / "checkpoints").exists()
