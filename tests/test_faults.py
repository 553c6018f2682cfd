"""Simulators that really hang, crash and leak: the actor is replaced, the episode played again, the run goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from faulty_worlds import ARMED

from actors.coordinator import Coordinator
from actors.dispatcher import Dispatcher, Episode
from actors.journal import Journal
from actors.pool import SamplePool
from actors.rollout import RolloutActor
from actors.weights import WeightStore, publish
from cluster.session import ResourcePlan, ray_session
from ript_ray.config import Config, ScalingConfig
from ript_ray.data.storage import load_episode, load_trajectory
from ript_ray.errors import UserError
from ript_ray.policies.checkpoints import to_publish
from ript_ray.policies.flow import FlowConfig, FlowPolicy
from ript_ray.policies.transform import Transform
from ript_ray.types import Context, Finished, Trajectory
from ript_ray.watchdog import Watchdog

pytestmark = pytest.mark.ray

HEALTHY = "gymnasium/ript_ray/PointReach-v0"


def point_policy() -> FlowPolicy:
    """An untrained policy for `PointReach`."""
    torch.manual_seed(0)
    transform = Transform(
        state_mean=(0.5,) * 2,
        state_std=(0.3,) * 2,
        action_mean=(0.0,) * 2,
        action_std=(0.5,) * 2,
        relative=(False,) * 2,
        image_size=32,
    )
    sizes = FlowConfig(action_dim=2, state_dim=2, cameras=1, channels=8, context=32, width=32, depth=1)
    return FlowPolicy(sizes, transform, torch.zeros(50, 2), torch.ones(50, 2))


def point_config(env_id: str, **scaling: Any) -> Config:
    """Settings for tests that are about mechanics."""
    return Config.model_validate(
        {
            "env": {"id": env_id, "image_size": 32, "max_steps": 20},
            "sampling": {"group_size": 2, "groups": 2, "max_groups": 4},
            "objective": {"name": "imitation"},
            "train": {"updates": 1, "batch_size": 4, "micro_batch": 4, "epochs": 1},
            "eval": {"episodes": 4},
            "scaling": {"actors": 1, "wait_timeout_s": 120, **scaling},
        }
    )


@pytest.fixture(scope="module")
def armed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Ray session whose actors see the file that arms a fault."""
    file = tmp_path_factory.mktemp("faults") / "armed"
    os.environ[ARMED] = str(file)
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    scaling = ScalingConfig(actors=1)
    with ray_session(scaling, ResourcePlan.of(scaling)):
        store = WeightStore.options(name="Weights").remote()
        publish(store, 0, *to_publish(point_policy()))
        yield file
    del os.environ[ARMED], os.environ["PYTHONPATH"]


def start_actor(config: Config, store: str = "Weights") -> Any:
    actor = RolloutActor.options(num_cpus=0.5).remote(0, config, point_policy().describe(), store)
    ray.get(actor.awake.options(max_task_retries=3).remote(), timeout=60)
    return actor


def play(dispatcher: Dispatcher, env_id: str) -> list[Trajectory]:
    contexts = [Context(env_id, state, 7 + state) for state in range(3)]
    for context in contexts:
        dispatcher.submit(Episode(0, context, guidance=1.0))
    played: dict[Context, Trajectory] = {}
    while (outcome := dispatcher.next()) is not None:
        assert outcome.report is not None, outcome.reason
        played[outcome.episode.context] = ray.get(outcome.reference)
    return [played[context] for context in contexts]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("Hang", "'step' took longer than 3 s"),
        ("Crash", "the process died in 'step'"),
        ("Leak", "MB is more than the 1200 MB allowed"),
        ("Exhaust", "the GPU failed it: CUDA out of memory"),
    ],
)
def test_a_faulty_simulator_costs_seconds_and_no_episode(armed: Path, fault: str, words: str) -> None:
    env_id = f"gymnasium/tests.faulty_worlds:{fault}-v0"
    # To fill so much memory takes a while by itself.
    config = point_config(env_id, hang_timeout_s=3 if fault == "Hang" else 20, actor_memory_gb=1.2)
    actor = start_actor(config)
    undisturbed = play(Dispatcher([actor], config.scaling), env_id)
    started = time.monotonic()
    armed.touch()
    dispatcher = Dispatcher([actor], config.scaling)
    disturbed = play(dispatcher, env_id)
    assert time.monotonic() - started < 30
    assert not armed.exists()
    assert any(words in error for error in dispatcher.errors), dispatcher.errors
    for before, after in zip(undisturbed, disturbed, strict=True):
        np.testing.assert_array_equal(before.actions, after.actions)
        np.testing.assert_array_equal(before.state_hashes, after.state_hashes)
        np.testing.assert_array_equal(before.frames, after.frames)
    ray.kill(actor)


