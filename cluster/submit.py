"""Send a training job to a running cluster, after what can be checked from here has been checked."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Any

from cluster.session import ResourcePlan, dashboard_address, living_nodes, node_of
from ript_ray.config import Config
from ript_ray.errors import UserError

PROJECT = Path(__file__).parents[1]


def submit(config: Config, config_file: Path, settings: list[str]) -> dict[str, Any]:
    """Send ``train`` with a configuration to the cluster whose dashboard is at ``RAY_API_SERVER_ADDRESS``.

    Args:
        config: as the job will read it.
        config_file: inside the project, which travels with the job.
        settings: ``section.key=value`` of the command line.

    Returns:
        ``job``, its identifier, and ``command``, what it runs.

    Raises:
        UserError: when the job could not run there, or nobody answers.
    """
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    file = _inside(config_file)
    if config.run.dir is None or not Path(config.run.dir).is_absolute():
        raise UserError(
            f"run.dir={config.run.dir!r}: a job's own folder is deleted when it ends; expected an absolute path on the "
            "cluster's head, for example run.dir=/var/runs/first"
        )
    # Ray tells of every ignore file that it reads.
    logging.getLogger("ray").setLevel(logging.ERROR)
    address = dashboard_address()
    try:
        client = JobSubmissionClient(address)
        nodes = living_nodes(address)
    except (ConnectionError, RuntimeError, OSError, RayError) as error:
        raise UserError(
            f"no Ray cluster answers at {address} ({str(error).strip().splitlines()[0]}); start one with 'ray start "
            "--head', or set RAY_API_SERVER_ADDRESS to the address of its dashboard; if it asks for a token, set "
            "RAY_AUTH_MODE=token"
        ) from error
    ResourcePlan.of(config.scaling).check([node_of(node.resources_total or {}, node.labels or {}) for node in nodes])
    words = ["python", "launch.py", "train", "--config", file, *settings]
    if not config.run.resume:
        words.append("run.resume=true")  # so that the same job, sent again, goes on
    job = client.submit_job(
        entrypoint=shlex.join(words),
        runtime_env={"working_dir": str(PROJECT)},
        metadata={"run": config.run.dir, "env": config.env.id},
    )
    print(f"sent to {len(nodes)} nodes at {address} as {job}")
    print(f"  follow: ray job logs --follow {job}    stop: ray job stop {job}    go on: the same command again")
    return {"job": job, "command": shlex.join(words), "nodes": len(nodes)}


def _inside(file: Path) -> str:
    """A file's path in the project."""
    try:
        return str(file.resolve().relative_to(PROJECT))
    except ValueError as error:
        raise UserError(
            f"--config {file}: only files inside {PROJECT} travel with the job; copy it into configs/"
        ) from error
