"""Fast environments against fresh stock ones, to the last bit."""

from __future__ import annotations

import multiprocessing
import shutil
from typing import Any

import numpy as np
import pytest

from benchmarks.stock import differences, play_ours, play_stock, random_actions
from ript_ray.envs import all_task_ids, make

pytestmark = pytest.mark.libero

STEPS = 200
SIZE = 64
SEED = 11
TASKS = [
    "libero_spatial/3",
    "libero_spatial/8",
    "libero_object/2",
    "libero_object/9",
    "libero_goal/4",  # a drawer
    "libero_goal/7",  # a stove
    "libero_10/2",  # a stove
    "libero_10/3",  # a drawer
    "libero_90/11",
    "libero_90/47",
    "libero_object_swap/0",  # a variant of LIBERO-PRO
]


def assert_equal(env_id: str, frames_at: set[int], init_state: int | None, at_once: bool) -> None:
    actions = random_actions(STEPS, seed=TASKS.index(env_id))
    env = make(env_id, image_size=SIZE)
    # Foreign episodes, which must leave no trace.
    play_ours(env, 3, 7, random_actions(25, seed=1), {5}, at_once=True)
    play_ours(env, 4, None, random_actions(5, seed=2), set(), at_once=True)
    ours = play_ours(env, SEED, init_state, actions, frames_at, at_once)
    env.close()
    stock = play_stock(env_id, SIZE, SEED, init_state, actions, frames_at)
    assert len(stock.low_dim[0]) > 15
    assert list(stock.frames) == sorted(frames_at)
    assert not list(differences(ours, stock))


@pytest.mark.parametrize("env_id", [*TASKS[::2], *(pytest.param(t, marks=pytest.mark.slow) for t in TASKS[1::2])])
def test_a_reused_environment_equals_a_fresh_stock_one(env_id: str) -> None:
    index = TASKS.index(env_id)
    assert_equal(env_id, {0, 1, 57, 130, STEPS}, init_state=None if index % 5 == 4 else 5, at_once=index % 4 == 0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("env_id", TASKS)
def test_every_frame_equals_the_stock_one(env_id: str) -> None:
    assert_equal(env_id, set(range(STEPS + 1)), init_state=9, at_once=False)


def _render_elsewhere(env_id: str, tickets: list[dict[str, np.ndarray]], queue: Any) -> None:
    env = make(env_id, image_size=SIZE)
    queue.put([{camera: env.render_ticket(ticket, camera) for camera in env.cameras} for ticket in tickets])


def test_another_process_renders_the_same_frames() -> None:
    env_id = "libero_goal/7"
    env = make(env_id, image_size=SIZE)
    observation, _ = env.reset(seed=1, options={"init_state": 3})
    seen = [observation]
    for action in random_actions(20, seed=5):
        observation, *_ = env.step(action)
        seen.append(observation)
    chosen = seen[::7]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_render_elsewhere, args=(env_id, [o.ticket for o in chosen], queue))
    child.start()
    rendered = queue.get(timeout=120)
    child.join(timeout=30)
    for there, here in zip(rendered, chosen, strict=True):
        for camera in env.cameras:
            np.testing.assert_array_equal(there[camera], here[camera])
    env.close()


def test_a_burning_stove_is_kept_in_the_ticket() -> None:
    """The one thing that is neither in qpos nor constant: frames of lit and unlit differ, and both come back."""
    env = make("libero_goal/7", image_size=SIZE)
    off, _ = env.reset(seed=1, options={"init_state": 0})
    knob = next(name for name in env.simulation.sim.model.joint_names if "flat_stove" in name)
    dark = off["agentview"]
    env.simulation.sim.data.set_joint_qpos(knob, 1.0)
    for _ in range(2):
        on, *_ = env.step(np.zeros(7))
        env._over = False  # a lit stove is this task's goal
    assert on.ticket["site_alpha"].sum() > off.ticket["site_alpha"].sum()
    lit = env.render_ticket(on.ticket, "agentview")
    unlit = env.render_ticket(on.ticket | {"site_alpha": off.ticket["site_alpha"]}, "agentview")
    assert not np.array_equal(lit, unlit)
    np.testing.assert_array_equal(env.render_ticket(off.ticket, "agentview"), dark)
    env.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("env_id", all_task_ids())
def test_every_task_is_made_reset_stepped_and_rendered(env_id: str, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("RIPT_RAY_CACHE", str(tmp_path))
    env = make(env_id, image_size=SIZE)
    observation, _ = env.reset(seed=0, options={"init_state": 49})
    for action in random_actions(3, seed=0):
        observation, *_ = env.step(action)
    for camera in env.cameras:
        assert observation[camera].std() > 5
    assert np.isfinite(observation["state"]).all()
    assert env.low_dim()
    env.close()
    shutil.rmtree(tmp_path)  # half a gigabyte for each of 130
