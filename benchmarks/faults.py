"""Faults, really injected while a job runs: does it go on, does it lose anything, does it end the same, how soon?

A small job is run once without disturbance. Then it is run again, as often as it takes, while its processes are killed
in turn, or find that no file can be written; where the job itself ends, it is resumed once. Other faults are injected
into a cluster of three nodes: one is lost and another joins, or somebody else fills the object store. All runs must end
with the weights of the first.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actors.journal import journal_holds, work_done
from benchmarks.job import Job, new_folder, processes, with_start
from benchmarks.nodes import Nodes
from ript_ray.config import Config
from ript_ray.reporting import progress_bar, write_json

_MAX_RESUMES = 3
"""Of a job that ends again and again without a fault of ours."""


def _kill(pid: int, nodes: Nodes | None) -> None:
    os.kill(pid, signal.SIGKILL)


def _terminate(pid: int, nodes: Nodes | None) -> None:
    os.kill(pid, signal.SIGTERM)


def _hang(pid: int, nodes: Nodes | None) -> None:
    os.kill(pid, signal.SIGSTOP)


def _refuse_writes(pid: int, nodes: Nodes | None) -> None:
    """From now on no file that the process writes can grow, as if the disk were full."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))


def _replace_node(role: str) -> Callable[[int, Nodes | None], None]:
    def strike(pid: int, nodes: Nodes | None) -> None:
        assert nodes is not None
        nodes.leave(role)
        nodes.join(role)

    return strike


def _fill_object_store(pid: int, nodes: Nodes | None) -> None:
    assert nodes is not None
    nodes.fill()


@dataclass(frozen=True, slots=True)
class _Fault:
    """Something that happens to a process of a job."""

    victim: str
    """How the process is called; the driver if it is not."""
    strike: Callable[[int, Nodes | None], None] = _kill
    rendering: bool = False
    """When frames for training are wanted, instead of after some episodes."""
    ends_victim: bool = True


FAULTS = {
    "rollout actor killed": _Fault("ray::RolloutActor"),
    "rollout actor killed while it renders": _Fault("ray::RolloutActor", rendering=True),
    "sample pool killed": _Fault("ray::SamplePool"),
    "learner killed": _Fault("ray::RayTrainWorker"),
    "disk full during a checkpoint": _Fault("ray::RayTrainWorker", _refuse_writes),
    "disk full for an episode": _Fault("ray::RolloutActor", _refuse_writes),
    "disk full for the journal": _Fault("ray::Coordinator", _refuse_writes),
    "weight store killed": _Fault("ray::WeightStore"),
    "train controller killed": _Fault("ray::TrainController"),
    "coordinator killed": _Fault("ray::Coordinator"),
    "raylet killed": _Fault("raylet/raylet"),
    "rollout actor hangs": _Fault("ray::RolloutActor", _hang),
    "sample pool hangs": _Fault("ray::SamplePool", _hang),
    "learner hangs": _Fault("ray::RayTrainWorker", _hang),
    "weight store hangs": _Fault("ray::WeightStore", _hang),
    "train controller hangs": _Fault("ray::TrainController", _hang),
    "coordinator hangs": _Fault("ray::Coordinator", _hang),
    "driver killed": _Fault(""),
    "driver terminated": _Fault("", _terminate),
}
"""That a job on one machine meets."""
CLUSTER_FAULTS = {
    "node of the rollout actors lost": _Fault("ray::RolloutActor", _replace_node("rollout")),
    "node of the learner lost": _Fault("ray::RayTrainWorker", _replace_node("learner")),
    "object store full": _Fault("", _fill_object_store, ends_victim=False),
}
"""That a job on a cluster meets."""


@dataclass(slots=True)
class _Injection:
    fault: str
    recovered: bool = False
    resumed: bool = False
    """By a command, since the job itself had ended."""
    lost: int = 0
    """Episodes that were played and noted, and played again."""
    seconds: float = 0.0
    """Until another process was in its place and something new was played or learnt."""


def measure(config: Config) -> dict[str, Any]:
    """Inject ``bench.injections`` faults, all kinds in turn, and tell for each kind what became of the job.

    Args:
        config: of the job, see ``configs/faults.yaml``; ``run.dir`` takes its files.

    Raises:
        UserError: when the job fails without any fault.
    """
    folder = new_folder(config, "faults")
    config = with_start(config, folder)
    undisturbed = Job(config, folder / "undisturbed").finish(config.bench.job_timeout_s)
    session = _Session(folder, undisturbed["weights_sha256"], random.Random(config.run.seed))
    kinds = [*FAULTS, *CLUSTER_FAULTS]
    names = [kinds[i % len(kinds)] for i in range(config.bench.injections)]
    session.run(config, [name for name in names if name in FAULTS])
    if clustered := [name for name in names if name in CLUSTER_FAULTS]:
        nodes = Nodes()
        try:
            session.run(nodes.placed(config), clustered, nodes)
        finally:
            nodes.close()
    return session.result()


