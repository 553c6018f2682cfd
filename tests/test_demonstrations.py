"""Rollouts of a run as a dataset, and demonstrations of any kind as trajectories."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_policy, make_trajectory
from test_lerobot import complete

import launch
from learner.sft import train_on_demonstrations
from ript_ray.config import Config, save_config
from ript_ray.data.demonstrations import (
    check_same_demonstrations,
    demonstrations_to_show,
    frames_on_disk,
    read_demonstrations,
    shrunk,
)
from ript_ray.data.lerobot.layout import Keys
from ript_ray.data.lerobot.write import write_dataset
from ript_ray.data.storage import save_episode, save_trajectories
from ript_ray.envs import World, find_task, make
from ript_ray.errors import UserError
from ript_ray.policies.checkpoints import load_policy
from ript_ray.rollout import Recorder
from ript_ray.types import Context, EpisodeRecord, Trajectory
from ript_ray.watchdog import private_mb

POINT_REACH = "gymnasium/ript_ray/PointReach-v0"


def play(env: World, seed: int, state: int | None = 3) -> Trajectory:
    """Straight to the target for even seeds, anywhere for odd ones, with a frame at every step."""
    context = Context(env.id, state, seed, placement=None if state is not None else 500_000)
    observation, _ = env.reset(**context.reset_arguments())
    recorder = Recorder(env, context)
    rng = np.random.default_rng(seed)
    over = success = False
    while not over:
        recorder.look(observation)
        action = rng.uniform(-0.1, 0.1, 2) if seed % 2 else env._env.unwrapped.expert_action()
        recorder.add(observation, action)
        observation, _, success, truncated, _ = env.step(action.astype(np.float32))
        over = success or truncated
    return recorder.finish(success, policy_version=2)


def record(run: Path, played: list[Trajectory], max_steps: int) -> None:
    """What a run of train leaves of episodes; it has learnt from state 3."""
    settings = {"env": {"id": POINT_REACH, "train_init_states": [3, 4], "eval_init_states": [0, 3]}}
    for i, trajectory in enumerate(played):
        save_episode(run / "episodes" / f"{i:06d}.safetensors", EpisodeRecord.of(trajectory, max_steps))
    (run / "start").mkdir()
    save_config(Config.model_validate(settings), run / "config.yaml")


def test_demonstrations_to_be_mixed_with_rollouts_are_successful_and_alike(point_start: Path, tmp_path: Path) -> None:
    file, policy = tmp_path / "demos.safetensors", load_policy(point_start)
    env = make(POINT_REACH, image_size=32, max_steps=12)
    played = [play(env, seed) for seed in range(4)]
    save_trajectories(file, played, {})

    def show(size: int, share: float = 0.5, tail: str = "pad") -> list[Trajectory]:
        data = {"demos": str(file), "demo_share": share, "tail": tail, "short": "drop" if tail == "drop" else "pad"}
        settings = {"env": {"id": POINT_REACH, "image_size": size}, "data": data}
        return demonstrations_to_show(Config.model_validate(settings), policy)

    assert len(show(32)) == sum(demo.success for demo in played) < 4
    assert show(32, share=0.0) == []
    with pytest.raises(UserError, match="its frames have 32×32 pixels, those of rollouts 64×64"):
        show(64)
    with pytest.raises(UserError, match="no windows of successful demonstrations"):
        show(32, tail="drop")
    elsewhere = [dataclasses.replace(demo, context=Context("libero_object/0", 0, 0)) for demo in played]
    save_trajectories(file, elsewhere, {})
    with pytest.raises(UserError, match=r"is of libero_object/0; expected demonstrations of env.id="):
        show(32)
    wide = [dataclasses.replace(demo, states=np.tile(demo.states, 2)) for demo in played]
    save_trajectories(file, wide, {})
    with pytest.raises(UserError, match="state dimensions, the policy was made for"):
        show(32)


def test_of_somebody_elses_demonstrations_those_of_other_tasks_are_left_out(tmp_path: Path) -> None:
    tasks = [find_task(f"libero_object/{i}") for i in range(3)]
    made = [dataclasses.replace(complete(60, i), instruction=task.instruction) for i, task in enumerate(tasks)]
    write_dataset(tmp_path / "theirs", made)

    def show(env_id: str) -> list[str]:
        data = {"demos": str(tmp_path / "theirs"), "demo_share": 0.5, "tail": "pad"}
        config = Config.model_validate({"env": {"id": env_id, "image_size": 16}, "data": data})
        return [demo.context.env_id for demo in demonstrations_to_show(config, make_policy())]

    assert show("libero_object/2") == ["libero_object/2"]
    assert show("libero_object_swap/2") == ["libero_object_swap/2"]
    assert show("libero_object/2,libero_object/0") == ["libero_object/0", "libero_object/2"]
    with pytest.raises(UserError, match=r"has no demonstration of .*, but of 'pick up the alphabet soup"):
        show("libero_goal/0")


def test_a_run_goes_on_with_the_demonstrations_that_it_began_with(tmp_path: Path) -> None:
    demos, others = [make_trajectory(8), make_trajectory(9)], [make_trajectory(8), make_trajectory(9)]
    config = Config.model_validate({"data": {"demos": "mine.safetensors"}})
    check_same_demonstrations(others, config, tmp_path)  # began nothing
    check_same_demonstrations(demos, config, tmp_path)
    (tmp_path / "journal.jsonl").touch()
    check_same_demonstrations(demos, config, tmp_path)
    others[1].actions[3, 1] += 1e-6
    for wrong in (others, demos[:1], demos[::-1]):
        with pytest.raises(UserError, match=r"data.demos='mine.safetensors': not the demonstrations that"):
            check_same_demonstrations(wrong, config, tmp_path)


def test_the_episodes_of_a_run_become_a_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    env = make(POINT_REACH, image_size=32, max_steps=12)
    played = [play(env, seed) for seed in range(4)]
    besides = [play(env, 100, state=1), play(env, 101, state=None)]  # of the exam, and to choose by
    record(tmp_path / "run", [*played, *besides], env.max_steps)
    assert launch.main(["export", str(tmp_path / "run"), str(tmp_path / "dataset")]) == 0
    found = list(read_demonstrations(tmp_path / "dataset", POINT_REACH))
    assert len(found) == 4
    for there, here in zip(found, played, strict=True):
        np.testing.assert_array_equal(there.frames, here.frames)
        np.testing.assert_array_equal(there.actions, here.actions)
        np.testing.assert_array_equal(there.states, here.states)
        assert there.instruction == here.instruction
        assert there.policy_version == 2
    table = pq.read_table(next((tmp_path / "dataset/data").rglob("*.parquet")))
    firsts = [table.column("episode_index").to_pylist().index(i) for i in range(4)]
    hashes = np.array(table.column("init_hash").to_pylist(), dtype=np.int64).view(np.uint64)
    assert hashes[firsts].tolist() == [t.state_hashes[0] for t in played]
    assert launch.main(["export", str(tmp_path), str(tmp_path / "other")]) == 2
    assert "holds no recorded episodes" in capsys.readouterr().err
    record(tmp_path / "eval", besides, env.max_steps)
    (tmp_path / "eval/start").rmdir()  # which only train makes
    assert launch.main(["export", str(tmp_path / "eval"), str(tmp_path / "seen")]) == 0
    assert len(list(read_demonstrations(tmp_path / "seen", POINT_REACH))) == 2
    record(tmp_path / "begun", besides, env.max_steps)
    assert launch.main(["export", str(tmp_path / "begun"), str(tmp_path / "other")]) == 2
    assert "holds no training rollouts yet" in capsys.readouterr().err


def test_advantages_are_leave_one_out_over_the_same_start(tmp_path: Path) -> None:
    env = make(POINT_REACH, image_size=32, max_steps=30)
    played = [play(env, seed) for seed in (0, 1, 3, 4, 5)]
    record(tmp_path / "run", played, env.max_steps)
    rewards = np.array([t.reward for t in played])
    assert rewards.tolist() == [1, 0, 0, 1, 0]
    assert launch.main(["export", str(tmp_path / "run"), str(tmp_path / "d"), "data.dataset_version=v2.1"]) == 0
    for i, file in enumerate(sorted((tmp_path / "d/data").rglob("*.parquet"))):
        others = np.delete(rewards, i)
        (value,) = set(pq.read_table(file).column("advantages").to_pylist())
        assert value == pytest.approx(rewards[i] - others.mean(), abs=1e-6)
        (success,) = set(pq.read_table(file).column("success").to_pylist())
        assert success == rewards[i]


def test_an_episode_that_goes_another_way_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    env = make(POINT_REACH, image_size=32, max_steps=12)
    played = play(env, 1)
    played.actions[5] += 0.1
    record(tmp_path / "run", [played], env.max_steps)
    assert launch.main(["export", str(tmp_path / "run"), str(tmp_path / "d")]) == 2
    assert "does not go as it was recorded" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("setting", ["sft.relative=2", "sft.policy=my:Own"])
def test_a_policy_to_go_on_with_is_what_it_is(
    setting: str, point_start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch.main(["sft", f"sft.init={point_start}", setting, f"run.dir={tmp_path}"]) == 2
    assert f"with sft.init='{point_start}': it is for a new policy" in capsys.readouterr().err


def test_demonstrations_of_another_task_are_not_imitated_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_trajectories(tmp_path / "demos.safetensors", [make_trajectory(60)], {})
    command = ["sft", f"data.demos={tmp_path / 'demos.safetensors'}", f"sft.output={tmp_path / 'policy'}"]
    assert launch.main([*command, "env.id=libero_object/3", f"run.dir={tmp_path / 'run'}"]) == 2
    assert "is of libero_object/0; expected demonstrations of env.id='libero_object/3'" in capsys.readouterr().err


def test_imitation_teaches_no_condition_and_hurries_none(point_start: Path) -> None:
    def learnt(**train: float) -> dict[str, torch.Tensor]:
        settings = {
            "env": {"id": POINT_REACH, "image_size": 32},
            "data": {"demos": str(point_start / "../demos.safetensors"), "tail": "pad"},
            "sft": {"steps": 3},
            "train": {"batch_size": 8, "micro_batch": 8, **train},
        }
        return train_on_demonstrations(Config.model_validate(settings), lambda step, loss: None)[0].state_dict()

    usual, hurried = learnt(), learnt(condition_lr=100.0)
    assert all(usual[name].equal(hurried[name]) for name in usual)


def test_frames_are_made_smaller_and_never_larger() -> None:
    demo = dataclasses.replace(make_trajectory(20), frames=np.zeros((2, 2, 24, 40, 3), dtype=np.uint8))
    assert shrunk(demo, 16).frames.shape == (2, 2, 16, 16, 3)
    for size in (1, 40, 224):  # 1: of a policy that takes any
        assert shrunk(demo, size) is demo


def test_files_of_this_project_and_what_is_none(tmp_path: Path) -> None:
    save_trajectories(tmp_path / "demos.safetensors", [make_trajectory(30)], {})
    assert len(list(read_demonstrations(tmp_path / "demos.safetensors", "libero_object/0"))) == 1
    for path in (tmp_path / "absent.safetensors", tmp_path, tmp_path / "absent.hdf5"):
        with pytest.raises(UserError):
            list(read_demonstrations(path, "libero_object/0"))


def test_frames_on_disk_are_the_same_and_take_no_memory() -> None:
    def large(seed: int) -> Trajectory:
        frames = np.random.default_rng(seed).integers(0, 256, (6, 2, 1000, 1000, 3), dtype=np.uint8)
        return dataclasses.replace(make_trajectory(60, seed=seed), frames=frames)

    large(0)
    before = private_mb(os.getpid())
    kept = frames_on_disk(large(seed) for seed in range(8))  # 288 MB
    assert private_mb(os.getpid()) < before + 100
    for seed, demo in enumerate(kept):
        there = large(seed)
        np.testing.assert_array_equal(demo.frames, there.frames)
        np.testing.assert_array_equal(demo.actions, there.actions)
    assert frames_on_disk([]) == []


def test_an_arm_of_joint_angles_is_imitated_relative_to_where_it_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As SO100 datasets are: six dimensions, degrees, a gripper from 0 to 100, two cameras that are not square."""
    rng = np.random.default_rng(0)
    turn = np.array([4.0, -4.0, 2.0, 0.0, 1.0], dtype=np.float32)
    demos = []
    for seed in range(24):
        joints = rng.uniform(-60, 60, 5) + turn * np.arange(56)[:, None]
        gripper = np.full((56, 1), rng.uniform(0, 100))
        demos.append(
            dataclasses.replace(
                make_trajectory(56, seed=seed),
                states=np.hstack([joints, gripper]).astype(np.float32),
                actions=np.hstack([joints + turn, np.full((56, 1), 80.0)]).astype(np.float32),
                frames=rng.integers(0, 256, (56, 2, 24, 32, 3), dtype=np.uint8),
                frame_steps=np.arange(56, dtype=np.int32),
                tickets={},
                scene={},
            )
        )
    keys = Keys(("observation.images.base", "observation.images.wrist"), "observation.state", "action")
    write_dataset(tmp_path / "so100", demos, fps=30, robot_type="so100_follower", keys=keys)
    command = ["sft", f"data.demos={tmp_path / 'so100'}", f"sft.output={tmp_path / 'policy'}", "env.image_size=32"]
    command += ["sft.steps=80", "train.batch_size=32", "train.micro_batch=32", "data.frame_every=4"]
    assert launch.main([*command, f"run.dir={tmp_path / 'run'}", "sft.relative=5"]) == 0
    policy = load_policy(tmp_path / "policy")
    assert policy.transform.relative == (True,) * 5 + (False,)
    assert policy.transform.frame_size == 32
    states = torch.from_numpy(np.stack([demo.states[2] for demo in demos]))
    frames = torch.zeros(24, 2, 32, 32, 3, dtype=torch.uint8)
    with torch.no_grad():
        chunks, _ = policy.act(frames, states, [demos[0].instruction] * 24, torch.randn(24, 50, 6))
    torch.testing.assert_close(chunks[:, 0, :5] - states[:, :5], torch.from_numpy(turn).expand(24, 5), atol=4, rtol=0)
    torch.testing.assert_close(chunks[:, :, 5], torch.full((24, 50), 80.0), atol=4, rtol=0)
    assert launch.main([*command, f"run.dir={tmp_path / 'other'}", "sft.relative=7"]) == 2
    assert "sft.relative=7: there are 6 action and 6 state dimensions" in capsys.readouterr().err
