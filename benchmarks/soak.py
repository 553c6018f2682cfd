"""Days of training in minutes: does anything grow that should not?

A job of an environment of microseconds makes as many updates as the default job does in a day. Meanwhile the memory
and the open files of each of its processes are read, and what is taken of the machine's shared memory, where the
object store lives. What is told is the slope of the second half, in which nothing is filled for the first time.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil

from benchmarks.job import Job, new_folder, with_start
from ript_ray.config import Config
from ript_ray.errors import UserError
from ript_ray.reporting import progress_bar, write_json
from ript_ray.watchdog import private_mb

UPDATES_PER_HOUR = 3 * 60 / 18
"""Of the default job on two cores, which makes three in 18 minutes (docs/learning.md)."""
_EVERY_S = 1.0
_FEWEST_UPDATES = 20


@dataclass(frozen=True, slots=True)
class _Sample:
    update: int
    memory_mb: float
    files: int


def measure(config: Config) -> dict[str, Any]:
    """Train for ``bench.soak_updates`` updates and tell how fast each process grows.

    Args:
        config: of the job, see ``configs/faults.yaml``; ``run.dir`` takes its files.

    Raises:
        UserError: when the job fails, or is too short to tell anything.
    """
    updates = config.bench.soak_updates
    if updates < _FEWEST_UPDATES:
        raise UserError(f"bench.soak_updates={updates}: expected at least {_FEWEST_UPDATES}, to see a slope")
    folder = new_folder(config, "soak")
    config = with_start(config, folder)
    config = config.model_copy(update={"train": config.train.model_copy(update={"updates": updates})})
    began = time.monotonic()
    job = Job(config, folder / "job")
    processes: dict[int, list[_Sample]] = defaultdict(list)
    names: dict[int, str] = {}
    shared: list[_Sample] = []
    with progress_bar(updates, "soak", unit="update") as bar:
        while not job.has_ended() and time.monotonic() - began < config.bench.job_timeout_s:
            done = job.updates()
            for process, name, sample in _processes(job.pid, done):
                processes[process].append(sample)
                names[process] = name
            shared.append(_Sample(done, psutil.disk_usage("/dev/shm").used / 1e6, 0))
            bar.update(done - bar.n)
            time.sleep(_EVERY_S)
    summary = job.finish(0.0)
    half = updates // 2  # and not what comes once, at the end: comparing updates, evaluation, pictures
    lasting = {
        f"{names[process]} {process}": [sample for sample in samples if half <= sample.update < updates]
        for process, samples in processes.items()
        if samples[0].update < half and samples[-1].update >= updates - 2
    }
    told = {name: _told(samples) for name, samples in sorted(lasting.items())}
    result = {
        "benchmark": "soak",
        "updates": updates,
        "hours_of_the_default_job": updates / UPDATES_PER_HOUR,
        "episodes": summary["episodes"],
        "seconds": time.monotonic() - began,
        "processes": told,
        "shared_memory": _told([sample for sample in shared if half <= sample.update < updates]),
        "worst_mb_per_hour": max(row["mb_per_hour"] for row in told.values()),
    }
    write_json(folder / "soak.json", result)
    return result


def _processes(driver: int, update: int) -> list[tuple[int, str, _Sample]]:
    """All processes of a job with their names, as they are now."""
    found = []
    try:
        tree = [psutil.Process(driver), *psutil.Process(driver).children(recursive=True)]
    except psutil.Error:
        return []
    for process in tree:
        try:
            words = process.cmdline()
            if process.pid == driver:
                name = "driver"
            elif words and words[0].startswith("ray::"):
                name = words[0].removeprefix("ray::")
            else:
                name = process.name()
            sample = _Sample(update, private_mb(process.pid), process.num_fds())
        except psutil.Error:  # it has just ended
            continue
        found.append((process.pid, name.partition(".")[0], sample))
    return found


def _told(samples: list[_Sample]) -> dict[str, float]:
    """Where memory and open files ended, and how much of each came with an hour of the default job."""
    updates = np.array([sample.update for sample in samples], dtype=float)
    memory = np.array([sample.memory_mb for sample in samples])
    files = np.array([sample.files for sample in samples], dtype=float)
    return {
        "mb": float(np.median(memory[-10:])),
        "mb_per_hour": float(np.polyfit(updates, memory, 1)[0]) * UPDATES_PER_HOUR,
        "files": float(np.median(files[-10:])),
        "files_per_hour": float(np.polyfit(updates, files, 1)[0]) * UPDATES_PER_HOUR,
    }