class _Session:
    """Jobs that are run and disturbed, and what became of them.

    Args:
        folder: takes the files of all.
        expected: fingerprint of the weights that they should end with.
        rng: decides after how many episodes a fault comes.
    """

    def __init__(self, folder: Path, expected: str, rng: random.Random) -> None:
        self._folder = folder
        self._expected = expected
        self._rng = rng
        self._injections: list[_Injection] = []
        self._same: list[bool] = []
        """For each job, whether it ended with the expected weights."""

    def run(self, config: Config, names: Sequence[str], nodes: Nodes | None = None) -> None:
        """Run jobs until each of these faults was injected, in this order."""
        remaining = deque(names)
        bar = progress_bar(len(names), "faults", unit="fault")
        while remaining:
            job = Job(config, self._folder / f"run-{len(self._same)}")
            resumed = 0
            while job.result is None and resumed < _MAX_RESUMES:
                if job.has_ended():
                    resumed += 1
                    job.resume()
                elif not remaining:
                    if not job.wait(job.has_ended, config.bench.job_timeout_s):
                        break  # it hangs
                elif (injection := _inject(job, remaining[0], self._rng, nodes)) is not None:
                    self._injections.append(injection)
                    remaining.popleft()
                    bar.set_description(f"{injection.fault}: {injection.seconds:.0f} s", refresh=False)
                    bar.update()
                    write_json(self._folder / "faults.json", self.result())
                    if not injection.recovered:
                        break  # it hangs, or one command did not do
            self._same.append(job.result is not None and job.result["weights_sha256"] == self._expected)
            job.stop()
            write_json(self._folder / "faults.json", self.result())
        bar.close()

    def result(self) -> dict[str, Any]:
        """What happened so far."""
        return {
            "benchmark": "faults",
            "table": _table(self._injections),
            "injected": len(self._injections),
            "survived": sum(injection.recovered for injection in self._injections),
            "trajectories_lost": sum(injection.lost for injection in self._injections),
            "runs": len(self._same),
            "runs_with_the_undisturbed_weights": sum(self._same),
            "injections": [asdict(injection) for injection in self._injections],
        }


def _inject(job: Job, name: str, rng: random.Random, nodes: Nodes | None) -> _Injection | None:
    """Wait until the job gets on, hit it, and wait until it gets on again; None if it had finished before."""
    fault = (FAULTS | CLUSTER_FAULTS)[name]
    collections = journal_holds(job.folder, "collected")
    goal = work_done(job.folder) + rng.randint(1, 20)
    victim: int | None = None

    def is_time() -> bool:
        nonlocal victim
        if fault.rendering and journal_holds(job.folder, "collected") <= collections:
            return False
        if not fault.rendering and work_done(job.folder) < goal:
            return False
        victim = job.find(fault.victim)
        return victim is not None

    job.wait(is_time)
    if job.has_ended() or victim is None:
        return None
    injection = _Injection(name)
    before = job.played()
    known = set(processes(fault.victim)) if fault.victim else set()
    started = time.monotonic()
    fault.strike(victim, nodes)
    if not fault.victim and fault.ends_victim:
        job.wait(job.has_ended)
    while not injection.recovered:
        if job.result is not None:
            injection.recovered = True
        elif not job.has_ended():
            replaced = not fault.ends_victim or job.wait(lambda: not known.issuperset(processes(fault.victim)))
            injection.recovered = replaced and _gets_on(job)
            if not injection.recovered and not job.has_ended():  # it hangs
                break
        elif injection.resumed:  # one command must do
            break
        else:
            injection.resumed = True
            job.resume()
    injection.seconds = time.monotonic() - started
    if nodes is not None:
        nodes.drain()
    now = job.played()
    injection.lost = len(now) - len(set(now)) + len(set(before) - set(now))
    return injection


def _gets_on(job: Job) -> bool:
    """Is something played or learnt from now on?"""
    done = work_done(job.folder)
    return job.wait(lambda: work_done(job.folder) > done) and work_done(job.folder) > done


def _table(injections: list[_Injection]) -> list[dict[str, Any]]:
    rows = []
    for fault in dict.fromkeys(injection.fault for injection in injections):
        own = [injection for injection in injections if injection.fault == fault]
        seconds = sorted(injection.seconds for injection in own)
        rows.append(
            {
                "fault": fault,
                "injected": len(own),
                "recovered": sum(injection.recovered for injection in own),
                "by_a_command": sum(injection.resumed for injection in own),
                "trajectories_lost": sum(injection.lost for injection in own),
                "seconds_to_recover": {"median": seconds[len(seconds) // 2], "max": seconds[-1]},
            }
        )
    return rows
