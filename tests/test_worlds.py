"""Worlds besides LIBERO: robosuite's own tasks against the stock ones, and a gymnasium environment from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from test_launch import launch

from benchmarks.stock import random_actions
from launch import main
from ript_ray.data.storage import load_episode, save_episode
from ript_ray.envs import make
from ript_ray.envs.gymnasium_world import GymnasiumWorld
from ript_ray.envs.tasks import ROBOSUITE_TASKS
from ript_ray.errors import UserError
from ript_ray.policies.acting import Acting
from ript_ray.replay import replay_episode

IMAGES = {"agentview": "agentview_image", "wrist": "robot0_eye_in_hand_image"}
STEPS = 60


def stock_robosuite(name: str) -> Any:
    """As the docstring of `RobosuiteEnv` describes it."""
    import robosuite

    np.random.seed(0)
    return robosuite.make(
        name,
        robots="Panda",
        controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
        has_renderer=False,
        has_offscreen_renderer=True,
        use_camera_obs=True,
        camera_names=["agentview", "robot0_eye_in_hand"],
        camera_heights=48,
        camera_widths=48,
        control_freq=20,
        horizon=10**9,
        hard_reset=False,
    )


@pytest.mark.libero
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("Lift", "Door") else pytest.mark.slow) for n in ROBOSUITE_TASKS]
)
def test_a_robosuite_task_equals_the_stock_one_bit_for_bit(name: str) -> None:
    env: Any = make(f"robosuite/{name}", image_size=48, max_steps=STEPS)
    env.reset(seed=1)
    for action in random_actions(5, seed=1):
        env.step(action)
    actions = random_actions(STEPS, seed=2)
    observation, _ = env.reset(seed=9, options={"init_state": 4})
    seen, low_dim, states = [], [], []
    for action in actions:
        observation, *_ = env.step(action)
        env._over = False
        seen.append(observation)
        low_dim.append(env.low_dim())
        states.append(np.concatenate([env.simulation.sim.data.qpos, env.simulation.sim.data.qvel]))
    frames = {step: {camera: seen[step][camera] for camera in IMAGES} for step in (0, 3)}
    env.close()

    stock = stock_robosuite(name)
    np.random.seed(4)
    stock.robots[0].gripper.current_action = np.zeros(1)
    stock.reset()
    for step, action in enumerate(actions):
        if step == 4:  # no more frames are compared; what is rendered changes nothing else
            for image in IMAGES.values():
                stock.modify_observable(image, "enabled", False)
        returned, *_ = stock.step(action)
        np.testing.assert_array_equal(states[step], np.concatenate([stock.sim.data.qpos, stock.sim.data.qvel]))
        for key, value in returned.items():
            if key not in IMAGES.values():
                np.testing.assert_array_equal(low_dim[step][key], value, err_msg=key)
        if step in frames:
            for camera, image in IMAGES.items():
                np.testing.assert_array_equal(frames[step][camera], returned[image][::-1, ::-1])
    stock.sim._render_context_offscreen.gl_ctx.make_current()
    stock.close()


@pytest.mark.ray
@pytest.mark.slow
def test_a_gymnasium_environment_goes_through_the_whole_loop(tmp_path: Path) -> None:
    """A task that is not robosuite's: demonstrations, imitation, reinforcement learning, replay."""
    common = (
        "env.id=gymnasium/ript_ray/PointReach-v0",
        "env.image_size=32",
        "env.max_steps=40",
        f"data.demos={tmp_path}/demos.safetensors",
        "data.tail=pad",
    )
    demos = ("demos.episodes=20", "demos.noise=0.3", "demos.frame_every=2")
    done = launch("demos", *demos, *common, f"run.dir={tmp_path}/demos")
    assert done.returncode == 0, done.stderr
    done = launch("sft", "sft.steps=40", f"sft.output={tmp_path}/policy", *common, f"run.dir={tmp_path}/sft")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    done = launch(
        "train",
        *common,
        f"run.dir={run}",
        f"policy.checkpoint={tmp_path}/policy",
        "data.windows=all",
        "objective.name=imitation",
        "sampling.groups=2",
        "sampling.max_groups=2",
        "sampling.group_size=2",
        "train.updates=1",
        "train.epochs=1",
        "train.min_steps=1",
        "eval.episodes=4",
        "eval.random_placement=0",
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert summary["episodes"] == 12
    assert summary["frames"]["share"] == 1.0  # this world cannot draw a frame later, so none was made twice
    assert summary["set_aside"] == []
    episodes = sorted((run / "episodes").glob("*.safetensors"))
    assert len(episodes) == 12
    done = launch("replay", str(episodes[5]), "--json", str(tmp_path / "replay.json"))
    assert done.returncode == 0, done.stderr
    assert "identical at every step" in done.stdout
    assert json.loads((tmp_path / "replay.json").read_text())["identical"]
    assert episodes[5].with_suffix(".mp4").exists()


OWN = """
import gymnasium as gym
import numpy as np
from ript_ray.envs.world import LazyObservation, World, check_action, check_options

class Line(World):
    instruction, cameras, state_dim, action_dim, num_init_states = "go right", ("view",), 1, 1, 5

    def __init__(self, name, image_size, max_steps):
        self.id, self.goal = f"own_worlds:Line/{name}", float(name)
        self.max_steps, self.size = max_steps or 20, image_size
        self.action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.observation_space = gym.spaces.Dict()

    def reset(self, *, seed=None, options=None):
        start = check_options(options, self).init_state
        self.elapsed_steps, self.at = 0, 0.1 * (start or 0)
        return self.observe(), {}

    def step(self, action):
        self.at += float(check_action(action, 1)[0])
        self.elapsed_steps += 1
        success = self.at >= self.goal
        return self.observe(), float(success), success, self.elapsed_steps >= self.max_steps, {"success": success}

    def observe(self):
        ticket = {"at": np.array([self.at])}
        rest = {"state": np.array([self.at], np.float32), "instruction": self.instruction}
        return LazyObservation(rest, self.cameras, ticket, self.render_ticket)

    def scene(self):
        return {}

    def render_ticket(self, ticket, camera, size=None):
        size = size or self.size
        return np.full((size, size, 3), int(10 * ticket["at"][0]) % 256, np.uint8)

    def state_hash(self):
        return int(1000 * self.at)
"""


def test_a_world_of_ones_own_is_named_by_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ript_ray.rollout import Recorder
    from ript_ray.types import Context

    (tmp_path / "own_worlds.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    world = make("own_worlds:Line/3", image_size=16, max_steps=8)
    context = Context(world.id, init_state=2, seed=0)
    observation, _ = world.reset(**context.reset_arguments())
    recorder, success = Recorder(world, context), False
    recorder.look(observation)
    while not success:
        recorder.add(observation, np.ones(1, np.float32))
        observation, _, success, *_ = world.step(np.ones(1))
    played = recorder.finish(success, policy_version=0)
    assert (len(played), played.success, played.frames.shape) == (3, True, (1, 1, 16, 16, 3))
    assert played.frames[0, 0, 0, 0, 0] == 2
    with pytest.raises(UserError, match=r"env.id='own_worlds:Lime': .*has no attribute 'Lime'"):
        make("own_worlds:Lime/3")


def test_a_replay_says_where_it_first_goes_another_way(tmp_path: Path) -> None:
    from ript_ray.rollout import Recorder
    from ript_ray.types import Context, EpisodeRecord

    env = make("gymnasium/ript_ray/PointReach-v0", image_size=32, max_steps=15)
    context = Context(env.id, init_state=3, seed=1)
    observation, _ = env.reset(seed=1, options={"init_state": 3})
    recorder = Recorder(env, context)
    recorder.look(observation)
    for action in np.random.default_rng(0).uniform(-0.2, 0.2, (15, 2)).astype(np.float32):
        recorder.add(observation, action)
        observation, *_ = env.step(action)
    record = EpisodeRecord.of(recorder.finish(success=False, policy_version=0), env.max_steps)
    save_episode(tmp_path / "same.safetensors", record)
    result, frames = replay_episode(tmp_path / "same.safetensors")
    assert result.identical
    assert frames.shape == (8, 256, 256, 3)
    record.actions[6] += 0.1  # the seventh action leads to another seventh state
    save_episode(tmp_path / "other.safetensors", record)
    result, _ = replay_episode(tmp_path / "other.safetensors")
    assert result.first_difference == 7
    assert "states differ from step 7 on" in result.describe()
    assert load_episode(tmp_path / "other.safetensors")[0].context == context
    with pytest.raises(UserError, match="RUN_DIR/episodes"):
        load_episode(tmp_path / "absent")


def test_an_episode_is_dissected_into_what_was_seen_thought_and_done(tmp_path: Path, point_start: Path) -> None:
    from PIL import Image

    from ript_ray.policies.checkpoints import load_policy
    from ript_ray.policies.compare import load_stages
    from ript_ray.rollout import play
    from ript_ray.types import Context, EpisodeRecord

    env = make("gymnasium/ript_ray/PointReach-v0", image_size=32, max_steps=12)
    policy = load_policy(point_start)
    played = play(env, policy, Context(env.id, 4, 9), Acting(5, 3, guidance=2.0), policy_version=0)
    file = tmp_path / "e.safetensors"
    save_episode(file, EpisodeRecord.of(played, 12))
    settings = [f"policy.checkpoint={point_start}", "policy.execute=5", "policy.denoise_steps=3"]
    assert main(["dissect", str(file), *settings, "policy.guidance=2", "--json", str(tmp_path / "as.json")]) == 0
    result = json.loads((tmp_path / "as.json").read_text())
    assert result["first_difference"] is None
    assert result["looks"] == len(played.frame_steps)
    folder = Path(result["folder"])
    looks = json.loads((folder / "looks.json").read_text())["looks"]
    for i, look in enumerate(looks):
        stages = load_stages(folder / f"look_{i:03d}.safetensors")
        np.testing.assert_array_equal(stages["frames"][0], played.frames[i])
        np.testing.assert_array_equal(look["state"], played.states[look["step"]])
        seen = torch.from_numpy(played.frames[i][None]), torch.from_numpy(played.states[look["step"]][None])
        chunk, _ = policy.act(*seen, [played.instruction], torch.from_numpy(stages["noise"]), 2.0, 3)
        executed = np.array(look["executed"], dtype=np.float32)
        np.testing.assert_array_equal(chunk[0, : len(executed)].clamp(-1, 1), executed)
        assert sum(name.startswith("velocity") for name in stages) == 3
        # The last Euler step goes all the way to what was expected then.
        last = stages["noisy chunk 2"] - stages["time 2"][:, None, None] * stages["velocity 2"]
        np.testing.assert_allclose(last, stages["raw action"], atol=1e-5)
        assert Image.open(folder / f"look_{i:03d}.png").size[0] == 900
    assert main(["dissect", str(file), *settings, "--json", str(tmp_path / "other.json")]) == 0
    assert json.loads((tmp_path / "other.json").read_text())["first_difference"] == 0


@pytest.mark.libero
def test_a_libero_episode_replays_to_the_bit(tmp_path: Path) -> None:
    from conftest import make_policy

    from ript_ray.rollout import play
    from ript_ray.types import Context, EpisodeRecord

    env = make("libero_object/1", image_size=32, max_steps=12)
    context = Context(env.id, init_state=2, seed=77)
    trajectory = play(env, make_policy(), context, Acting(5, 2, guidance=1.0), policy_version=0)
    env.close()
    save_episode(tmp_path / "e.safetensors", EpisodeRecord.of(trajectory, 12))
    result, frames = replay_episode(tmp_path / "e.safetensors")
    assert result.identical, result.describe()
    assert len(frames) == 7


class NoSuccess(gym.Env[dict[str, np.ndarray], np.ndarray]):
    """Says nothing of success."""

    observation_space = gym.spaces.Dict(  # type: ignore[assignment]
        {"view": gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), "state": gym.spaces.Box(0, 1, (1,), np.float32)}
    )
    action_space = gym.spaces.Box(-2.0, 6.0, (1,), np.float32)
    actions: list[float] = []  # noqa: RUF012

    def reset(self, **_: Any) -> Any:
        return self._seen(), {}

    def step(self, action: np.ndarray) -> Any:
        self.actions.append(float(action[0]))
        return self._seen(), 0.0, False, False, {}

    def _seen(self) -> dict[str, np.ndarray]:
        return {"view": np.zeros((8, 8, 3), np.uint8), "state": np.zeros(1, np.float32)}


gym.register("tests/NoSuccess-v0", entry_point=NoSuccess)


class Unbounded(NoSuccess):
    """Takes any number."""

    action_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)


