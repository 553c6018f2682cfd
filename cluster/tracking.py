"""MLflow: parameters, metrics and artifacts of a run, in a local store by default."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Tracker:
    """Logs rows of metrics to an MLflow run, from any thread.

    Args:
        run_id: of that run.
    """

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id

    def __call__(self, row: dict[str, Any]) -> None:
        """Log the numbers of a row at its update, unless they are there, from before the run was resumed."""
        import mlflow

        numbers = {k: float(v) for k, v in row.items() if isinstance(v, (int, float)) and k not in ("time", "update")}
        step = int(row.get("update", 0))
        known = mlflow.MlflowClient().get_metric_history(self._run_id, next(iter(numbers)))
        if not any(metric.step == step for metric in known):
            # Named: in another thread than the one that began it, no run is active, and MLflow would begin one.
            mlflow.log_metrics(numbers, step=step, run_id=self._run_id)

    def artifacts(self, run_dir: Path, acting: dict[str, float]) -> None:
        """Log the run's files, and the final policy as a model that can be loaded and asked for actions.

        Args:
            run_dir: holds configuration, summary, pictures, videos and checkpoints.
            acting: ``guidance`` and ``denoise_steps`` of the model.
        """
        import mlflow

        for file in sorted(run_dir.glob("*.*")):
            mlflow.log_artifact(str(file))
        checkpoints = sorted((run_dir / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
        if checkpoints:
            mlflow.pyfunc.log_model(
                name="policy",
                python_model=str(Path(__file__).with_name("served_policy.py")),
                artifacts={"policy": str(checkpoints[-1])},
                model_config=acting,
                pip_requirements=["ript-ray"],
            )


@contextlib.contextmanager
def tracking(uri: str | None, run_dir: Path, name: str, settings: dict[str, dict[str, Any]]) -> Iterator[Tracker]:
    """An MLflow run around a job; the same one again when the job is resumed.

    Args:
        uri: tracking server or store; by default an SQLite file next to the run directory.
        run_dir: names the run, and keeps its identifier in ``mlflow-run``.
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
    marker = run_dir / "mlflow-run"
    begun = marker.read_text().strip() if marker.exists() else None
    if begun and not _exists(begun):  # the run goes on where this store is not
        begun = None
    with mlflow.start_run(run_id=begun, experiment_id=identifier, run_name=run_dir.name) as run:
        if begun is None:
            marker.write_text(run.info.run_id + "\n")
            mlflow.log_params(
                {f"{section}.{key}": v for section, values in settings.items() for key, v in values.items()}
            )
        yield Tracker(run.info.run_id)


def _exists(run_id: str) -> bool:
    import mlflow

    try:
        mlflow.get_run(run_id)
    except mlflow.exceptions.MlflowException:
        return False
    return True
