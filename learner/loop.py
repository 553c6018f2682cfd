"""The learner group and what each of its workers runs: ask for a shard, update, publish, report."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
from ray.train.constants import RAY_TRAIN_ENABLE_STATE_TRACKING
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh

from learner.learner import Learner
from learner.steps import plan_steps
from learner.update import NonFinite, Step
from ript_ray.config import Config
from ript_ray.policies.checkpoints import (
    UNAVERAGED,
    cpu_weights,
    from_published,
    load_policy,
    save_policy,
    to_publish,
)
from ript_ray.policies.policy import Policy
from ript_ray.types import Batch, Finished, FrameBatch, FrameJob, Trajectory

# glibc returns freed memory to the system at once, and every step pays for it again with page faults: a quarter of the
# learner's speed on a CPU. These keep it; the peak does not change.
KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
}


_MOST_DEATHS = 3
"""Of rollout actors by the same frames: then it is the frames."""


def learner_group(config: Config, policy: Policy, pool: Any, store: Any, coordinator: Any, home: Any) -> TorchTrainer:
    """The group of ``scaling.learners`` workers; its ``fit`` returns after ``train.updates`` updates.

    Args:
        config: the whole configuration.
        policy: the starting policy.
        pool: handle of a `SamplePool`, which serves the samples.
        store: handle of a `WeightStore`, which takes the weights.
        coordinator: handle of a `Coordinator`, which takes metrics and progress.
        home: the run's directory, an `actors.home.Home`; checkpoints go into its ``checkpoints`` folder.
    """
    folder = str(home.run_dir)
    scaling = config.scaling
    # Ray Train has a process that removes the group once its controller is no more. It asks the cluster that was begun
    # on this machine by "ray start": another than a local session's, or one that is gone, which holds up the end.
    ENV_VARS_TO_PROPAGATE.add("RAY_API_SERVER_ADDRESS")
    os.environ.setdefault(RAY_TRAIN_ENABLE_STATE_TRACKING, "1")  # the dashboard's Train tab is empty otherwise
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(scaling.heartbeat_timeout_s)  # ten minutes otherwise
    return _LearnerGroup(
        train_loop,
        train_loop_config={
            "config": config,
            "description": policy.describe(),
            # NumPy's arrays are shared by all learners of a node, torch's tensors would be copied.
            "weights": [ray.put({name: tensor.numpy() for name, tensor in cpu_weights(policy).items()})],
            "pool": pool,
            "store": store,
            "coordinator": coordinator,
            "home": home,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=scaling.learners,
            use_gpu=scaling.learner_gpus > 0,
            resources_per_worker={"CPU": scaling.learner_cpus, "GPU": scaling.learner_gpus},
            label_selector=scaling.learner_labels or None,
        ),
        run_config=ray.train.RunConfig(
            name="learners",
            storage_path=folder,
            worker_runtime_env={"env_vars": KEEP_FREED_MEMORY},
            # A worker that dies takes the group with it; the group starts again at the update it was in.
            # One that finds no place is tried again each minute, not for ever.
            failure_config=ray.train.FailureConfig(
                max_failures=2, controller_failure_limit=max(1, int(scaling.wait_timeout_s / 60))
            ),
        ),
    )


class _LearnerGroup(TorchTrainer):
    """Ctrl-C is for the driver: Ray Train's own handler waits without limit and then ends it as if all were well."""

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


