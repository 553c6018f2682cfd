"""Faults, really injected while a job runs: does it go on, does it lose anything, does it end the same, how soon?

A small job is run once without disturbance. Then it is run again, as often as it takes, while its processes are killed
in turn; where the job itself ends, it is resumed once. All runs must end with the weights of the first.
"""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import asdict, dataclass
from typing import Any

from actors.journal import work_done
from benchmarks.job import Job, new_folder, with_start
from ript_ray.config import Config
from ript_ray.errors import UserError
from ript_ray.reporting import write_json

FAULTS: dict[str, tuple[str, signal.Signals]] = {
    "rollout actor killed": ("ray::RolloutActor", signal.SIGKILL),
    "sample pool killed": ("ray::SamplePool", signal.SIGKILL),
    "learner killed": ("ray::RayTrainWorker", signal.SIGKILL),
    "weight store killed": ("ray::WeightStore", signal.SIGKILL),
    "train controller killed": ("ray::TrainController", signal.SIGKILL),
    "coordinator killed": ("ray::Coordinator", signal.SIGKILL),
    "raylet killed": ("raylet/raylet", signal.SIGKILL),
    "driver killed": ("", signal.SIGKILL),
    "driver terminated": ("", signal.SIGTERM),
}
"""How the process is called, the driver if it is not, and the signal that it gets."""


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
    undisturbed = Job(config, folder / "undisturbed")
    undisturbed.wait(undisturbed.has_ended)
    if undisturbed.result is None:
        raise UserError(f"the job fails without any fault; see {undisturbed.folder / 'run.log'}")
    expected = undisturbed.result["weights_sha256"]
    rng = random.Random(config.run.seed)
    names = list(FAULTS)
    injections: list[_Injection] = []
    same: list[bool] = []
    while len(injections) < config.bench.injections:
        job = Job(config, folder / f"run-{len(same)}")
        while job.result is None:
            if len(injections) < config.bench.injections:
                injection = _inject(job, names[len(injections) % len(names)], rng)
                injections += [injection] if injection is not None else []
            elif not job.wait(job.has_ended):
                break
            elif job.result is None:
                job.resume()
        same.append(job.result is not None and job.result["weights_sha256"] == expected)
        result = {
            "benchmark": "faults",
            "table": _table(injections),
            "injected": len(injections),
            "survived": sum(injection.recovered for injection in injections),
            "trajectories_lost": sum(injection.lost for injection in injections),
            "runs": len(same),
            "runs_with_the_undisturbed_weights": sum(same),
            "injections": [asdict(injection) for injection in injections],
        }
        write_json(folder / "faults.json", result)
    return result


def _inject(job: Job, fault: str, rng: random.Random) -> _Injection | None:
    """Wait until the job gets on, hit it, and wait until it gets on again; None if it had finished before."""
    title, how = FAULTS[fault]
    goal = work_done(job.folder) + rng.randint(1, 20)
    pid: list[int | None] = [None]

    def there() -> bool:
        pid[0] = job.find(title)
        return pid[0] is not None and work_done(job.folder) >= goal

    job.wait(there)
    if job.has_ended() or pid[0] is None:
        return None
    injection = _Injection(fault)
    before = job.played()
    started = time.monotonic()
    os.kill(pid[0], how)
    if not title:
        job.wait(job.has_ended)
    while not injection.recovered:
        if job.result is not None:
            injection.recovered = True
        elif not job.has_ended():
            injection.recovered = job.wait(lambda: job.find(title) not in (None, pid[0])) and _gets_on(job)
            if not injection.recovered and not job.has_ended():  # it hangs
                return injection
        elif injection.resumed:  # one command must do
            return injection
        else:
            injection.resumed = True
            job.resume()
    injection.seconds = time.monotonic() - started
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