gym.register("tests/Unbounded-v0", entry_point=Unbounded)


class Buffers(NoSuccess):
    """Counts its steps in the very arrays that it returns, and gives up after seven."""

    def reset(self, **_: Any) -> Any:
        self._view, self._state = np.zeros((8, 8, 3), np.uint8), np.zeros(1, np.float32)
        return self._seen(), {}

    def step(self, action: np.ndarray) -> Any:
        self._view += 1
        self._state += 1
        return self._seen(), 0.0, False, bool(self._state[0] == 7), {"success": False}

    def _seen(self) -> dict[str, np.ndarray]:
        return {"view": self._view, "state": self._state}


gym.register("tests/Buffers-v0", entry_point=Buffers, max_episode_steps=4, disable_env_checker=True)


def test_an_environment_may_return_its_own_buffers() -> None:
    from ript_ray.rollout import Recorder
    from ript_ray.types import Context

    world = GymnasiumWorld("tests/Buffers-v0", 8)
    observation, _ = world.reset(seed=0)
    recorder = Recorder(world, Context(world.id, 0, 0))
    for _ in range(4):
        recorder.add(observation, np.zeros(1))
        observation, *_ = world.step(np.zeros(1))
    trajectory = recorder.finish(success=False, policy_version=0)
    assert trajectory.states[:, 0].tolist() == [0, 1, 2, 3]
    assert trajectory.tickets["view"][:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert len(set(trajectory.state_hashes.tolist())) == 5


@pytest.mark.parametrize(("max_steps", "length"), [(None, 4), (3, 3), (6, 6), (20, 7)])
def test_an_episode_ends_at_the_step_limit_or_when_the_environment_truncates_it(
    max_steps: int | None, length: int
) -> None:
    world = GymnasiumWorld("tests/Buffers-v0", 8, max_steps)
    world.reset(seed=0)
    ends = [world.step(np.zeros(1))[2:4] for _ in range(length)]
    assert ends == [(False, False)] * (length - 1) + [(False, True)]
    with pytest.raises(gym.error.ResetNeeded):
        world.step(np.zeros(1))


class Masked(NoSuccess):
    """Has a mask and what is seen from far away beside its frames; needs an argument; runs at 50 Hz."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": [], "render_fps": 50}
    observation_space = gym.spaces.Dict(
        {
            "mask": gym.spaces.Box(0, 1, (8, 8, 1), np.uint8),
            "view": gym.spaces.Box(0, 255, (8, 8, 3), np.uint8),
            "state": gym.spaces.Box(-1, 1, (1,), np.float32),
        }
    )

    def __init__(self, gain: float) -> None:
        super().__init__()

    def _seen(self) -> dict[str, np.ndarray]:
        return {**super()._seen(), "mask": np.zeros((8, 8, 1), np.uint8)}


gym.register("tests/Masked-v0", entry_point=Masked)
gym.register("tests/MaskedWithGain-v0", entry_point=Masked, kwargs={"gain": 1.0})


def test_what_is_no_picture_in_colours_is_no_camera() -> None:
    world = GymnasiumWorld("tests/MaskedWithGain-v0", 8)
    assert world.cameras == ("view",)
    assert world.metadata["render_fps"] == 50
    observation, _ = world.reset(seed=0)
    assert set(observation) == {"view", "state", "instruction"}
    with pytest.raises(UserError, match=r"Masked-v0': .*gain.*with the arguments that it needs"):
        GymnasiumWorld("tests/Masked-v0", 8)


def test_an_initial_state_that_there_is_not_is_named_with_the_setting() -> None:
    world = GymnasiumWorld("tests/Buffers-v0", 8)
    with pytest.raises(UserError, match=r"init_state=50: .* has states 0 to 49; set env\.train_init_states and"):
        world.reset(options={"init_state": 50})


def test_what_a_gymnasium_environment_lacks_is_named() -> None:
    with pytest.raises(UserError, match="expected a dictionary with frames"):
        GymnasiumWorld("CartPole-v1", 32)
    with pytest.raises(UserError, match="doesn't exist"):
        GymnasiumWorld("Nowhere-v0", 32)
    with pytest.raises(UserError, match=r"gymnasium/my_pakage\.env:Foo-v0'.*'my_pakage.*which can be imported"):
        GymnasiumWorld("my_pakage.env:Foo-v0", 32)
    with pytest.raises(UserError, match=r"tests/Unbounded-v0'.*takes Box\(-inf, inf.*finite bounds"):
        GymnasiumWorld("tests/Unbounded-v0", 8)
    with pytest.raises(UserError, match=r"set env\.image_size=8"):
        GymnasiumWorld("tests/NoSuccess-v0", 32)
    world = GymnasiumWorld("tests/NoSuccess-v0", 8)
    world.reset(seed=0)
    with pytest.raises(UserError, match=r"no info\['success'\]"):
        world.step(np.array([0.5]))
    assert NoSuccess.actions == [4.0]  # 0.5 of [−1, 1] is three quarters of the way from −2 to 6
    with pytest.raises(UserError, match="did you mean 'PickPlaceCan'"):
        make("robosuite/PickPlaceCans")
    with pytest.raises(UserError, match="unknown suite"):
        make("robosuit/Lift")
