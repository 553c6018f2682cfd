"""The environment against a fresh stock one: states, observations, success and the bytes of frames."""

from __future__ import annotations

import pickle

import gymnasium as gym
import numpy as np
import pytest

from ript_ray.envs import all_task_ids, canonical_name, find_task, make
from ript_ray.errors import UserError
from ript_ray.types import Context

pytestmark = pytest.mark.libero


def test_all_130_tasks_are_known_by_number_and_name() -> None:
    identifiers = all_task_ids()
    assert len(identifiers) == 130
    task = find_task("libero_goal/4")
    assert find_task(f"libero_goal/{task.name}") == task
    assert canonical_name(f"libero_goal/{task.name}") == "libero_goal/4"
    assert canonical_name("robosuite/Lift") == "robosuite/Lift"
    assert task.bddl_file.is_file()
    assert task.instruction == " ".join(task.name.split("_"))
    assert task.init_states().shape[0] == 50


@pytest.mark.parametrize(
    ("env_id", "part"),
    [
        ("libero_objects/0", "did you mean 'libero_object'"),
        ("libero_object/10", "tasks 0 to 9"),
        ("libero_object/pick_up_the_milk", "did you mean 'pick_up_the_milk_and_place_it_in_the_basket'"),
    ],
)
def test_an_unknown_task_is_an_error_with_the_nearest_name(env_id: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        make(env_id)


@pytest.fixture(scope="module")
def env():  # noqa: ANN201
    made = make("libero_object/0", image_size=48, max_steps=150)
    yield made
    made.close()


def test_frames_are_rendered_only_when_read_and_only_once(env) -> None:  # noqa: ANN001
    before = env.frames_rendered
    observation, _ = env.reset(seed=0, options={"init_state": 0})
    for _ in range(3):
        observation, *_ = env.step(np.zeros(7))
    assert env.frames_rendered == before
    frame = observation["agentview"]
    assert observation["agentview"] is frame
    assert env.frames_rendered == before + 1
    copy = pickle.loads(pickle.dumps(observation))
    np.testing.assert_array_equal(copy["wrist"], observation["wrist"])
    assert env.observation_space.contains(copy)
    np.testing.assert_array_equal(env.render(), frame[:, ::-1])
    assert observation.get("agentview") is frame
    assert observation.get("absent", 1) == 1
    assert {key for key, _ in observation.items()} == set(observation)


def test_episodes_repeat_and_depend_on_seed_and_state(env) -> None:  # noqa: ANN001
    state = [
        env.reset(seed=s, options=o)[0].ticket["qpos"] for s, o in ((1, {}), (1, {}), (2, {}), (1, {"init_state": 3}))
    ]
    np.testing.assert_array_equal(state[0], state[1])
    assert not np.array_equal(state[0], state[2])
    assert not np.array_equal(state[0], state[3])


def test_resetting_leaves_the_global_generator_alone(env) -> None:  # noqa: ANN001
    np.random.seed(5)
    expected = np.random.RandomState(5).rand()
    env.reset(seed=0)
    assert np.random.rand() == expected


def test_bad_input_is_refused(env) -> None:  # noqa: ANN001
    with pytest.raises(UserError, match="states 0 to 49"):
        env.reset(seed=0, options={"init_state": 50})
    with pytest.raises(UserError, match="'initial' is unknown"):
        env.reset(seed=0, options={"initial": 1})
    env.reset(seed=0)
    with pytest.raises(ValueError, match="7 finite numbers"):
        env.step(np.full(7, np.nan))


def test_the_expert_succeeds_and_frames_can_be_completed_later(env) -> None:  # noqa: ANN001
    from ript_ray.config import DemosConfig
    from ript_ray.data.demonstrator import demonstrate
    from ript_ray.rollout import film, render_steps
    from ript_ray.types import Context

    demo = demonstrate(env, Context("libero_object/0", 2, 2), DemosConfig(noise=0.05, frame_every=40))
    assert demo.success
    assert env.task.max_steps > len(demo) > 60
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.zeros(7))
    assert demo.labels is not None
    assert not np.array_equal(demo.labels, demo.actions)
    # What is rendered later is what was seen.
    np.testing.assert_array_equal(render_steps(env, demo, demo.frame_steps.tolist()), demo.frames)
    assert film(env, demo, every=40, size=64).shape[1:] == (64, 64, 3)


def test_a_policy_plays_the_same_episode_twice_and_looks_once_per_chunk() -> None:
    from conftest import make_policy

    from ript_ray.policies.acting import Acting
    from ript_ray.rollout import play
    from ript_ray.types import Context

    env = make("libero_object/0", image_size=32, max_steps=25)
    policy = make_policy(image_size=32)
    runs = [
        play(env, policy, Context("libero_object/0", 4, 9), Acting(10, 2, guidance=w), policy_version=3)
        for w in (1.0, 1.0, 2.0)
    ]
    assert len(runs[0]) == 25
    assert runs[0].frame_steps.tolist() == [0, 10, 20]
    assert (runs[0].policy_version, runs[0].reward) == (3, 0.0)
    np.testing.assert_array_equal(runs[0].actions, runs[1].actions)
    np.testing.assert_array_equal(runs[0].frames, runs[1].frames)
    assert not np.array_equal(runs[0].actions, runs[2].actions)
    assert np.abs(runs[0].actions).max() <= 1.0
    env.close()


def test_the_expert_says_what_it_cannot_do() -> None:
    from ript_ray.data.expert import PickPlaceExpert

    env = make("libero_goal/0", image_size=32)
    env.reset(seed=0, options={"init_state": 0})
    with pytest.raises(UserError, match="try libero_object/0"):
        PickPlaceExpert(env, np.zeros(2))
    env.close()


def test_a_disturbed_arm_varies_as_in_the_official_initial_states(env) -> None:  # noqa: ANN001
    data, model = env.simulation.sim.data._data, env.simulation.sim.model._model
    arm = [model.jnt_qposadr[j] for j in range(model.njnt) if model.joint(j).name.startswith("robot0_joint")]
    official = find_task(env.id).init_states()[:, 1:][:, arm]

    def started(seed: int, disturb: bool) -> np.ndarray:
        env.begin_episode(seed, None, disturb)
        return data.qpos.copy()

    plain = [started(seed, disturb=False) for seed in range(40)]
    disturbed = [started(seed, disturb=True) for seed in range(40)]
    assert np.ptp(np.array(plain)[:, arm], axis=0).max() == 0  # why training needs it
    deviations = np.array(disturbed)[:, arm].std(0)
    assert deviations.mean() == pytest.approx(official.std(0).mean(), rel=0.25)
    np.testing.assert_allclose(np.array(disturbed)[:, arm].mean(0), official.mean(0), atol=0.02)
    others = np.delete(np.array(disturbed), arm, axis=1)
    np.testing.assert_array_equal(others, np.delete(np.array(plain), arm, axis=1))
    np.testing.assert_array_equal(started(7, disturb=True), disturbed[7])
    first, _ = env.reset(seed=7, options={"disturb_arm": True})
    again, _ = env.reset(**Context(env.id, None, seed=99, placement=7).reset_arguments())
    np.testing.assert_array_equal(first["state"], again["state"])
    with pytest.raises(UserError, match="valid: init_state, disturb_arm"):
        env.reset(options={"init_sate": 3})
