"""Demonstrations from whatever file or folder holds them, and rollouts as a dataset for others."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ript_ray.algos.advantages import leave_one_out
from ript_ray.algos.sampling import training_starts
from ript_ray.config import Config, DataConfig, load_config, resolve
from ript_ray.data.lerobot.decode import fit
from ript_ray.data.lerobot.layout import OPENPI_KEYS, Keys, Version
from ript_ray.data.lerobot.read import read_dataset
from ript_ray.data.lerobot.write import FPS, write_dataset
from ript_ray.data.shards import starts_seen
from ript_ray.data.storage import load_episode, load_trajectories
from ript_ray.envs import find_task
from ript_ray.envs.current import CurrentWorld
from ript_ray.envs.tasks import MAX_STEPS, SHIFTED, task_called
from ript_ray.errors import UserError
from ript_ray.policies.policy import Policy
from ript_ray.reporting import progress_bar, write_json
from ript_ray.rollout import Recorder
from ript_ray.types import EpisodeRecord, EpisodeReport, Start, Trajectory

_HDF5 = (".hdf5", ".h5")
"""Of LIBERO's original demonstrations."""


def read_demonstrations(
    path: Path, env_id: str, data: DataConfig | None = None, *, image_size: int | None = None, frames: bool = True
) -> Iterator[Trajectory]:
    """Trajectories of a file of this project, a LeRobot dataset (a folder) or LIBERO's HDF5, one at a time.

    Args:
        path: of the file or folder.
        env_id: task that the contexts of foreign demonstrations name.
        data: says of foreign ones which features are what, and how many of their frames to keep.
        image_size: scale the frames of a LeRobot dataset or HDF5 to this height and width; by default they stay as they
            are, or, where a dataset's cameras differ in size, become squares of the longest side.
        frames: False leaves those of a LeRobot dataset unread, for who needs none.

    Raises:
        UserError: when it is missing, damaged or of none of these kinds.
    """
    data = data or DataConfig()
    if path.is_dir():
        return read_dataset(
            path,
            env_id=env_id,
            names={"cameras": data.cameras, "state": data.state, "actions": data.actions},
            every=data.frame_every,
            out=data.leave_out,
            image_size=image_size,
            frames=frames,
        )
    if path.suffix in _HDF5:
        from ript_ray.data.hdf5 import read_hdf5

        # What such a file says of itself is the goal file's text, which differs from the benchmark's in 29 tasks.
        task = task_called(path.stem.removesuffix("_demo"))
        said = None if task is None else task.instruction
        found = read_hdf5(path, env_id=env_id, instruction=said, every=data.frame_every, observed=data.observed)
        return found if image_size is None else (_scaled(demo, image_size) for demo in found)
    return iter(load_trajectories(path))


def is_foreign(path: Path) -> bool:
    """Is it of others: a LeRobot dataset or HDF5? Such names no task, but says what was to be done."""
    return path.is_dir() or path.suffix in _HDF5


def shrunk(demo: Trajectory, size: int) -> Trajectory:
    """The same with frames of at most ``size`` pixels a side, where that is more than one."""
    return _scaled(demo, size) if 1 < size < max(demo.frames.shape[2:4]) else demo


def _scaled(demo: Trajectory, size: int) -> Trajectory:
    if demo.frames.shape[2:4] == (size, size):
        return demo
    frames = np.stack([np.stack([fit(frame, size) for frame in look]) for look in demo.frames])
    return replace(demo, frames=frames)


def demonstrations_to_show(config: Config, policy: Policy) -> list[Trajectory]:
    """The successful ones of ``data.demos`` that `train` mixes with rollouts; none if ``data.demo_share`` is 0.

    Raises:
        UserError: when there are none, or they are of other tasks, or their states, actions or frames are not as those
            of rollouts.
    """
    if config.data.demo_share == 0:
        return []
    key, size = f"data.demos={config.data.demos!r}", config.env.image_size
    file = resolve(config.data.demos)
    found = read_demonstrations(file, config.env.ids[0], config.data, image_size=size)
    successes = (demo for demo in found if demo.success)
    demos = list(_of_these_tasks(successes, config.env.ids, key) if is_foreign(file) else successes)
    if not any(starts_seen(EpisodeReport.of(demo), config.data) for demo in demos):
        raise UserError(f"{key}: no windows of successful demonstrations for data.demo_share; set data.tail=pad")
    for demo in demos:
        if demo.context.env_id not in config.env.ids:
            raise UserError(f"{key} is of {demo.context.env_id}; expected demonstrations of env.id={config.env.id!r}")
        policy.transform.check_sizes(key, demo.states.shape[1], demo.actions.shape[1])
        if demo.frames.shape[2:4] != (size, size):
            raise UserError(
                f"{key} with data.demo_share={config.data.demo_share:g}: its frames have {demo.frames.shape[2]}×"
                f"{demo.frames.shape[3]} pixels, those of rollouts {size}×{size}; expected the same: set env.image_size"
            )
    return demos


def _of_these_tasks(demos: Iterable[Trajectory], ids: Sequence[str], key: str) -> Iterator[Trajectory]:
    """Those with the instruction of one of these tasks, and with its name; all, where the tasks are not LIBERO's."""
    suites = MAX_STEPS.keys() | SHIFTED.keys()
    known = {find_task(name).instruction.lower(): name for name in ids if name.partition("/")[0] in suites}
    if not known:
        yield from demos
        return
    found, other = False, None
    for demo in demos:
        name = known.get(demo.instruction.strip().lower())
        if name is None:
            other = other or demo.instruction
            continue
        found = True
        yield replace(demo, context=replace(demo.context, env_id=name))
    if other is not None and not found:
        raise UserError(
            f"{key} has no demonstration of {', '.join(map(repr, known))}, but of {other!r}; expected those of "
            f"env.id={','.join(ids)!r}"
        )


