"""A job on a cluster of three nodes, each of its own `ray start`: sent, watched, stopped, and sent again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.util.state import list_actors, list_nodes

import launch
from actors.journal import read_journal

ROOT = Path(__file__).parents[1]
POINT_REACH = [
    "env.id=gymnasium/ript_ray/PointReach-v0",
    "env.image_size=32",
    "env.max_steps=30",
    "policy.execute=5",
    "sampling.group_size=4",
    "sampling.groups=3",
    "sampling.max_groups=6",
    "train.epochs=2",
    "train.min_steps=1",
    "train.batch_size=32",
    "train.micro_batch=32",
    "eval.episodes=4",
    "eval.halving_episodes=2",
]

_SAMPLE = re.compile(r"(ray_ript_\w+)\{.*\} (\S+)$")


def wait_for(what: str, state: Callable[[], Any], seconds: float = 180.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := state()):
        assert time.monotonic() < deadline, what
        time.sleep(0.2)
    return found


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@dataclass
class LocalCluster:
    """What a client needs to know."""

    address: str
    folder: Path
    environment: dict[str, str]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=180, check=False
        )


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with three_nodes() as started:
        yield started


@contextlib.contextmanager
def three_nodes(others: Sequence[str] = ()) -> Iterator[LocalCluster]:
    """A head that runs nothing but drivers, a node for rollouts and one for the learner.

    ``others``: words before the command that starts each of the two.
    """
    folder = Path(tempfile.mkdtemp(prefix="rr-"))  # sockets in it must have short names
    gcs, dashboard, client, agent = free_ports(4)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",  # Ray reads it when it is imported, which was before
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_metrics_report_interval_ms": "1000",
    }
    common = ["ray", "start", "--block", "--disable-usage-stats", "--object-store-memory", "200000000"]
    head = ["--head", "--port", str(gcs), "--dashboard-port", str(dashboard), "--ray-client-server-port", str(client)]
    head += ["--dashboard-agent-listen-port", str(agent), "--num-cpus", "0"]
    join = ["--address", f"127.0.0.1:{gcs}", "--num-cpus", "1"]
    starts = [head, [*join, "--labels", "role=rollout"], [*join, "--labels", "role=learner"]]
    nodes = []
    address = environment["RAY_API_SERVER_ADDRESS"]

    def alive() -> int:
        try:
            return len(list_nodes(address=address, filters=[("state", "=", "ALIVE")], timeout=10))
        except Exception:  # it does not answer yet
            return 0

    try:
        for i, arguments in enumerate(starts):
            log = (folder / f"node-{i}.log").open("w")
            # Each with a folder of its own: in a common one they would remove each other's copy of a job's files.
            own = ["--temp-dir", str(folder if i == 0 else folder / str(i))]
            words = [*(others if i else ()), *common, *arguments, *own]
            node = subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)
            nodes.append(node)
            wait_for(f"node {i} did not start, see {folder}", lambda count=i + 1: alive() >= count, 60.0)
        yield LocalCluster(address, folder, environment)
    finally:
        for node in reversed(nodes):  # all of its processes; a polite end would wait for half a minute
            os.killpg(node.pid, signal.SIGKILL)
            node.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def scrape(cluster: LocalCluster) -> dict[str, float]:
    """What Prometheus would read from all nodes: the value of each sample's name."""
    groups = json.loads((cluster.folder / "prom_metrics_service_discovery.json").read_text())
    found = {}
    for target in [target for group in groups for target in group["targets"]]:
        try:
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                lines = answer.read().decode().splitlines()
        except OSError:  # not there yet; whoever waits asks again
            continue
        found |= {match[1]: float(match[2]) for line in lines if (match := _SAMPLE.match(line))}
    return found


