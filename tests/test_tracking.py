"""MLflow with a real tracking server: parameters, metrics, files, and a model that answers."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from conftest import make_policy

from cluster.tracking import tracking
from ript_ray.config import Config
from ript_ray.errors import UserError
from ript_ray.policies.checkpoints import save_policy


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server with a store of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = tmp_path / "server"
    place.mkdir()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store, files = f"sqlite:///{place / 'store.db'}", str(place / "files")
    command += ["--backend-store-uri", store, "--artifacts-destination", files]
    log = place / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=place, stdout=out, stderr=out, start_new_session=True)
    try:
        wait_until_it_answers(f"http://127.0.0.1:{port}", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)


def wait_until_it_answers(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while True:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        except OSError:
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.5)


def test_rows_of_a_resumed_run_are_logged_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for _ in range(2):
        with tracking(None, run, "here", {}) as tracker:
            tracker({"update": 1, "rollout/success_rate": 0.25})
            tracker({"update": 1, "learner/loss": 0.5})
        (run / "journal.jsonl").touch()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (found,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert found.info.status == "FINISHED"
    for name in ("rollout/success_rate", "learner/loss"):
        assert len(client.get_metric_history(found.info.run_id, name)) == 1


def test_another_attempt_and_a_run_that_was_deleted_begin_anew(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()

    def begun(lr: float) -> str:
        with tracking(None, run, "here", {"train": {"lr": lr}}):
            return (run / "mlflow-run").read_text().strip()

    first, second = begun(0.1), begun(0.2)  # the first was stopped before anything was played
    (run / "journal.jsonl").touch()
    assert begun(0.2) == second != first
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert client.get_run(second).data.params == {"train.lr": "0.2"}
    client.delete_run(second)
    third = begun(0.2)
    assert third != second
    (run / "mlflow-run").write_text("")  # the disk was full
    assert begun(0.2) not in ("", third)


def test_a_server_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as taken:  # listens to nobody
        taken.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with (
            pytest.raises(UserError, match=f"run.mlflow_uri='{uri}': MLflow cannot begin"),
            tracking(uri, tmp_path, "nowhere", {}),
        ):
            pass
    with (
        pytest.raises(UserError, match="'nonsense://x': MLflow cannot begin"),
        tracking("nonsense://x", tmp_path, "x", {}),
    ):
        pass


def test_a_store_that_fails_during_a_run_costs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    run.mkdir()
    store = tmp_path / "mlflow.db"
    with tracking(None, run, "here", {}) as tracker:
        away = sqlite3.connect(store, isolation_level=None)
        away.execute("ALTER TABLE metrics RENAME TO gone")
        tracker({"update": 1, "learner/loss": 0.5})
        deadline = time.monotonic() + 60
        while "MLflow did not take the metrics of update 1" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        away.execute("ALTER TABLE gone RENAME TO metrics")
        away.close()
        tracker({"update": 2, "learner/loss": 0.25})
    client = mlflow.MlflowClient(f"sqlite:///{store}")
    (found,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    history = client.get_metric_history(found.info.run_id, "learner/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.5), (2, 0.25)]


@pytest.mark.slow
def test_a_run_is_tracked_by_a_server(server: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_policy(run / "final", make_policy())
    (run / "summary.json").write_text('{"updates": 1}\n')
    settings = Config().model_dump(mode="json")
    with tracking(server, run, "somewhere", settings) as tracker:
        tracker({"update": 1, "time": 1.0, "rollout/success_rate": 0.25})
    with tracking(server, run, "somewhere", settings) as tracker:  # resumed: the same run, each row once
        tracker({"update": 1, "time": 1.0, "rollout/success_rate": 0.25})
        tracker({"update": 2, "time": 2.0, "rollout/success_rate": 0.75})
        tracker.artifacts(run, {"guidance": 2.0, "denoise_steps": 3})

    client = mlflow.MlflowClient(server)
    experiment = client.get_experiment_by_name("somewhere")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.data.params["train.lr"] == str(Config().train.lr)
    history = client.get_metric_history(found.info.run_id, "rollout/success_rate")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.25), (2, 0.75)]
    assert "summary.json" in {file.path for file in client.list_artifacts(found.info.run_id)}

    model = mlflow.pyfunc.load_model(f"runs:/{found.info.run_id}/policy")
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (1, 2, 32, 32, 3), dtype=np.uint8)
    states = rng.normal(size=(1, 8)).astype(np.float32)
    answer = model.predict({"frames": frames, "states": states, "instructions": ["put it there"], "seed": 4})
    noise = torch.randn(1, 50, 7, generator=torch.Generator().manual_seed(4))
    chunk, _ = make_policy().act(
        torch.from_numpy(frames), torch.from_numpy(states), ["put it there"], noise, guidance=2.0, steps=3
    )
    np.testing.assert_allclose(answer, chunk, atol=1e-5)
