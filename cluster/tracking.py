"""MLflow: parameters, metrics and artifacts of a run, in a local store by default."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Tracker:
    """Logs rows of metrics to the active MLflow run."""

    def log(self, row: dict[str, Any]) -> None:
        """Log the numbers of a row at its update."""
        import mlflow

        numbers = {k: float(v) for k, v in row.items() if isinstance(v, (int, float)) and k not in ("time", "update")}
        mlflow.log_metrics(numbers, step=int(row.get("update", 0)))

    def artifacts(self, run_dir: Path) -> None:
        """Log the run's files: configuration, summary, pictures, videos and the final policy."""
        import mlflow

        for file in sorted(run_dir.glob("*.*")):
            mlflow.log_artifact(str(file))
        checkpoints = sorted((run_dir / "checkpoints").glob("[0-9]*"))
        if checkpoints:
            mlflow.log_artifacts(str(checkpoints[-1]), "policy")


@contextlib.contextmanager
def tracking(uri: str | None, run_dir: Path, name: str, settings: dict[str, dict[str, Any]]) -> Iterator[Tracker]:
    """An MLflow run around a job.

    Args:
        uri: tracking server or store; by default an SQLite file next to the run directory.
        run_dir: names the run.
        name: the experiment.
        settings: the configuration, logged as parameters.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    store = run_dir.resolve().parent
    mlflow.set_tracking_uri(uri or f"sqlite:///{store / 'mlflow.db'}")
    experiment = mlflow.get_experiment_by_name(name)
    if experiment is None:
        artifacts = None if uri else (store / "mlflow-artifacts").as_uri()
        identifier = mlflow.create_experiment(name, artifact_location=artifacts)
    else:
        identifier = experiment.experiment_id
    with mlflow.start_run(experiment_id=identifier, run_name=run_dir.name):
        mlflow.log_params({f"{section}.{key}": v for section, values in settings.items() for key, v in values.items()})
        yield Tracker()