@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_a_job_is_sent_watched_stopped_and_sent_again(cluster: LocalCluster, point_start: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ["--config", "configs/three_nodes.yaml", *POINT_REACH, f"policy.checkpoint={point_start}"]
    settings += [f"run.dir={run}", "train.updates=16", "scaling.actor_cpus=0.5", "scaling.learner_cpus=1"]
    command = [sys.executable, "launch.py", "submit", *settings, "--json", str(tmp_path / "sent.json")]

    too_much = cluster.run(*command, "scaling.actors=50")
    assert too_much.returncode == 2
    assert "the job needs 26 CPUs, there are 2" in too_much.stderr
    assert "Traceback" not in too_much.stderr

    done = cluster.run(*command)
    assert done.returncode == 0, done.stderr
    client = JobSubmissionClient(cluster.address)
    job = json.loads((tmp_path / "sent.json").read_text())["job"]
    packages = cluster.folder / "session_latest/runtime_resources/working_dir_files"
    wait_for("two updates", lambda: (run / "checkpoints/0002/policy.json").exists())
    assert sum(file.stat().st_size for file in packages.rglob("*") if file.is_file()) < 20e6
    assert not list(packages.glob("*/tests"))
    assert not list(packages.glob("*/checkpoints/*"))  # this one's lies elsewhere

    nodes = {node.node_id: node.labels or {} for node in list_nodes(address=cluster.address, detail=True)}
    actors = list_actors(address=cluster.address, filters=[("state", "=", "ALIVE")], detail=True)
    places = {actor.name: nodes[actor.node_id].get("role") for actor in actors}
    assert places["RolloutActor0"] == places["RolloutActor1"] == "rollout"
    assert places["Coordinator"] is places["SamplePool"] is places["WeightStore"] is None  # on the head
    assert "learner" in {nodes[a.node_id].get("role") for a in actors if a.class_name.startswith("RayTrainWorker")}

    panels = json.loads((ROOT / "cluster/grafana/ript_ray.json").read_text())["panels"]
    shown = {name for p in panels for t in p["targets"] for name in re.findall(r"ray_ript_\w+", t["expr"])}
    assert len(shown) > 15
    deadline = time.monotonic() + 180.0
    while missing := shown - scrape(cluster).keys():  # all in the same scrape
        assert time.monotonic() < deadline, missing
        time.sleep(0.2)
    address = re.search(r"report: (http\S+)", client.get_job_logs(job))
    assert address
    with urllib.request.urlopen(f"{address[1]}/report.json", timeout=10) as answer:
        assert len(json.loads(answer.read())["points"]) >= 2

    with urllib.request.urlopen(f"{cluster.address}/api/train/v2/runs/v1", timeout=10) as answer:
        (learners,) = json.loads(answer.read())["train_runs"]
    assert (learners["name"], learners["status"], learners["job_details"]["submission_id"]) == (
        "learners",
        "RUNNING",
        job,
    )

    client.stop_job(job)
    wait_for("the end of the job", lambda: client.get_job_status(job).is_terminal(), 60.0)
    assert client.get_job_status(job) == JobStatus.STOPPED
    assert "nothing that was played is lost" in client.get_job_logs(job)
    learnt = len(list((run / "checkpoints").glob("[0-9]*")))
    played = sum(entry["kind"] == "played" for entry in read_journal(run))
    assert learnt < 16

    job = "by_ray_itself"
    send = ["ray", "job", "submit", "--no-wait", "--submission-id", job, "--working-dir", "."]
    sent = cluster.run(*send, "--", "python", "launch.py", "train", *settings, "run.resume=true")
    assert sent.returncode == 0, sent.stderr
    wait_for("the end of the job", lambda: client.get_job_status(job).is_terminal(), 400.0)
    assert client.get_job_status(job) == JobStatus.SUCCEEDED, client.get_job_logs(job)[-3000:]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["updates"] == 16
    assert summary["sessions"] == 2
    assert summary["errors"] == []
    assert played < summary["episodes"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_nodes_need_not_share_a_disk(point_start: Path, tmp_path: Path) -> None:
    """Each node has an own disk where the driver's has the run; the job is stopped, sent again, and loses nothing."""
    disk = tmp_path / "disk"
    disk.mkdir()
    settings = [*POINT_REACH, f"policy.checkpoint={point_start}", "train.updates=4", "train.ema=0.9"]
    settings += ["train.restart=false", "scaling.actors=2", "scaling.actor_cpus=0.5", "scaling.learner_cpus=1"]
    alone = tmp_path / "alone"
    command = [sys.executable, "launch.py", "train", "--config", "configs/cluster.yaml", *settings, "train.mode=sync"]
    subprocess.run(
        [*command, f"run.dir={alone}", "scaling.learners=1", "scaling.address=null"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=300,
    )

    with three_nodes(["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(disk)]) as cluster:
        run = disk / "run"
        command = [sys.executable, "launch.py", "submit", "--config", "configs/cluster.yaml", *settings]
        command += [f"run.dir={run}", "train.mode=sync", "scaling.learners=1", "--json", str(tmp_path / "sent.json")]
        command += ["scaling.actor_labels={role: rollout}", "scaling.learner_labels={role: learner}"]
        client = JobSubmissionClient(cluster.address)

        def send() -> str:
            sent = cluster.run(*command)
            assert sent.returncode == 0, sent.stderr
            return str(json.loads((tmp_path / "sent.json").read_text())["job"])

        job = send()
        wait_for("two updates", lambda: (run / "checkpoints/0002/policy.json").exists())
        client.stop_job(job)
        wait_for("the end of the job", lambda: client.get_job_status(job).is_terminal(), 60.0)
        job = send()
        wait_for("the end of the job", lambda: client.get_job_status(job).is_terminal(), 300.0)
        assert client.get_job_status(job) == JobStatus.SUCCEEDED, client.get_job_logs(job)[-3000:]
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["sessions"], summary["errors"]) == (2, [])
    assert len(list((run / "episodes").glob("[0-9]*.safetensors"))) == summary["episodes"]
    assert summary["weights_sha256"] == json.loads((alone / "summary.json").read_text())["weights_sha256"]
    assert not list(run.rglob("*.carried"))


def test_a_cluster_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    (port,) = free_ports(1)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{port}")

    def said(*more: str) -> str:
        assert launch.main(["submit", "--config", "configs/cluster.yaml", *more]) == 2
        return capsys.readouterr().err

    assert "run.dir=None: a job's own folder is deleted when it ends" in said()
    assert "run.dir='runs/first': a job's own folder is deleted when it ends" in said("run.dir=runs/first")
    assert "run.storage='copy': a job's own folder is deleted" in said(f"run.dir={tmp_path}", "run.storage=copy")
    demos = ["data.demos=mine", "data.demo_share=0.5"]
    assert "data.demos='mine': demonstrations do not travel" in said(f"run.dir={tmp_path}", *demos)
    assert "scaling.actors=0 measures one machine alone" in said("scaling.actors=0")
    assert "policy.checkpoint='configs': only folders inside" in said("policy.checkpoint=configs")
    assert "policy.checkpoint='checkpoints/none': only folders inside" in said("policy.checkpoint=checkpoints/none")
    assert f"no Ray cluster answers at http://127.0.0.1:{port}" in said(f"run.dir={tmp_path}")
