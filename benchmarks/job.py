"""A training job in a process of its own, as a user starts it, for benchmarks that watch or disturb it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from actors.journal import read_journal
from ript_ray.config import Config, resolve, save_config
from ript_ray.data.lines import read_json_lines
from ript_ray.envs import make
from ript_ray.errors import UserError
from ript_ray.policies.checkpoints import load_shape
from ript_ray.reporting import progress_bar

_ROOT = Path(__file__).parents[1]
TIMEOUT_S = 300.0
"""Longest wait for a job to start, to get on or to recover."""
_LOOK_EVERY_S = 0.5


class Job:
    """A training job, and what its files say of it."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.folder = folder
        run = config.run.model_copy(update={"dir": str(folder)})
        config = config.model_copy(update={"run": run})
        self._goal = config.train.updates
        file = folder.with_suffix(".yaml")
        save_config(config, file)
        self._process = _launch("train", "--config", str(file))

    @property
    def pid(self) -> int:
        """Of the driver."""
        return self._process.pid

    @property
    def result(self) -> dict[str, Any] | None:
        """The summary, once the job has finished."""
        file = self.folder / "summary.json"
        if not self.has_ended() or not file.exists():
            return None
        summary: dict[str, Any] = json.loads(file.read_text())
        return summary

    def updates(self) -> int:
        """That it has learnt so far."""
        return sum("learner/steps" in row for row in read_json_lines(self.folder / "metrics.jsonl"))

    def played(self) -> list[int]:
        """Numbers of the episodes in the journal."""
        return [entry["number"] for entry in read_journal(self.folder) if entry["kind"] == "played"]

    def wait(self, until: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> bool:
        """Wait for something, or for the end of the job; whether it came within the time limit."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if until() or self.has_ended():
                return True
            time.sleep(0.05)
        return False

    def finish(self, timeout_s: float) -> dict[str, Any]:
        """Its summary, with a progress bar until then; it is stopped if it has not finished within the time limit.

        Raises:
            UserError: when there is none.
        """
        deadline = time.monotonic() + timeout_s
        with progress_bar(self._goal, f"the job in {self.folder}", unit="update") as bar:
            while not self.has_ended() and time.monotonic() < deadline:
                bar.update(self.updates() - bar.n)
                time.sleep(_LOOK_EVERY_S)
            bar.update(self.updates() - bar.n)
        self.stop()
        if self.result is None:
            raise UserError(
                f"the job failed, or did not finish within bench.job_timeout_s; see {self.folder / 'run.log'}"
            )
        return self.result

    def stop(self) -> None:
        """End it if it has not ended."""
        if not self.has_ended():
            self._process.terminate()
            try:
                self._process.wait(timeout=TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def has_ended(self) -> bool:
        """Has the driver ended, one way or the other?"""
        return self._process.poll() is not None

    def resume(self) -> None:
        """Start it again."""
        self._process = _launch("train", "--resume", str(self.folder))

    def find(self, title: str) -> int | None:
        """A process with this title, of the job or of the cluster that this process has made for it."""
        return next(processes(title), None) if title else self.pid


def processes(title: str) -> Iterator[int]:
    """Those with this title among all that this process has started, and they in turn."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if title in " ".join(child.cmdline()):
                yield child.pid


def new_folder(config: Config, name: str) -> Path:
    """Where a benchmark leaves its files, ``run.dir`` or ``runs/<name>``.

    Raises:
        UserError: when it is there already.
    """
    folder = Path(config.run.dir or f"runs/{name}").resolve()
    if folder.exists():
        raise UserError(f"run.dir={str(folder)!r} is there already; choose another, or remove it")
    folder.mkdir(parents=True)
    return folder


def with_start(config: Config, folder: Path) -> Config:
    """The configuration with a policy to start from, made on the spot if the configured one is not of this environment.

    Raises:
        UserError: when none can be made, or there is none where the configuration says.
    """
    if _fits(config):
        return config
    demos, policy = folder / "demos.safetensors", folder / "start"
    data = config.data.model_copy(update={"demos": str(demos)})
    sft = config.sft.model_copy(update={"output": str(policy)})
    start = config.policy.model_copy(update={"checkpoint": str(policy)})
    for command in ("demos", "sft"):
        run = config.run.model_copy(update={"dir": str(folder / command)})
        update = {"data": data, "sft": sft, "run": run}
        save_config(config.model_copy(update=update), folder / f"{command}.yaml")
        process = _launch(command, "--config", str(folder / f"{command}.yaml"))
        try:
            failed = process.wait(timeout=config.bench.job_timeout_s) != 0
        except subprocess.TimeoutExpired:
            process.terminate()
            failed = True
        if failed:
            raise UserError(f"no starting policy: python launch.py {command} --config {folder / command}.yaml fails")
    return config.model_copy(update={"data": data, "sft": sft, "policy": start})


def _fits(config: Config) -> bool:
    """Does the policy take what the environment has?"""
    transform = load_shape(resolve(config.policy.checkpoint)).transform
    world = make(config.env.ids[0], config.env.image_size, config.env.max_steps)
    try:
        transform.check_sizes(world.id, world.state_dim, world.action_dim)
    except UserError:
        return False
    finally:
        world.close()
    return True


def _launch(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "launch.py", *arguments]
    return subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
