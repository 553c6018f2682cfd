"""The Ray session: what a job needs is compared with what there is before anything starts, then actors are placed."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ript_ray.config import ScalingConfig
from ript_ray.errors import UserError


@dataclass(frozen=True, slots=True)
class ResourcePlan:
    """CPUs and GPUs that a job reserves."""

    actors: int
    cpus: float
    gpus: float

    @classmethod
    def of(cls, scaling: ScalingConfig, learners: bool = True) -> ResourcePlan:
        """The plan of a configuration; without ``learners`` for jobs that only play episodes."""
        workers = scaling.learners if learners else 0
        return cls(
            actors=scaling.actors,
            cpus=scaling.actors * scaling.actor_cpus + workers * scaling.learner_cpus,
            gpus=scaling.actors * scaling.actor_gpus + workers * scaling.learner_gpus,
        )

    def check(self, cpus: float, gpus: float) -> None:
        """Raise `UserError` when the plan needs more than ``cpus`` or ``gpus``."""
        if self.cpus > cpus:
            raise UserError(
                f"scaling.actors={self.actors}: the job needs {self.cpus:g} CPUs, there are {cpus:g}; lower "
                "scaling.actors, scaling.learners, scaling.actor_cpus or scaling.learner_cpus"
            )
        if self.gpus > gpus:
            raise UserError(
                f"scaling.actors={self.actors}: the job needs {self.gpus:g} GPUs, there are {gpus:g}; lower "
                "scaling.actor_gpus or scaling.learner_gpus (0 runs on CPUs)"
            )


@contextlib.contextmanager
def ray_session(scaling: ScalingConfig, plan: ResourcePlan) -> Iterator[None]:
    """Join the cluster of ``scaling.address`` (or of a submitted job), or start Ray on this machine for the time.

    Raises:
        UserError: when the plan does not fit or the cluster cannot be reached.
    """
    address = scaling.address or os.environ.get("RAY_ADDRESS")
    local = address is None
    if local:
        plan.check(os.cpu_count() or 1, torch.cuda.device_count())
    # Simulators and BLAS would each start a thread per core in every process.
    env_vars = {name: "1" for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")}
    try:
        ray.init(
            address=address,
            num_cpus=os.cpu_count() if local else None,
            logging_level=logging.WARNING,
            log_to_driver=False,
            configure_logging=True,
            runtime_env={"env_vars": env_vars | {"PYTHONPATH": _python_path()}},
        )
    except ConnectionError as error:
        raise UserError(
            f"scaling.address={address!r}: no Ray cluster answers there; start one: ray start --head"
        ) from error
    try:
        if not local:
            have = ray.cluster_resources()
            plan.check(have.get("CPU", 0.0), have.get("GPU", 0.0))
        yield
    finally:
        ray.shutdown()


def spawn(actor_class: Any, *args: Any, name: str | None = None) -> Any:
    """Start one actor on the driver's node: the job needs it as it needs its driver, and other nodes may leave.

    (Type checkers do not see the ``remote`` that Ray gives to a class.)
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return actor_class.options(name=name, scheduling_strategy=here).remote(*args)


def start_actors(actor_class: Any, scaling: ScalingConfig, *args: Any) -> list[Any]:
    """One actor per index, with its share of CPUs and GPUs; ready when this returns.

    Raises:
        UserError: when an actor cannot start; the message says why.
    """
    actors = [
        actor_class.options(
            name=f"RolloutActor{i}",
            num_cpus=scaling.actor_cpus,
            num_gpus=scaling.actor_gpus,
            scheduling_strategy="SPREAD",
            label_selector=scaling.actor_labels or None,
        ).remote(i, *args)
        for i in range(scaling.actors)
    ]
    try:
        # An actor whose task crashes when it is made starts again without it.
        awake = [actor.awake.options(max_task_retries=3).remote() for actor in actors]
        ray.get(awake, timeout=scaling.wait_timeout_s)
    except ray.exceptions.RayActorError as error:
        raise UserError(f"a rollout actor could not start:\n{error}") from error
    return actors


def _python_path() -> str:
    """Workers import the project's packages from where the driver does, and what is on its own path."""
    project = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return os.pathsep.join([project, *filter(None, [os.environ.get("PYTHONPATH")])])
