"""Send a training job to a running cluster, after what can be checked from here has been checked."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Any

from cluster.session import ResourcePlan, dashboard_address, living_nodes, node_of
from ript_ray.config import Config, resolve
from ript_ray.errors import UserError, first_line

PROJECT = Path(__file__).parents[1]
_MOST_SENT = 100e6
"""Bytes of a checkpoint that may travel with a job."""
_STOP_S = "60"
"""That a stopped job has for its last checkpoint and copies; Ray's own 3 s cut that short."""


def submit(config: Config, config_file: Path, settings: list[str]) -> dict[str, Any]:
    """Send ``train`` with a configuration to the cluster whose dashboard is at ``RAY_API_SERVER_ADDRESS``.

    Args:
        config: as the job will read it.
        config_file: in the project's ``configs``, which travels with the job.
        settings: ``section.key=value`` of the command line.

    Returns:
        ``job``, its identifier, and ``command``, what it runs.

    Raises:
        UserError: when the job could not run there, or nobody answers.
    """
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    file = _inside(config_file)
    excludes = _left_here(config.policy.checkpoint)
    if config.scaling.actors == 0:
        raise UserError("scaling.actors=0 measures one machine alone; on a cluster give the number of actors")
    check_run_dir(config.run.dir)
    if config.run.storage and "://" not in config.run.storage and not Path(config.run.storage).is_absolute():
        raise UserError(
            f"run.storage={config.run.storage!r}: a job's own folder is deleted when it ends; expected a URL or an "
            "absolute path"
        )
    if config.data.demo_share > 0 and not Path(config.data.demos).is_absolute():
        raise UserError(
            f"data.demos={config.data.demos!r}: demonstrations do not travel with the job; expected the absolute path "
            "that they have on the cluster's head"
        )
    # Ray tells of every ignore file that it reads.
    logging.getLogger("ray").setLevel(logging.ERROR)
    address = dashboard_address()
    try:
        client = JobSubmissionClient(address)
        nodes = living_nodes(address)
    except (ConnectionError, RuntimeError, OSError, RayError) as error:
        raise UserError(
            f"no Ray cluster answers at {address} ({first_line(error)}); start one with 'ray start "
            "--head', or set RAY_API_SERVER_ADDRESS to the address of its dashboard; if it asks for a token, set "
            "RAY_AUTH_MODE=token"
        ) from error
    ResourcePlan.of(config.scaling).check([node_of(node.resources_total or {}, node.labels or {}) for node in nodes])
    words = ["python", "launch.py", "train", "--config", file, *settings]
    if not config.run.resume:
        words.append("run.resume=true")  # so that the same job, sent again, goes on
    try:
        job = client.submit_job(
            entrypoint=shlex.join(words),
            runtime_env={
                "working_dir": str(PROJECT),
                "excludes": excludes,
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": _STOP_S},
            },
            metadata={"run": config.run.dir, "env": config.env.id},
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(
            f"the cluster at {address} did not take the job: {first_line(error)}; if {PROJECT} holds "
            "large files, name them in .rayignore"
        ) from error
    print(f"sent to {len(nodes)} nodes at {address} as {job}")
    print(f"  follow: ray job logs --follow {job}    stop: ray job stop {job}    go on: the same command again")
    return {"job": job, "command": shlex.join(words), "nodes": len(nodes)}


def check_run_dir(run_dir: str | None) -> None:
    """Raise `UserError` when a job's run would not outlive it."""
    if run_dir is None or not Path(run_dir).is_absolute():
        raise UserError(
            f"run.dir={run_dir!r}: a job's own folder is deleted when it ends; expected an absolute path on the "
            "cluster's head, for example run.dir=/var/runs/first"
        )


def _inside(file: Path) -> str:
    """A configuration's path in the project, where it travels with the job."""
    try:
        path = file.resolve().relative_to(PROJECT / "configs")
    except ValueError as error:
        raise UserError(
            f"--config {file}: expected a file inside {PROJECT / 'configs'}, which travels with the job; copy it there"
        ) from error
    return str(Path("configs") / path)


def _left_here(checkpoint: str) -> list[str]:
    """The policies of the project's folder that the job does not need, as patterns for Ray."""
    policies = PROJECT / "checkpoints"
    needed = None if Path(checkpoint).is_absolute() else resolve(checkpoint).resolve()
    if needed is not None:
        if not needed.is_relative_to(policies) or not needed.is_dir():
            raise UserError(
                f"policy.checkpoint={checkpoint!r}: only folders inside {policies} travel with the job; copy it there, "
                "or give the absolute path that it has on the cluster's head"
            )
        if (size := sum(file.stat().st_size for file in needed.rglob("*") if file.is_file())) > _MOST_SENT:
            raise UserError(
                f"policy.checkpoint={checkpoint!r}: {size / 1e6:.0f} MB are too much to send with a job; copy it to "
                "the cluster's head and give its absolute path there"
            )
    others = [folder for folder in policies.glob("*") if needed is None or not needed.is_relative_to(folder)]
    return [f"/checkpoints/{folder.name}" for folder in others]
