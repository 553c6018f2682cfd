"""The resource plan: how many rollout actors fit beside the learners on a machine, and what is in the way of more."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ript_ray.children import ask_child
from ript_ray.config import Config, ConvertConfig, PlanConfig, ScalingConfig, resolve
from ript_ray.errors import UserError
from ript_ray.policies.policy import Policy

_PROBE = """
import json, os, sys
from pathlib import Path
import torch
from ript_ray.envs import make
from ript_ray.policies.checkpoints import load_policy
from ript_ray.watchdog import private_mb
folder = Path(sys.argv[3])
policy = load_policy(folder) if folder.is_dir() else None
env = make(sys.argv[1], int(sys.argv[2]))
observation, _ = env.reset(seed=0)
observation.rendered()
env.step(env.action_space.sample())
sizes = {"cameras": len(env.cameras), "state_dim": env.state_dim, "action_dim": env.action_dim}
print(json.dumps({"memory_gb": private_mb(os.getpid()) / 1e3} | sizes), flush=True)
os._exit(0)  # drivers may complain on the way out
"""
_PROBE_TIMEOUT_S = 300.0
_FOR_OTHERS_GB = 2.0
"""Coordinator, pool, driver, and a learner on a CPU."""
_SHARE = 0.65
"""Of the free memory; Ray's object store may take 30 %."""
_GPU_SHARE = 0.95
"""Of a GPU's memory; the rest is lost between blocks."""
_RAY_WORKER_GB = 0.15


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is."""

    cpus: float
    memory_gb: float
    """That can be had without swapping."""
    gpus: tuple[float, ...]
    """Memory of each, in GB."""

    @classmethod
    def here(cls, told: PlanConfig) -> Machine:
        """This one, or what the settings say of another."""
        found = tuple(torch.cuda.get_device_properties(i).total_memory / 1e9 for i in range(torch.cuda.device_count()))
        count = len(found) if told.gpus is None else told.gpus
        if count and told.gpu_gb is None and not found:
            raise UserError(f"plan.gpus={count}: this machine has none to ask; say what memory each has: plan.gpu_gb")
        each = found[0] if told.gpu_gb is None and found else (told.gpu_gb or 0.0)
        return cls(
            cpus=told.cpus or os.cpu_count() or 1,
            memory_gb=told.memory_gb or available_memory_gb(),
            gpus=found if told.gpus is None and told.gpu_gb is None else (each,) * count,
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """How the processes of a job share a machine: learners first, each with a GPU of its own, then actors."""

    machine: Machine
    actor_gb: float
    """Memory that one actor has for itself."""
    actor_gpu: dict[str, float]
    """What it takes of a GPU, in GB, by what takes it; empty when it acts on a CPU."""
    learner_gpu: dict[str, float]
    """What a learner takes of a GPU, likewise."""
    learners: int
    by_cpus: int
    """Actors that the CPUs allow."""
    by_memory: int
    learners_on: tuple[int, ...] = ()
    """The GPUs of the learners, where they need any."""

    @property
    def learner_share(self) -> float:
        """Of a GPU, in the steps that Ray knows; a whole one where there are several, since two must not share it."""
        if not self.learner_gpu:
            return 0.0
        return 1.0 if self.learners > 1 else min(1.0, self._share(self.learner_gpu))

    @property
    def actor_share(self) -> float:
        """Of a GPU, likewise."""
        return min(1.0, self._share(self.actor_gpu)) if self.actor_gpu else 0.0

    @property
    def by_gpus(self) -> int | None:
        """Actors that the GPUs allow; None when they need none."""
        if not self.actor_gpu:
            return None
        needed = sum(self.actor_gpu.values())
        large = [i for i, size in enumerate(self.machine.gpus) if _GPU_SHARE * size >= needed]
        free = [1.0 - self.learner_share * (i in self.learners_on) for i in large]
        return sum(int(left / self.actor_share + 1e-9) for left in free)

    @property
    def actors(self) -> int:
        """How many fit."""
        return min(self.rooms.values())

    @property
    def rooms(self) -> dict[str, int]:
        """Room for actors by resource."""
        rooms = {"CPUs": self.by_cpus, "memory": self.by_memory}
        return rooms if self.by_gpus is None else rooms | {"GPU memory": self.by_gpus}

    @property
    def limited_by(self) -> str:
        """The resource that allows the fewest actors."""
        return min(self.rooms, key=self.rooms.__getitem__)

    def describe(self) -> str:
        """One line for people."""
        rooms = ", ".join(f"{name} for {room}" for name, room in self.rooms.items())
        each = f"each takes {self.actor_gb:.2f} GB"
        return f"{self.actors} rollout actors fit, by {self.limited_by} (room by {rooms}); {each}"

    def table(self) -> str:
        """What takes what, in lines for people."""
        m = self.machine
        gpus = f", {len(m.gpus)} GPUs of {m.gpus[0]:.1f} GB" if m.gpus else ", no GPU"
        lines = [f"machine: {m.cpus:g} CPUs, {m.memory_gb:.1f} GB free{gpus}"]
        for name, parts in (("a learner's GPU", self.learner_gpu), ("an actor's GPU", self.actor_gpu)):
            if parts:
                lines.append(f"{name}: {sum(parts.values()):.2f} GB")
                lines += [f"  {part:<38}{size:8.2f}" for part, size in parts.items()]
        lines.append(f"an actor's memory: {self.actor_gb:.2f} GB")
        return "\n".join([*lines, self.describe()])

    def settings(self) -> dict[str, float]:
        """What to set, to use all of the machine."""
        shares = {"scaling.learner_gpus": self.learner_share, "scaling.actor_gpus": self.actor_share}
        return {"scaling.actors": self.actors} | {key: share for key, share in shares.items() if share}

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        found = {"actors": self.actors, "by_gpus": self.by_gpus, "limited_by": self.limited_by}
        return asdict(self) | found | {"settings": self.settings()}

    def _share(self, parts: dict[str, float]) -> float:
        return math.ceil(1e4 * sum(parts.values()) / (_GPU_SHARE * min(self.machine.gpus))) / 1e4


def make_plan(config: Config) -> Plan:
    """The plan of a job for this machine, or for the one that ``plan`` describes.

    One environment and one policy are made in a child process to see what they take; what an update takes is computed
    without taking it.

    Raises:
        UserError: when not even the learners fit, or no environment can be made.
    """
    told, scaling = config.plan, config.scaling
    machine = Machine.here(told)
    checkpoint = resolve(config.policy.checkpoint)
    arguments = (config.env.ids[0], str(config.env.image_size), str(checkpoint))
    try:
        probe = ask_child(_PROBE, _PROBE_TIMEOUT_S, *arguments)
    except RuntimeError as error:
        raise UserError(
            f"no environment could be made to measure its memory: {error}; run: python launch.py doctor"
        ) from error
    measured_gb = probe.pop("memory_gb") + _RAY_WORKER_GB
    actor_gb = told.actor_gb or measured_gb
    learner_gpu: dict[str, float] = {}
    actor_gpu: dict[str, float] = {}
    others_gb = _FOR_OTHERS_GB
    if machine.gpus:
        policy = policy_without_weights(config.policy.checkpoint)
        if scaling.learners and scaling.learner_gpus > 0:
            learner_gpu = _learner_parts(policy, config, probe)
            # The starting policy; where the weights are divided, the policy itself and its copy for the update, too.
            copies = 3 if config.train.shard else 1
            others_gb += scaling.learners * copies * sum(p.numel() for p in policy.parameters()) * 4 / 1e9
        if scaling.actor_gpus > 0:
            actor_gpu = _actor_parts(policy, config)
    fitting: list[int] = []
    if learner_gpu:
        needed = sum(learner_gpu.values())
        fitting = [i for i, size in enumerate(machine.gpus) if _GPU_SHARE * size >= needed]
        if len(fitting) < scaling.learners:
            raise UserError(_does_not_fit(learner_gpu, scaling.learners, machine, len(fitting)))
    free_gb = max(0.0, machine.memory_gb * _SHARE - others_gb)
    cpus = machine.cpus - scaling.learners * scaling.learner_cpus
    return Plan(
        machine=machine,
        actor_gb=actor_gb,
        actor_gpu=actor_gpu,
        learner_gpu=learner_gpu,
        learners=scaling.learners,
        by_cpus=max(0, int(cpus / scaling.actor_cpus + 1e-9)),
        by_memory=int(free_gb / actor_gb),
        learners_on=tuple(fitting[: scaling.learners]),
    )


def plan(config: Config) -> dict[str, Any]:
    """Print the plan of a job, and what to set.

    Raises:
        UserError: when the job does not fit.
    """
    made = make_plan(config)
    print(made.table())
    wanted = config.scaling.actors
    if wanted > made.actors:
        raise UserError(
            f"scaling.actors={wanted}: {made.actors} fit, by {made.limited_by}; lower it, or correct the plan: "
            "plan.cpus, memory_gb, gpus, gpu_gb, actor_gb, actor_gpu_gb, learner_gpu_gb"
        )
    print("to use all of it: " + " ".join(f"{key}={value:g}" for key, value in made.settings().items()))
    return made.to_json()


def fit_actors(config: Config) -> Config:
    """The configuration with as many actors as fit where ``scaling.actors`` is 0, at least one, else as it is."""
    if config.scaling.actors > 0:
        return config
    if config.scaling.address or os.environ.get("RAY_ADDRESS"):
        raise UserError("scaling.actors=0 measures this machine alone; on a cluster give the number of actors")
    made = make_plan(config)
    print(made.describe() + "; set scaling.actors to override")
    shares = _by_shares(config.scaling, len(made.machine.gpus))
    if shares < made.actors:
        print(f"{shares} of them by scaling.actor_gpus={config.scaling.actor_gpus:g} and scaling.learner_gpus")
    actors = max(1, int(min(made.actors, shares)))
    return config.model_copy(update={"scaling": config.scaling.model_copy(update={"actors": actors})})


def _by_shares(scaling: ScalingConfig, gpus: int) -> float:
    """Rollout actors that find their configured share of a GPU beside the learners'."""
    if scaling.actor_gpus == 0:
        return math.inf
    left, wanted = [1.0] * gpus, scaling.learners * scaling.learner_gpus
    for i in range(gpus):
        taken = min(left[i], wanted)
        left[i], wanted = left[i] - taken, wanted - taken
    return sum(int(share / scaling.actor_gpus + 1e-9) for share in left)


