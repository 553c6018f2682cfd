"""A search over settings, by real training jobs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_resume import SETTINGS

from cluster.tune import _worth, most_updates, search_space
from ript_ray.config import Config
from ript_ray.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        ({"train.lr": [1e-4]}, 3),
        ({"train.updates": [8, 2]}, 8),
        ({"train.updates": {"low": 1, "high": 5}}, 5),
    ],
)
def test_no_trial_is_cut_before_its_last_update(search: dict[str, object], expected: int) -> None:
    assert most_updates(Config.model_validate({"train": {"updates": 3}, "tune": {"search": search}})) == expected


def test_a_range_of_whole_numbers_has_both_ends_and_nothing_between() -> None:
    def space(**ends: object) -> Any:
        config = Config.model_validate(
            {"tune": {"search": {"train.epochs": ends, "train.lr": {"low": 1e-4, "high": 1}}}}
        )
        return search_space(config, ROOT / "configs/default.yaml", [])

    for log in (False, True):
        drawn = {space(low=1, high=3, log=log)["train.epochs"].sample() for _ in range(60)}
        assert drawn == {1, 2, 3}
    assert 0.0 < space(low=1, high=3)["train.lr"].sample() < 1.0
    for wrong in ({"low": "1e-4", "high": 3}, {"low": 3, "high": 1}, {"low": 0, "high": 3, "log": True}):
        with pytest.raises(UserError, match="expected numbers"):
            space(**wrong)


def test_what_was_ended_early_or_failed_is_not_the_best() -> None:
    finished, ended = {"error": None, "held_out": {}}, {"error": None, "held_out": None}
    trials = [
        ended | {"success_low": 0.77},  # two updates, and then others were better
        finished | {"success_low": 0.55},
        finished | {"success_low": 0.62},
        {"error": "it failed", "held_out": None, "success_low": 0.9},
    ]
    assert sorted(trials, key=_worth, reverse=True) == [trials[2], trials[1], trials[0], trials[3]]


@pytest.mark.slow
@pytest.mark.ray
def test_a_search_ranks_its_jobs_and_goes_on_after_an_interruption(point_start: Path, tmp_path: Path) -> None:
    command = [sys.executable, "launch.py", "tune", *SETTINGS, f"policy.checkpoint={point_start}"]
    command += ["tune.search={train.lr: [1.0e-4, 1.0e-3]}", f"run.dir={tmp_path / 'search'}", "run.seed=1"]
    command += ["--json", str(tmp_path / "found.json")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list((tmp_path / "search/jobs").glob("*/checkpoints/0001/policy.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=180)
    other = [*command, "tune.search={train.lr: [1.0e-4]}", "train.epochs=1"]
    refused = subprocess.run(other, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode == 2
    assert "began with other settings (train, tune.search)" in refused.stderr
    begun = {folder.name for folder in (tmp_path / "search/jobs").iterdir() if folder.is_dir()}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["trials"]) == 2
    assert found["best"]["success_low"] == max(trial["success_low"] for trial in found["trials"])
    assert all(trial["error"] is None for trial in found["trials"])
    assert sorted(trial["settings"]["train.lr"] for trial in found["trials"]) == [1e-4, 1e-3]
    folders = {Path(trial["folder"]).name for trial in found["trials"]}
    assert begun <= folders  # what had begun went on
    assert found["best"]["held_out"]["held_out"]["final"]["episodes"] == 4
