"""The Ray session: what a job needs is compared with what there is before anything starts, then actors are placed."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ript_ray.config import ScalingConfig
from ript_ray.errors import UserError, first_line

API_SERVER = "RAY_API_SERVER_ADDRESS"
"""Environment variable: where a cluster's dashboard answers over HTTP."""


@dataclass(frozen=True, slots=True)
class Node:
    """What a machine of a cluster has."""

    cpus: float
    gpus: float
    labels: Mapping[str, str]
    taken: tuple[float, ...] = ()
    """Shares of its GPUs that are taken, of the first ones."""

    @property
    def free_gpus(self) -> list[float]:
        """What is left of each."""
        return [1.0 - share for share in self.taken] + [1.0] * (int(self.gpus) - len(self.taken))


@dataclass(frozen=True, slots=True)
class Workers:
    """Processes of one kind, each with the same share of a node."""

    kind: Literal["actors", "learners"]
    count: int
    cpus: float
    gpus: float
    labels: Mapping[str, str]
    """That the nodes they run on must have, as Ray's label selectors."""

    def fit_on(self, node: Node) -> int:
        """How many an empty node could take."""
        if not all(_selects(wanted, node.labels.get(label)) for label, wanted in self.labels.items()):
            return 0
        return min(self.count, int(node.cpus / self.cpus + 1e-9), self._fit_on_gpus(node.free_gpus))

    def _fit_on_gpus(self, free: Sequence[float]) -> int:
        """Several may share a GPU; none has parts of several."""
        if not self.gpus:
            return self.count
        if self.gpus < 1:
            return sum(int(share / self.gpus + 1e-9) for share in free)
        return int(sum(share > 1 - 1e-9 for share in free) / self.gpus + 1e-9)

    def placed_on(self, node: Node, count: int) -> Node:
        """What is left of a node with so many of them, each on the fullest GPU that has room, as Ray places them."""
        free, share = node.free_gpus, min(1.0, self.gpus)
        for _ in range(count if share else 0):
            fit = sorted((i for i, left in enumerate(free) if left > share - 1e-9), key=free.__getitem__)
            for i in fit[: max(1, int(self.gpus))]:
                free[i] -= share
        return replace(node, cpus=node.cpus - count * self.cpus, taken=tuple(1.0 - left for left in free))

    def spread_over(self, nodes: Sequence[Node], sparing: Workers) -> list[Node]:
        """What is left of empty nodes once the workers were dealt to them in turn, as far as there is room.

        In which order is not known; this one leaves most to those who come after.
        """
        order = sorted(nodes, key=sparing.fit_on)
        rooms = [self.fit_on(node) for node in order]
        taken = [0] * len(order)
        for _ in range(min(self.count, sum(rooms))):
            least = min((i for i, room in enumerate(rooms) if taken[i] < room), key=lambda i: taken[i])
            taken[least] += 1
        return [self.placed_on(node, n) for node, n in zip(order, taken, strict=True)]


