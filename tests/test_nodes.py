"""A run on nodes that come and go: none of their processes is asked, they are killed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_resume import ROOT, SETTINGS, finish, start, wait_until

from actors.journal import journal_holds, read_journal
from benchmarks.job import processes
from benchmarks.nodes import Nodes
from ript_ray.config import Config, load_config, save_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    found = Nodes()
    yield found
    found.close()


PREFETCHING = """
import sys, time
import numpy as np
import ray
from ray.experimental import get_object_locations
from learner.loop import prefetch

@ray.remote(num_cpus=0.5, label_selector={"role": "rollout"})
def make():
    return np.zeros(20_000_000, np.uint8)

@ray.remote(num_cpus=0.5, label_selector={"role": "learner"})
def comes_here(references, begin):
    here, deadline = ray.get_runtime_context().get_node_id(), time.monotonic() + 20
    if begin:
        prefetch(references, 60)
    while here not in get_object_locations(references)[references[0]]["node_ids"]:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True

ray.init(address=sys.argv[1], log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": sys.argv[2]}})
made = [make.remote()]
ray.wait(made, fetch_local=False, timeout=60)
print([ray.get(comes_here.remote(made, begin), timeout=90) for begin in (False, True)])
"""


def test_a_shard_is_brought_to_the_learners_node_before_it_is_asked_for(nodes: Nodes) -> None:
    address = nodes.placed(Config()).scaling.address
    command = [sys.executable, "-c", PREFETCHING, str(address), str(ROOT)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "[False, True]"


def rollout_actors() -> int:
    """How many have a process in the cluster."""
    return len(list(processes("ray::RolloutActor")))


def test_nodes_that_join_are_used_and_nodes_that_leave_are_survived(
    nodes: Nodes, point_start: Path, tmp_path: Path
) -> None:
    settings = [*SETTINGS, f"policy.checkpoint={point_start}", "scaling.actors=3", "data.windows=all"]
    settings += ["scaling.learner_cpus=0.5"]
    alone = tmp_path / "alone"
    finish(start(*settings, f"run.dir={alone}", "scaling.ray=false"))

    run = tmp_path / "run"
    config = nodes.placed(load_config(ROOT / "configs/default.yaml", [*settings, f"run.dir={run}"]))
    few = config.scaling.model_copy(update={"min_actors": 2})  # of three with half a CPU each, one finds no room
    save_config(config.model_copy(update={"scaling": few}), tmp_path / "config.yaml")
    process = start("--config", str(tmp_path / "config.yaml"))
    wait_until(process, lambda: journal_holds(run, "played") >= 6)
    nodes.leave("rollout")
    nodes.join("rollout")
    after = journal_holds(run, "played")
    wait_until(process, lambda: journal_holds(run, "played") >= after + 6)
    assert rollout_actors() == 2
    nodes.join("rollout")
    wait_until(process, lambda: rollout_actors() == 3)
    finish(process)

    numbers = [entry["number"] for entry in read_journal(run) if entry["kind"] == "played"]
    assert len(numbers) == len(set(numbers))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["sessions"] == 1
    assert 1 <= len(summary["errors"]) <= 4, summary["errors"]
    expected = json.loads((alone / "summary.json").read_text())
    assert summary["weights_sha256"] == expected["weights_sha256"]
    assert summary["evaluation"] == expected["evaluation"]