def policy_without_weights(checkpoint: str) -> Policy:
    """A policy on the device that has no memory: of a folder, or of ``random:`` and a preset's name.

    Raises:
        UserError: when there is none.
    """
    from ript_ray.policies.checkpoints import load_shape
    from ript_ray.policies.pi0.convert import RANDOM, random_policy

    if not checkpoint.startswith(RANDOM):
        return load_shape(resolve(checkpoint))
    with torch.device("meta"):
        return random_policy(checkpoint.removeprefix(RANDOM), ConvertConfig())


def available_memory_gb() -> float:
    """Memory that can be had without swapping."""
    with open("/proc/meminfo") as file:
        return next(float(line.split()[1]) for line in file if line.startswith("MemAvailable")) / 1e6


def _learner_parts(policy: Policy, config: Config, sizes: dict[str, int]) -> dict[str, float]:
    if config.plan.learner_gpu_gb is not None:
        return {"as plan.learner_gpu_gb says": config.plan.learner_gpu_gb}
    from ript_ray.footprint import CUDA_BYTES, update_footprint

    parts = update_footprint(policy, config, **sizes) | {"CUDA": CUDA_BYTES}
    return {name: size / 1e9 for name, size in parts.items()}


def _actor_parts(policy: Policy, config: Config) -> dict[str, float]:
    if config.plan.actor_gpu_gb is not None:
        return {"as plan.actor_gpu_gb says": config.plan.actor_gpu_gb}
    from ript_ray.footprint import acting_footprint

    return {name: size / 1e9 for name, size in acting_footprint(policy, config.policy.precision).items()}


def _does_not_fit(parts: dict[str, float], learners: int, machine: Machine, fitting: int) -> str:
    largest = ", ".join(f"{name} {size:.1f}" for name, size in sorted(parts.items(), key=lambda part: -part[1]))
    return (
        f"scaling.learners={learners}: each needs {sum(parts.values()):.1f} GB of a GPU ({largest}); {fitting} of "
        f"{len(machine.gpus)} GPUs of {machine.gpus[0]:.1f} GB have that; lower train.micro_batch, set "
        "train.checkpoint_activations=true, train.freeze, train.lora_rank or, for several learners, train.shard=true; "
        "or correct plan.learner_gpu_gb"
    )
