"""Processes that hang, for real: they are killed, and whoever waits is told."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from cluster.heartbeats import Heartbeats
from cluster.monitor import Monitor
from ript_ray.config import ScalingConfig

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@ray.remote(num_cpus=0, max_concurrency=2)
class Worker:
    """Takes a while to start, and works for long."""

    def __init__(self, start_s: float = 0.0) -> None:
        time.sleep(start_s)

    def pid(self) -> int:
        return os.getpid()

    def work(self) -> None:
        time.sleep(600)

    def progress(self, seen: int) -> dict[str, Any]:
        return {"stage": "thinking", "done": 0, "expected": 1, "fraction": 0.0, "earlier": 0.0, "rows": []}

    def close(self) -> None:
        """As the coordinator has it."""


@ray.remote(num_cpus=0, max_concurrency=2)
class Babbler:
    """Says what nobody can show."""

    def work(self) -> None:
        time.sleep(600)

    def progress(self, seen: int) -> dict[str, Any]:
        return {"rows": []}

    def close(self) -> None:
        """As the coordinator has it."""


def test_only_the_one_that_hangs_is_killed() -> None:
    busy, slow, hung = Worker.remote(), Worker.remote(12.0), Worker.remote()
    working = busy.work.remote()
    pid = ray.get(hung.pid.remote(), timeout=60)
    hearts = Heartbeats({"busy": busy, "slow": slow, "hung": hung}, limit_s=5.0)
    # Until its first answer has come an actor counts as starting, however it hangs.
    faults = []
    for _ in range(15):
        faults += hearts.check()
        time.sleep(0.2)
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + 60
    while not faults and time.monotonic() < deadline:
        time.sleep(0.2)
        faults = hearts.check()
    assert faults == ["hung gave no sign of life for 5 s and was killed"]
    with pytest.raises(RayActorError):
        ray.get(hung.pid.remote(), timeout=60)
    for _ in range(20):
        time.sleep(0.2)
        assert hearts.check() == []
    ray.get([busy.pid.remote(), slow.pid.remote()], timeout=60)
    assert not ray.wait([working], timeout=0)[0]
    for actor in (busy, slow):
        ray.kill(actor)


def test_a_job_that_stands_still_is_told_so_whatever_it_waits_for() -> None:
    worker = Worker.remote()
    started = time.monotonic()
    with (
        pytest.raises(TimeoutError, match="nothing was played or learnt for 3 s; the job was at: thinking 0/1"),
        Monitor(worker, ScalingConfig(wait_timeout_s=3.0)),
    ):
        ray.get(worker.work.remote(), timeout=120)
    assert time.monotonic() - started < 60
    ray.kill(worker)


def test_a_job_does_not_go_on_without_its_monitor() -> None:
    babbler = Babbler.remote()
    started = time.monotonic()
    with pytest.raises(KeyError, match="stage"), Monitor(babbler, ScalingConfig()):
        ray.get(babbler.work.remote(), timeout=120)
    assert time.monotonic() - started < 60
    ray.kill(babbler)