def test_episodes_asked_for_before_the_journals_last_entry_are_played(armed: Path, tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.collected(0, "quota", 1.0)
    del journal
    config = point_config(HEALTHY)
    actor = start_actor(config)
    journal = Journal(tmp_path)
    dispatcher = Dispatcher([actor], config.scaling, journal)
    dispatcher.submit(Episode(0, Context(HEALTHY, 1, 5), guidance=1.0))
    assert journal.take("collected") is not None
    outcome = dispatcher.next()
    assert outcome is not None
    assert outcome.report is not None
    del journal, dispatcher
    dispatcher = Dispatcher([actor], config.scaling, Journal(tmp_path))
    dispatcher.submit(Episode(0, Context(HEALTHY, 2, 5), guidance=1.0))  # another start than in the journal
    with pytest.raises(UserError, match="does not fit its configuration"):
        dispatcher.next()
    ray.kill(actor)


def test_an_actor_that_is_to_blame_itself_costs_no_episode(armed: Path) -> None:
    config = point_config(HEALTHY)
    sick, well = start_actor(config), start_actor(config)
    ray.get(sick.__ray_call__.remote(lambda actor: setattr(actor, "_policy", None)))
    dispatcher = Dispatcher([sick, well], config.scaling)
    assert len(play(dispatcher, HEALTHY)) == 3
    assert 0 < len(dispatcher.errors) <= 3  # it had a try at each
    assert all("started without a weight store" in error for error in dispatcher.errors)
    for actor in (sick, well):
        ray.kill(actor)


@pytest.mark.slow
def test_a_task_that_always_fails_is_set_aside_and_the_rest_goes_on(armed: Path, tmp_path: Path) -> None:
    broken = "gymnasium/tests.faulty_worlds:Stillborn-v0"
    config = point_config(f"{broken},{HEALTHY}")  # the actor would begin with the one that crashes
    env = config.env.model_copy(update={"train_init_states": (0, 3)})
    sampling = config.sampling.model_copy(update={"groups": 3, "max_groups": 6})
    config = config.model_copy(update={"env": env, "sampling": sampling})
    actor, pool = start_actor(config), SamplePool.remote(config)
    store = ray.get_actor("Weights")
    coordinator = Coordinator.remote(config, [actor], pool, store, tmp_path)
    ray.get(coordinator.run.remote(), timeout=240)
    totals = ray.get(coordinator.totals.remote())
    assert {entry["env_id"] for entry in totals["set_aside"]} == {broken}
    assert "failed 3 times: the process died in 'construction'" in totals["set_aside"][0]["reason"]
    shard = ray.get(pool.next_shard.remote(0, 0, 1, 5.0))
    trajectories = [ray.get(reference) for reference in shard.trajectories.values()]
    assert len(trajectories) == 6
    assert {trajectory.context.env_id for trajectory in trajectories} == {HEALTHY}
    outcome = ray.get(coordinator.evaluate.remote("evaluating"), timeout=240)
    assert [result is None for result in outcome["results"]["held_out"]] == [True, False, True, False]
    assert len(list((tmp_path / "episodes").glob("*.safetensors"))) == totals["episodes"] + 2
    for handle in (actor, pool, coordinator):
        ray.kill(handle)


@pytest.mark.parametrize(
    ("changes", "ended_by", "accepted"),
    [
        ({"groups": 2}, "quota", 2),
        ({"groups": 4, "max_groups": 4, "enough": 0.5}, "quota", 2),
        ({"groups": 4, "max_groups": 4, "max_seconds": 0.001}, "seconds", None),
    ],
)
def test_rollouts_of_an_update_end_by_quota_or_budget(
    armed: Path, changes: dict[str, Any], ended_by: str, accepted: int | None
) -> None:
    config = point_config(HEALTHY)
    config = config.model_copy(update={"sampling": config.sampling.model_copy(update=changes)})
    actor, pool = start_actor(config), SamplePool.remote(config)
    coordinator = Coordinator.remote(config, [actor], pool, ray.get_actor("Weights"))
    ray.get(coordinator.run.remote(), timeout=120)
    totals = ray.get(coordinator.totals.remote())
    (row,) = (row for row in ray.get(coordinator.progress.remote(0))["rows"])
    assert totals["collections_ended_by"] == {ended_by: 1}
    assert accepted is None or row["rollout/groups_accepted"] == accepted
    assert row["rollout/groups_accepted"] + row["rollout/groups_open"] <= config.sampling.max_groups
    for handle in (actor, pool, coordinator):
        ray.kill(handle)


def test_episodes_that_are_too_old_to_be_trained_on_again_shrink_to_records(armed: Path, tmp_path: Path) -> None:
    config = point_config(HEALTHY)
    config = config.model_copy(update={"train": config.train.model_copy(update={"updates": 5, "max_staleness": 0})})
    store = WeightStore.options(name="Rising").remote()
    publish(store, 0, *to_publish(point_policy()))
    actor, pool = start_actor(config, "Rising"), SamplePool.remote(config)
    coordinator = Coordinator.remote(config, [actor], pool, store, tmp_path)
    ended = coordinator.run.remote()
    for step in range(config.train.updates):  # a learner that changes nothing
        assert ray.get(pool.next_shard.remote(step, 0, 1, 60.0)) is not None
        publish(store, step + 1, *to_publish(point_policy()))
    ray.get(ended, timeout=60)
    whole = {}
    for file in sorted((tmp_path / "episodes").glob("*.safetensors")):
        assert load_episode(file)[0].actions.shape[1] == 2
        with contextlib.suppress(UserError):
            whole[file.stem] = load_trajectory(file).policy_version
    assert len(list((tmp_path / "episodes").glob("*.safetensors"))) == 20  # four in each update
    # The last ones were played when version 4 was there: two more versions are spared.
    assert sorted(whole.values()) == [version for version in (2, 3, 4) for _ in range(4)]
    for handle in (actor, pool, coordinator, store):
        ray.kill(handle)


@pytest.mark.parametrize(("updates", "stop_at", "reached"), [(2, 0.51, True), (1, 0.52, False)])
def test_groups_that_say_nothing_are_counted_and_a_reached_goal_ends_the_run(
    armed: Path, updates: int, stop_at: float, reached: bool
) -> None:
    config = point_config("gymnasium/tests.faulty_worlds:Easy-v0")
    sampling = config.sampling.model_copy(update={"group_size": 4})
    train = config.train.model_copy(update={"updates": updates, "stop_at": stop_at})
    objective = config.objective.model_copy(update={"name": "cfg"})
    config = config.model_copy(update={"sampling": sampling, "train": train, "objective": objective})
    actor, pool = start_actor(config), SamplePool.remote(config)
    coordinator = Coordinator.remote(config, [actor], pool, ray.get_actor("Weights"))
    ray.get(coordinator.run.remote(), timeout=120)  # not for the second update: there are no weights for it
    (row,) = (row for row in ray.get(coordinator.progress.remote(0))["rows"])
    assert row["rollout/groups_all_succeeded"] == row["rollout/groups_rejected"] == config.sampling.max_groups
    assert row["rollout/success_rate"] == 1.0
    # Wilson's bound of four starts, of which each always succeeds, is 0.510: below the second goal.
    assert row["rollout/success_low"] == pytest.approx(4 / (4 + 1.959964**2))
    assert isinstance(ray.get(pool.next_shard.remote(0, 0, 1, 5.0)), Finished) == reached
    for handle in (actor, pool, coordinator):
        ray.kill(handle)


def test_when_nothing_is_left_the_run_ends_with_the_reason(armed: Path) -> None:
    config = point_config(HEALTHY)
    from ript_ray.algos.sampling import ContextSampler

    sampler = ContextSampler([(task, i, None) for task in "ab" for i in range(5)], config.sampling, seed=0)
    for state in (0, 1, 40):  # a held-out state counts too
        for _ in range(2):  # of a group, several rollouts may fail
            sampler.set_aside(Context("a", state, 0), "it hangs")
    assert [entry.init_state for entry in sampler.aside] == [0, 1, 40, None]
    assert {sampler.next_group().start[0] for _ in range(10)} == {"b"}
    sampler.set_aside(Context("b", 0, 0), "it crashes")
    sampler.set_aside(Context("b", 1, 0), "it crashes")
    with pytest.raises(RuntimeError, match="fail again and again; last: it crashes"):
        sampler.set_aside(Context("b", 2, 0), "it crashes")


def test_frames_for_training_are_made_once_and_only_for_what_is_drawn(armed: Path) -> None:
    from learner.loop import RenderedFrames
    from learner.steps import plan_steps

    config = point_config(HEALTHY)
    data = config.data.model_copy(update={"windows": "all", "distinct": 20, "tail": "pad"})
    config = config.model_copy(update={"data": data})
    actor, pool = start_actor(config), SamplePool.remote(config)
    coordinator = Coordinator.remote(config, [actor], pool, ray.get_actor("Weights"))
    ray.get(coordinator.run.remote(), timeout=120)
    shard = ray.get(pool.next_shard.remote(0, 0, 1, 5.0))
    assert len({tuple(window) for window in shard.windows.tolist()}) == 20
    keys = [key for batch in shard.rendered for key in batch.job.keys]
    seen = {i: set(ray.get(reference).frame_steps.tolist()) for i, reference in shard.trajectories.items()}
    expected = {(i, start) for i, start in map(tuple, shard.windows.tolist()) if start not in seen[i]}
    assert len(keys) == len(set(keys))
    assert set(keys) == expected
    rendered = RenderedFrames(shard.rendered, coordinator, timeout_s=30)
    trajectories = {i: ray.get(reference) for i, reference in shard.trajectories.items()}
    used = [
        batch
        for step in plan_steps(shard, trajectories, 4, rendered)
        for load in step.micro_batches
        for batch in [load()]
    ]
    assert sum(len(batch) for batch in used) == shard.order.size
    # This task's tickets are its frames, so the truth is at hand.
    for (i, step), frames in rendered.items():
        np.testing.assert_array_equal(frames[0], trajectories[i].tickets["view"][step])
    for handle in (actor, pool, coordinator):
        ray.kill(handle)


def test_frames_that_are_lost_with_an_actor_are_made_by_another(armed: Path) -> None:
    from learner.loop import RenderedFrames

    config = point_config(HEALTHY)
    data = config.data.model_copy(update={"windows": "all", "distinct": 12, "tail": "pad"})
    config = config.model_copy(update={"data": data})
    gone, other, pool = start_actor(config), start_actor(config), SamplePool.remote(config)
    coordinator = Coordinator.remote(config, [gone, other], pool, ray.get_actor("Weights"))
    ray.get(coordinator.run.remote(), timeout=120)
    shard = ray.get(pool.next_shard.remote(0, 0, 1, 5.0))
    made = RenderedFrames(shard.rendered, coordinator, timeout_s=60)
    expected = {key: made[key] for batch in shard.rendered for key in batch.job.keys}
    ray.kill(gone, no_restart=True)
    lost = [dataclasses.replace(batch, reference=[gone.render.remote(batch.job)]) for batch in shard.rendered]
    again = RenderedFrames(lost, coordinator, timeout_s=60)
    assert expected
    for key, frame in expected.items():
        np.testing.assert_array_equal(again[key], frame)
    for handle in (other, pool, coordinator):
        ray.kill(handle)


def test_the_watchdog_ends_a_process_that_outstays_its_limit(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from ript_ray.watchdog import Watchdog\n"
        "dog = Watchdog(Path(sys.argv[1]), 1e6)\n"
        "with dog.guard('outer', 60):\n"
        "    with dog.guard('inner', 60): pass\n"
        "with dog.guard('sleep', 0.5): time.sleep(30)\n"
    )
    words = tmp_path / "words"
    done = subprocess.run([sys.executable, "-c", program, str(words)], timeout=20, check=False)
    assert done.returncode == -9
    assert Watchdog(words, 1e6).earlier == "ended by its watchdog: 'sleep' took longer than 0.5 s"
    assert not words.exists()


def test_the_watchdog_leaves_nothing_behind_a_process_that_ends_well(tmp_path: Path) -> None:
    dog = Watchdog(tmp_path / "words", 1e6)
    with dog.guard("step", 60):
        pass
    time.sleep(0.6)
    dog.close()
    assert not (tmp_path / "words").exists()