def check_same_demonstrations(demos: Sequence[Trajectory], config: Config, run_dir: Path) -> None:
    """Note in ``demonstrations.json`` what a run shows its learner, or compare it with what is noted there.

    Raises:
        UserError: when the run began with others.
    """
    if not demos:
        return
    digest = hashlib.sha256()
    for demo in demos:
        digest.update(f"{demo.context.env_id} {demo.instruction} {demo.frames.shape} {demo.actions.shape}".encode())
        for array in (demo.frames, demo.frame_steps, demo.states, demo.actions, demo.labels):
            digest.update(b"" if array is None else np.ascontiguousarray(array).data)
    found = {"sha256": digest.hexdigest()}
    file = run_dir / "demonstrations.json"
    if not (run_dir / "journal.jsonl").exists() or not file.exists():
        write_json(file, found)
    elif json.loads(file.read_text()) != found:
        raise UserError(
            f"data.demos={config.data.demos!r}: not the demonstrations that {run_dir} began with; put those back, or "
            f"begin another run with its newest policy: train policy.checkpoint={run_dir}/checkpoints/NNNN"
        )


def frames_on_disk(demos: Iterable[Trajectory]) -> list[Trajectory]:
    """The same demonstrations with their frames in an unnamed file, one at a time in memory while it is written.

    Of the file the system keeps in memory what there is room for; it is gone with the last of the trajectories.
    """
    kept = []
    with tempfile.TemporaryFile() as file:
        for demo in demos:
            kept.append((replace(demo, frames=demo.frames[:0].copy()), file.tell(), demo.frames.shape))
            file.write(np.ascontiguousarray(demo.frames).data)
        file.flush()
        frames = np.memmap(file, dtype=np.uint8, mode="r") if file.tell() else np.empty(0, dtype=np.uint8)
    return [
        replace(demo, frames=frames[first : first + math.prod(shape)].reshape(shape)) for demo, first, shape in kept
    ]


def export_run(run_dir: Path, root: Path, version: Version = "v3.0") -> int:
    """Write the recorded episodes of a run as a LeRobot dataset, with frames before every step.

    The episodes are played again, which gives the same frames, states and outcomes. ``advantages`` are leave-one-out
    over the episodes of the run that share a start and a policy version; those without others have none, 0.
    Evaluations of a training run, and what it has chosen by, are left out: whoever trains on the dataset must not have
    seen the exam.

    Args:
        run_dir: of the run.
        root: of the dataset, a folder that does not exist or is empty.
        version: of the format.

    Returns:
        The number of episodes.

    Raises:
        UserError: when there are none, one cannot be read, or one does not go as it was recorded.
    """
    files = sorted((run_dir / "episodes").glob("*.safetensors"))
    if not files:
        raise UserError(f"{run_dir} holds no recorded episodes; expected the directory of a run of train or eval")
    records = {file: load_episode(file)[0] for file in files}
    if (run_dir / "start").exists():  # it is a run of train
        starts = set(training_starts(load_config(run_dir / "config.yaml", []).env))
        records = {file: record for file, record in records.items() if record.context.start in starts}
        if not records:
            raise UserError(f"{run_dir} holds no training rollouts yet; go on: train --resume {run_dir}")
    groups: dict[tuple[Start, int], list[float]] = {}
    for record in records.values():
        groups.setdefault((record.context.start, record.policy_version), []).append(float(record.success))

    def advantage(_: int, trajectory: Trajectory) -> float:
        rewards = np.array(groups[trajectory.context.start, trajectory.policy_version])
        if len(rewards) < 2:
            return 0.0
        return float(leave_one_out(rewards)[rewards == trajectory.reward][0])

    with CurrentWorld() as current:
        episodes = _played_again(records, current)
        first = next(episodes)
        more = tuple(f"image_{i}" for i in range(2, first.frames.shape[1]))
        assert current.world is not None
        write_dataset(
            root,
            itertools.chain([first], episodes),
            version=version,
            fps=round(current.world.metadata.get("render_fps", FPS)),
            keys=Keys(cameras=(*OPENPI_KEYS.cameras, *more)[: first.frames.shape[1]]),
            columns=("success", "policy_version", "init_hash", "action_is_pad"),
            advantages=advantage,
        )
    return len(records)


def _played_again(records: dict[Path, EpisodeRecord], current: CurrentWorld) -> Iterator[Trajectory]:
    """The whole trajectories of recorded episodes, by their files."""
    for file, record in progress_bar(len(records), "episodes played again", iterable=records.items()):
        env = current.enter(record.context.env_id, record.image_size, record.max_steps)
        observation, _ = env.reset(**record.context.reset_arguments())
        recorder = Recorder(env, record.context)
        success = False
        for action in record.actions:
            recorder.look(observation)
            recorder.add(observation, action)
            observation, _, success, _, _ = env.step(action)
        trajectory = recorder.finish(success, record.policy_version)
        if not np.array_equal(trajectory.state_hashes, record.state_hashes):
            raise UserError(f"{file} does not go as it was recorded; 'python launch.py replay {file}' tells where")
        yield trajectory