@dataclass(frozen=True, slots=True)
class ResourcePlan:
    """The processes that a job cannot begin without and that reserve something."""

    workers: tuple[Workers, ...]

    @classmethod
    def of(cls, scaling: ScalingConfig, learners: bool = True, jobs: int = 1) -> ResourcePlan:
        """The plan of so many jobs of a configuration; without ``learners`` when they only play episodes."""
        needed = jobs * scaling.needed_actors
        actors = Workers("actors", needed, scaling.actor_cpus, scaling.actor_gpus, scaling.actor_labels)
        group = Workers(
            "learners", jobs * scaling.learners, scaling.learner_cpus, scaling.learner_gpus, scaling.learner_labels
        )
        return cls((actors, group) if learners else (actors,))

    @property
    def cpus(self) -> float:
        """That all of them reserve."""
        return sum(workers.count * workers.cpus for workers in self.workers)

    @property
    def gpus(self) -> float:
        """That all of them reserve."""
        return sum(workers.count * workers.gpus for workers in self.workers)

    def check(self, nodes: Sequence[Node]) -> None:
        """Raise `UserError` when these nodes together, or the share of one kind that they can place, are too little."""
        cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
        actors = self.workers[0].count
        if self.cpus > cpus:
            raise UserError(
                f"scaling.actors={actors}: the job needs {self.cpus:g} CPUs, there are {cpus:g}; lower "
                "scaling.actors, scaling.learners, scaling.actor_cpus or scaling.learner_cpus"
            )
        if self.gpus > gpus:
            raise UserError(
                f"scaling.actors={actors}: the job needs {self.gpus:g} GPUs, there are {gpus:g}; lower "
                "scaling.actor_gpus or scaling.learner_gpus (0 runs on CPUs)"
            )
        for workers in self.workers:
            fit = sum(workers.fit_on(node) for node in nodes)
            if fit < workers.count:
                one = workers.kind.removesuffix("s")
                share = f"{workers.cpus:g} CPUs and {workers.gpus:g} GPUs"
                where = f" with scaling.{one}_labels={dict(workers.labels)}" if workers.labels else ""
                raise UserError(
                    f"scaling.{workers.kind}={workers.count}: {fit} fit on the {len(nodes)} nodes{where}, each taking "
                    f"{share} of one node; lower scaling.{workers.kind}, scaling.{one}_cpus or scaling.{one}_gpus, or "
                    "see what the nodes have: ray list nodes --detail"
                )
        self._check_room_for_learners(nodes)

    def _check_room_for_learners(self, nodes: Sequence[Node]) -> None:
        """Actors start first, and Ray deals them to the nodes in turn: do learners find room in what is left?"""
        actors, *others = self.workers
        for learners in others:
            fit = sum(learners.fit_on(node) for node in actors.spread_over(nodes, sparing=learners))
            if fit < learners.count:
                raise UserError(
                    f"scaling.learners={learners.count}: {fit} find room once {actors.count} rollout actors are spread "
                    f"over the {len(nodes)} nodes; keep them apart by scaling.actor_labels={{role: rollout}} "
                    "scaling.learner_labels={role: learner} (ray start --labels role=...), or lower scaling.actors"
                )


def _selects(wanted: str, label: str | None) -> bool:
    """Does a label have the wanted value: one, ``in(a, b)``, or neither, after ``!``?"""
    if wanted.startswith("!"):
        return not _selects(wanted[1:], label)
    values = wanted[3:-1].split(",") if wanted.startswith("in(") else [wanted]
    return label in [value.strip() for value in values]


@contextlib.contextmanager
def ray_session(scaling: ScalingConfig, plan: ResourcePlan, patience_s: float = 0.0) -> Iterator[None]:
    """Join the cluster of ``scaling.address`` (or of a submitted job), or start Ray on this machine for the time.

    Args:
        scaling: where it is.
        plan: what the job needs of it.
        patience_s: how long to wait for nodes that the plan needs.

    Raises:
        UserError: when the plan does not fit or the cluster cannot be reached.
    """
    address = scaling.address or os.environ.get("RAY_ADDRESS")
    local = address is None
    if address is not None and "://" in address and not address.startswith("ray://"):
        raise UserError(
            f"scaling.address={address!r} (or RAY_ADDRESS): expected auto, or the HOST:6379 that 'ray start --head' "
            "prints; the dashboard's address is for jobs, in RAY_API_SERVER_ADDRESS"
        )
    if local:
        # It keeps what it knows of the newest 100,000 tasks, and grows for days until it has them.
        os.environ.setdefault("RAY_task_events_max_num_task_in_gcs", "10000")
        plan.check([Node(os.cpu_count() or 1, torch.cuda.device_count(), {})])
    # Simulators and BLAS would each start a thread per core in every process.
    stopping = signal.getsignal(signal.SIGTERM)
    env_vars = {name: "1" for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")}
    try:
        context = ray.init(
            address=address or "local",  # not a cluster that happens to run on this machine
            num_cpus=os.cpu_count() if local else None,
            logging_level=logging.WARNING,
            log_to_driver=False,
            configure_logging=True,
            runtime_env={"env_vars": env_vars | {"PYTHONPATH": _python_path()}},
        )
    except ConnectionError as error:
        raise UserError(
            f"scaling.address={address!r}: no Ray cluster answers there ({first_line(error)}); start one: ray start "
            "--head"
        ) from error
    if callable(stopping) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stopping)  # Ray has put its own in the place of the caller's
    asked = os.environ.get(API_SERVER)
    # Else the processes of a local session would ask the machine's cluster about each other, if there is one.
    if local and context.dashboard_url:
        os.environ[API_SERVER] = f"http://{context.dashboard_url}"
    try:
        if not local:
            _check_cluster(plan, patience_s)
        yield
    finally:
        ray.shutdown()
        os.environ.pop(API_SERVER, None)
        if asked is not None:
            os.environ[API_SERVER] = asked


