"""How many rollout actors fit on this machine, from the memory that one is measured to take."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ript_ray.children import ask_child
from ript_ray.config import Config
from ript_ray.errors import UserError

_PROBE = """
import os, sys
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
print(private_mb(os.getpid()), flush=True)
os._exit(0)  # drivers may complain on the way out
"""
_PROBE_TIMEOUT_S = 300.0
_FOR_OTHERS_GB = 2.0
"""Learner, coordinator, pool and driver."""
_SHARE = 0.65
"""Of the free memory; Ray's object store may take 30 %."""
_RAY_WORKER_GB = 0.15


@dataclass(frozen=True, slots=True)
class Placement:
    """What limits the number of actors."""

    actor_gb: float
    """Memory that one actor has for itself."""
    free_gb: float
    """Memory that all of them may take."""
    by_memory: int
    by_cpus: int

    @property
    def actors(self) -> int:
        """How many fit, at least one."""
        return max(1, min(self.by_memory, self.by_cpus))

    def describe(self) -> str:
        """One line for people."""
        return (
            f"{self.actors} rollout actors fit: each takes {self.actor_gb:.2f} GB of {self.free_gb:.1f} GB "
            f"(room for {self.by_memory}), CPUs allow {self.by_cpus}"
        )


def measure_placement(config: Config, checkpoint: Path) -> Placement:
    """Make one environment and one policy in a child process and see what they take.

    Raises:
        UserError: when that fails, with the child's last words.
    """
    arguments = (config.env.ids[0], str(config.env.image_size), str(checkpoint))
    try:
        actor_gb = ask_child(_PROBE, _PROBE_TIMEOUT_S, *arguments) / 1e3 + _RAY_WORKER_GB
    except RuntimeError as error:
        raise UserError(
            f"no environment could be made to measure its memory: {error}; run: python launch.py doctor"
        ) from error
    scaling = config.scaling
    free_gb = max(0.0, available_memory_gb() * _SHARE - _FOR_OTHERS_GB)
    cpus = (os.cpu_count() or 1) - scaling.learners * scaling.learner_cpus
    return Placement(actor_gb, free_gb, int(free_gb / actor_gb), int(cpus / scaling.actor_cpus + 1e-9))


def fit_actors(config: Config, checkpoint: Path) -> Config:
    """The configuration with as many actors as fit where ``scaling.actors`` is 0, else as it is."""
    if config.scaling.actors > 0:
        return config
    if config.scaling.address or os.environ.get("RAY_ADDRESS"):
        raise UserError("scaling.actors=0 measures this machine alone; on a cluster give the number of actors")
    placement = measure_placement(config, checkpoint)
    print(placement.describe() + "; set scaling.actors to override")
    return config.model_copy(update={"scaling": config.scaling.model_copy(update={"actors": placement.actors})})


def available_memory_gb() -> float:
    """Memory that can be had without swapping."""
    with open("/proc/meminfo") as file:
        return next(float(line.split()[1]) for line in file if line.startswith("MemAvailable")) / 1e6