def train_loop(settings: dict[str, Any]) -> None:
    """What one worker does: train for all updates.

    Args:
        settings: as `learner_group` fills it; ``weights`` is an object reference in a list.

    Raises:
        TimeoutError: when no samples arrive within ``scaling.wait_timeout_s``.
    """
    config: Config = settings["config"]
    pool, store, coordinator = settings["pool"], settings["store"], settings["coordinator"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    limit = config.scaling.wait_timeout_s
    device = ray.train.torch.get_device() if config.scaling.learner_gpus > 0 else torch.device("cpu")
    mesh = init_device_mesh(device.type, (world,)) if config.train.shard and world > 1 else None
    if mesh is not None:
        device = torch.device("cpu")  # an update takes each learner's part to its GPU
    torch.set_num_threads(config.scaling.learner_threads)
    start = from_published(ray.get(settings["weights"][0], timeout=limit))
    learner = Learner(config, settings["description"], start, rank, device, mesh)
    memory = PeakMemory()
    home = settings["home"]
    published = ray.get(store.newer_than.remote(0), timeout=limit)
    first = 0 if published is None else published[0]
    # Only the first publishes, and an update that starts anew needs nothing of the one before.
    if first and (rank == 0 or not config.train.restart):
        _go_on(learner, first, home)
    worker = _Worker(rank, coordinator, store, memory, home)
    if (reason := ray.get(coordinator.diagnosis.remote(), timeout=limit)) is not None:
        raise RuntimeError(reason)  # it was not the process: the update would fail again
    if rank == 0:
        ray.get(coordinator.learners_started.remote(first), timeout=limit)
    for step in range(first, config.train.updates):
        waiting = time.perf_counter()
        shard = ray.get(pool.next_shard.remote(step, rank, world, limit), timeout=limit + 30)
        if shard is None:
            raise TimeoutError(
                f"learner {rank} waited {limit:.0f} s for the samples of update {step + 1}; see the Coordinator's log, "
                "or raise scaling.wait_timeout_s"
            )
        if isinstance(shard, Finished):
            break
        idle = time.perf_counter() - waiting
        began = time.perf_counter()
        frames = RenderedFrames(shard.rendered, coordinator, limit)
        if config.scaling.learners:  # else this is the driver, which has all of them, and may have to leave Ray
            prefetch(list(shard.trajectories.values()), limit)
        steps = plan_steps(shard, _Trajectories(shard.trajectories, limit), config.train.micro_batch, frames)
        diagnostics = _learn(learner, step, steps, config, worker)
        gc.collect()  # a divided policy refers to itself
        torch.cuda.empty_cache()  # rollout actors may share this GPU
        busy = time.perf_counter() - began
        row = {f"learner/{name}": value for name, value in diagnostics.items()}
        idle, busy = idle + frames.waited_s, busy - frames.waited_s
        row |= {"learner/frames_wait_s": frames.waited_s}
        row |= {"learner/busy_s": busy, "learner/idle_s": idle, "learner/peak_memory_mb": memory.read_mb()}
        if rank == 0:
            # Before the checkpoint: once that is there, the update is not done again.
            ray.get(coordinator.log.remote({"update": step + 1} | row), timeout=limit)
            _publish(step + 1, learner, config, worker)
        ray.train.report(row)


@dataclass(frozen=True, slots=True)
class _Worker:
    """What all updates of a worker have in common."""

    rank: int
    coordinator: Any
    store: Any
    memory: PeakMemory
    home: Any


def _go_on(learner: Learner, version: int, home: Any) -> None:
    """Take up the weights of a version that an earlier group made."""
    checkpoints, policy = home.run_dir / "checkpoints", learner.policy
    with (
        home.reading(checkpoints / f"{version:04d}") as acted,
        home.reading(checkpoints / UNAVERAGED.format(version)) as unaveraged,
    ):
        averaged = unaveraged.exists()
        policy.load_state_dict(load_policy(unaveraged if averaged else acted).state_dict())
        learner.acting = load_policy(acted).float().to(next(policy.parameters()).device) if averaged else policy


def _publish(version: int, learner: Learner, config: Config, worker: _Worker) -> None:
    """Write the checkpoint, then give the weights to the rollout actors."""
    policy, acting = learner.policy, learner.acting
    limit, home = config.scaling.wait_timeout_s, worker.home
    checkpoints = home.run_dir / "checkpoints"
    arrays, sha256 = to_publish(acting, config.policy.precision)
    if acting is not policy and not config.train.restart:
        with home.writing(checkpoints / UNAVERAGED.format(version)) as place:
            save_policy(place, policy)
    with home.writing(checkpoints / f"{version:04d}") as place:
        save_policy(place, acting, about={"update": version})
    ray.get(worker.store.publish.remote(version, [ray.put(arrays)], sha256), timeout=limit)
    if config.run.keep_checkpoints is not None:
        best = ray.get(worker.coordinator.best_updates.remote(), timeout=limit)
        home.prune(checkpoints, config.run.keep_checkpoints, best, config.train.spared)


def _learn(learner: Learner, step: int, steps: list[Step], config: Config, worker: _Worker) -> dict[str, float]:
    """One update, see `Learner.learn`, with its progress told and what was not finite saved.

    Raises:
        RuntimeError: when a NaN or an infinity turned up; it names the file with the samples of the step.
    """
    show = max(1, len(steps) // 100)

    def on_step(index: int, loss: float) -> None:
        if index % show:
            return
        worker.memory.read_mb()
        if worker.rank == 0:
            worker.coordinator.learning.remote(step, index, len(steps))

    try:
        return learner.learn(step, steps, on_step)
    except NonFinite as error:
        file = worker.home.run_dir / "faults" / f"update-{step + 1}-rank-{worker.rank}.safetensors"
        with worker.home.writing(file) as place:
            save_batch(place, [load() for load in steps[error.step].micro_batches])
        reason = f"update {step + 1}, {error}; the samples of this step are in {file}"
        ray.get(worker.coordinator.diagnose.remote(reason), timeout=config.scaling.wait_timeout_s)
        raise RuntimeError(reason) from error


def save_batch(file: Path, batches: Sequence[Batch]) -> None:
    """Write the tensors of micro-batches to a safetensors file, by name and number."""
    file.parent.mkdir(parents=True, exist_ok=True)
    names = ("frames", "states", "actions", "valid", "advantages", "weights", "versions")
    tensors = {f"{i}.{name}": getattr(batch, name) for i, batch in enumerate(batches) for name in names}
    instructions = json.dumps([batch.instructions for batch in batches])
    save_file(tensors, file, metadata={"instructions": instructions})


def prefetch(references: Sequence[Any], timeout_s: float) -> None:
    """Begin to bring objects to this node, while the learner trains on those that are here.

    Args:
        references: of objects on any node. All of them must have been made: none comes before all others are.
        timeout_s: after which those that are not here by then come when they are asked for.
    """

    def pull() -> None:
        with contextlib.suppress(ray.exceptions.RayError):  # who asks for them hears of it
            ray.wait(list(references), num_returns=len(references), timeout=timeout_s, fetch_local=True)

    if references:
        threading.Thread(target=pull, name="prefetch", daemon=True).start()


class RenderedFrames(dict[tuple[int, int], np.ndarray]):
    """Frames made for training, by trajectory and step, fetched when first needed.

    They are made in the order of their first use while the learner trains, so it waits only for what comes next.

    Args:
        batches: of a shard.
        coordinator: handle of a `Coordinator`, which knows the actors: another makes what was lost with one.
        timeout_s: longest wait for one batch.
    """

    def __init__(self, batches: Sequence[FrameBatch], coordinator: Any, timeout_s: float) -> None:
        super().__init__()
        self._batches = {key: batch for batch in batches for key in batch.job.keys}
        self._coordinator = coordinator
        self._timeout_s = timeout_s
        self.waited_s = 0.0
        """Seconds spent waiting so far."""

    def __missing__(self, key: tuple[int, int]) -> np.ndarray:
        batch = self._batches[key]
        started = time.perf_counter()
        try:
            frames = ray.get(batch.reference[0], timeout=self._timeout_s)
        except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError):
            frames = self._made_again(batch.job)
        self.waited_s += time.perf_counter() - started
        self.update(zip(batch.job.keys, frames, strict=True))
        return self[key]

    def _made_again(self, job: FrameJob) -> np.ndarray:
        """The same frames by whichever actor is free first: uint8[n, C, H, W, 3].

        Raises:
            RuntimeError: when several die of it.
            TimeoutError: when none is free.
        """
        deadline, died = time.monotonic() + self._timeout_s, 0
        while (left := deadline - time.monotonic()) > 0:
            actors = ray.get(self._coordinator.rollout_actors.remote(), timeout=self._timeout_s)
            asked = {actor.awake.remote(): actor for actor in actors}
            while asked and (free := ray.wait(list(asked), timeout=left)[0]):
                actor = asked.pop(free[0])
                try:
                    ray.get(free[0])
                except ray.exceptions.RayActorError:  # it is gone already
                    continue
                try:
                    frames: np.ndarray = ray.get(actor.render.remote(job), timeout=self._timeout_s)
                    return frames
                except ray.exceptions.RayActorError as error:
                    died += 1
                    if died == _MOST_DEATHS:
                        raise RuntimeError(f"{died} rollout actors died of frames of {job.env_id}: {error}") from error
            time.sleep(1.0)
        raise TimeoutError(
            f"a learner waited {self._timeout_s:.0f} s for a rollout actor to make frames that were lost with another; "
            "see 'ray list actors', or raise scaling.wait_timeout_s"
        )


class _Trajectories(dict[int, Trajectory]):
    """Trajectories by identifier, fetched when first needed: views into the object store's shared memory."""

    def __init__(self, references: dict[int, Any], timeout_s: float) -> None:
        super().__init__()
        self._references = references
        self._timeout_s = timeout_s

    def __missing__(self, identifier: int) -> Trajectory:
        self[identifier] = ray.get(self._references[identifier], timeout=self._timeout_s)
        return self[identifier]


class PeakMemory:
    """Largest private memory of this process; pages shared with the object store are not counted."""

    def __init__(self) -> None:
        self._peak = 0.0

    def read_mb(self) -> float:
        """Peak in MB, of the values seen at each call."""
        status = Path("/proc/self/status").read_text()
        private = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
        self._peak = max(self._peak, private / 1024)
        return self._peak
