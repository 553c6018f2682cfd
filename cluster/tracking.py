"""MLflow: parameters, metrics and artifacts of a run, in a local store by default."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ript_ray.errors import UserError, first_line
from ript_ray.locks import take_lock
from ript_ray.reporting import write_text

log = logging.getLogger("ript_ray")

_CLOSE_S = 10.0
"""That a server has to take the last metrics when the run ends; a job that is stopped has not much longer."""
_ALONE_S = 60.0


class Tracker:
    """Logs rows of metrics to an MLflow run, in a thread of its own: who trains does not wait for a server.

    Rows that the server does not take are offered again with each later one, and at the end.

    Args:
        run_id: of that run.
    """

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._logged: dict[str, set[int]] = {}
        """Updates at which a metric is known to be there."""
        self._rows: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._loop, name="mlflow", daemon=True)
        self._thread.start()

    def __call__(self, row: dict[str, Any]) -> None:
        """Log the numbers of a row at its update, unless they are there, from before the run was resumed."""
        self._rows.put(row)

    def close(self) -> None:
        """Log what is left, as far as the server takes it in time."""
        self._rows.put(None)
        self._thread.join(timeout=_CLOSE_S)

    def _loop(self) -> None:
        waiting: deque[dict[str, Any]] = deque()
        more = True
        while more:
            row = self._rows.get()
            more = row is not None
            if row is not None:
                waiting.append(row)
            while waiting:
                try:
                    self._log(waiting[0])
                    waiting.popleft()
                except Exception as error:  # whatever it is, the run goes on
                    at, reason = waiting[0].get("update"), first_line(error)
                    log.error("MLflow did not take the metrics of update %s (%s); metrics.jsonl has them", at, reason)
                    waiting.rotate(-1)  # one that is refused for good holds up no other
                    break

    def _log(self, row: dict[str, Any]) -> None:
        import mlflow

        numbers = {k: float(v) for k, v in row.items() if isinstance(v, (int, float)) and k not in ("time", "update")}
        step, first = int(row.get("update", 0)), next(iter(numbers))
        if first not in self._logged:
            known = mlflow.MlflowClient().get_metric_history(self._run_id, first)
            self._logged[first] = {metric.step for metric in known}
        if step not in self._logged[first]:
            known_steps = self._logged.pop(first)  # if this fails, the server may have taken it yet
            # Named: in another thread than the one that began it, no run is active, and MLflow would begin one.
            mlflow.log_metrics(numbers, step=step, run_id=self._run_id)
            self._logged[first] = known_steps | {step}

    def artifacts(self, run_dir: Path, acting: dict[str, float]) -> None:
        """Log the run's files, and the final policy as a model that can be loaded and asked for actions.

        Args:
            run_dir: holds configuration, summary, pictures, videos and the final policy.
            acting: ``guidance`` and ``denoise_steps`` of the model.
        """
        import mlflow

        for file in sorted(run_dir.glob("*.*")):
            mlflow.log_artifact(str(file))
        mlflow.pyfunc.log_model(
            name="policy",
            python_model=str(Path(__file__).with_name("served_policy.py")),
            artifacts={"policy": str(run_dir / "final")},
            model_config=acting,
            pip_requirements=["ript-ray"],
        )


@contextlib.contextmanager
def tracking(uri: str | None, run_dir: Path, name: str, settings: dict[str, dict[str, Any]]) -> Iterator[Tracker]:
    """An MLflow run around a job; the same one again when the job is resumed.

    A server that fails later costs the job nothing: what it did not take is said in the log.

    Args:
        uri: tracking server or store; by default an SQLite file next to the run directory.
        run_dir: names the run, and keeps its identifier in ``mlflow-run``.
        name: the experiment.
        settings: the configuration, logged as parameters.

    Raises:
        UserError: when the run cannot begin there.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # Its own seven tries of two minutes each would hold up the beginning and the end.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    import mlflow

    try:
        run_id = _begin(uri, run_dir, name, settings)
    except Exception as error:  # of MLflow, its store's database, or the network
        with contextlib.suppress(Exception):
            mlflow.end_run("FAILED")  # if it was begun
        advice = (
            "move mlflow.db beside the run away" if uri is None else "correct it, start the server, or set it to null"
        )
        raise UserError(
            f"run.mlflow_uri={uri!r}: MLflow cannot begin a run there ({first_line(error)}); {advice}"
        ) from error
    tracker = Tracker(run_id)
    status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.close()
        try:
            mlflow.end_run(status)
        except Exception:
            log.exception("MLflow did not take the end of the run, %s", status)


def _begin(uri: str | None, run_dir: Path, name: str, settings: dict[str, dict[str, Any]]) -> str:
    """Make the run active, a new one or the one before; its identifier."""
    import mlflow

    store = run_dir.resolve().parent
    mlflow.set_tracking_uri(uri or f"sqlite:///{store / 'mlflow.db'}")
    artifacts = None if uri else (store / "mlflow-artifacts").as_uri()
    with contextlib.nullcontext() if uri else _alone(store / ".mlflow.lock"):  # it makes the tables, if there are none
        identifier = _experiment(name, artifacts)
    marker = run_dir / "mlflow-run"
    # Without a journal it is of a run that never began, perhaps with other settings.
    begun = marker.read_text().strip() if marker.exists() and (run_dir / "journal.jsonl").exists() else ""
    if begun and not _exists(begun):  # the run goes on where this store is not, or somebody has deleted it
        begun = ""
    run_id = str(mlflow.start_run(run_id=begun or None, experiment_id=identifier, run_name=run_dir.name).info.run_id)
    if not begun:
        mlflow.log_params({f"{section}.{key}": v for section, values in settings.items() for key, v in values.items()})
        write_text(marker, run_id + "\n")
    return run_id


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Keep others out who would do the same at the same time, for a minute at most."""
    with file.open("w") as lock:
        take_lock(lock, _ALONE_S)
        yield


def _experiment(name: str, artifacts: str | None) -> str:
    """The identifier of an experiment, made if there is none."""
    import mlflow

    found = mlflow.get_experiment_by_name(name)
    if found is None:
        try:
            return str(mlflow.create_experiment(name, artifact_location=artifacts))
        except mlflow.exceptions.MlflowException:  # another run may have been faster
            found = mlflow.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


def _exists(run_id: str) -> bool:
    import mlflow

    try:
        return bool(mlflow.get_run(run_id).info.lifecycle_stage == "active")
    except mlflow.exceptions.MlflowException:
        return False
