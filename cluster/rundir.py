"""Where a command leaves its files: a new run directory, or that of a run to go on with."""

from __future__ import annotations

import logging
import os
from datetime import datetime
from pathlib import Path

from cluster.storage import restore
from cluster.submit import check_run_dir
from ript_ray.config import LEARNING, Config, save_config
from ript_ray.errors import UserError
from ript_ray.reporting import make_folder
from ript_ray.runs import Run

log = logging.getLogger("ript_ray")

_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray for the driver of a submitted job."""
_JOB_RUNS = "/var/tmp/ript_ray"
"""Where runs of jobs go that name no folder: their own is deleted when they end."""


def new_run_dir(config: Config, command: str) -> Path:
    """Create the run directory of a command and write the resolved configuration into it.

    Raises:
        UserError: when it cannot be made, or holds another run.
    """
    in_job = _RAY_JOB in os.environ
    name = f"{command}-{datetime.now():%Y%m%d-%H%M%S}"
    run_dir = Path(config.run.dir) if config.run.dir else Path(_JOB_RUNS if in_job else "runs") / name
    if in_job:
        check_run_dir(str(run_dir))
    _refuse_finished(run_dir)
    if command == "train" and (run_dir / "journal.jsonl").exists():
        raise UserError(
            f"run.dir={str(run_dir)!r} holds a run that has not finished; go on with it: python launch.py train "
            f"--resume {run_dir}; or choose another directory"
        )
    if any((run_dir / name).exists() for name in ("journal.jsonl", "checkpoints")):
        raise UserError(f"run.dir={str(run_dir)!r} holds another run; choose another directory")
    make_folder(run_dir, "run.dir")
    save_config(config, run_dir / "config.yaml")
    _start_log(run_dir, command)
    return run_dir


def reopened_run_dir(run_dir: Path) -> Path:
    """The directory of a run that goes on.

    Raises:
        UserError: when it is finished.
    """
    if _RAY_JOB in os.environ:
        check_run_dir(str(run_dir))
    _refuse_finished(run_dir)
    _start_log(run_dir, "train, resumed")
    return run_dir


def run_to_go_on_with(config: Config) -> Run | None:
    """The run that is in ``run.dir``, or is brought there from ``run.storage``; None when there is none.

    Raises:
        UserError: when that run has other settings than these, except for where and how wide it runs.
    """
    if config.run.dir is None:
        raise UserError("run.resume=true without run.dir: expected the folder of the run to go on with")
    run_dir = Path(config.run.dir)
    if not (run_dir / "journal.jsonl").exists():
        if config.run.storage is None or not restore(config.run.storage, run_dir):
            return None
        print(f"{run_dir}: goes on from {config.run.storage}")
    run = Run.load(run_dir)
    changed = run.changed_by(config)
    other = [key for key in changed if key == "run.seed" or key.partition(".")[0] in LEARNING]
    if other:
        raise UserError(
            f"run.resume=true: the run in run.dir={str(run_dir)!r} has another {', '.join(other)}; give the same "
            "settings, or another run.dir"
        )
    return run


def _refuse_finished(run_dir: Path) -> None:
    if (run_dir / "summary.json").exists():
        raise UserError(f"run.dir={str(run_dir)!r} holds a finished run; choose another directory")


def _start_log(run_dir: Path, command: str) -> None:
    logging.basicConfig(
        filename=run_dir / "run.log", level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    log.info("%s in %s, configuration in config.yaml", command, run_dir)