def _check_cluster(plan: ResourcePlan, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while True:
        living = [node for node in ray.nodes() if node["Alive"]]
        try:
            return plan.check([node_of(node["Resources"], node["Labels"]) for node in living])
        except UserError:
            if time.monotonic() > deadline:
                raise
        time.sleep(1.0)


def spawn(actor_class: Any, *args: Any, name: str | None = None) -> Any:
    """Start one actor on the driver's node: the job needs it as it needs its driver, and other nodes may leave.

    (Type checkers do not see the ``remote`` that Ray gives to a class.)
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return actor_class.options(name=name, scheduling_strategy=here).remote(*args)


def start_actors(actor_class: Any, scaling: ScalingConfig, *args: Any) -> tuple[list[Any], list[Any]]:
    """One actor per index, with its share of CPUs and GPUs.

    Returns:
        The actors that are ready, at least ``scaling.min_actors`` of them, and those that wait for a node with room.

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
    # An actor whose task crashes when it is made starts again without it.
    awake = {actor.awake.options(max_task_retries=3).remote(): actor for actor in actors}
    ready, waiting = ray.wait(list(awake), num_returns=scaling.needed_actors, timeout=scaling.wait_timeout_s)
    if len(ready) < scaling.needed_actors:
        raise UserError(
            f"scaling.wait_timeout_s={scaling.wait_timeout_s:g}: {len(ready)} of {scaling.needed_actors} rollout "
            "actors started within it; see what is taken and by whom, and whether they died: ray status, ray list "
            "actors --detail, and the logs in /tmp/ray/session_latest/logs"
        )
    try:
        ray.get(ready, timeout=scaling.wait_timeout_s)
        ray.get(awake[ready[0]].check_policy.remote(), timeout=scaling.wait_timeout_s)
    except UserError as error:  # Ray adds the traceback of the actor
        raise getattr(error, "cause", error) from None
    except ray.exceptions.RayActorError as error:
        raise UserError(f"a rollout actor could not start:\n{error}") from error
    return [awake[reference] for reference in ready], [awake[reference] for reference in waiting]


def node_of(resources: Mapping[str, float], labels: Mapping[str, str]) -> Node:
    """A node as Ray lists it."""
    return Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0), labels)


def dashboard_address() -> str:
    """Where a running cluster answers over HTTP."""
    return os.environ.get(API_SERVER, "http://127.0.0.1:8265")


def living_nodes(address: str) -> list[Any]:
    """The nodes of the cluster whose dashboard is there, with their resources. Ray raises various errors if none is."""
    from ray.util.state import list_nodes

    return list(list_nodes(address=address, filters=[("state", "=", "ALIVE")], timeout=30))


def _python_path() -> str:
    """Workers import the project's packages from where the driver does, and what is on its own path."""
    project = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return os.pathsep.join([project, *filter(None, [os.environ.get("PYTHONPATH")])])
