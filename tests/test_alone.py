"""One process without Ray does what a Ray job does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_resume import SETTINGS, check_the_same, finish, start

from launch import main
from ript_ray.config import DemosConfig, load_config
from ript_ray.data.demonstrator import demonstrate
from ript_ray.data.storage import load_trajectories
from ript_ray.envs import make
from ript_ray.evaluation import evaluation_contexts
from ript_ray.policies.acting import Acting
from ript_ray.policies.checkpoints import cpu_weights, load_policy, weights_sha256
from ript_ray.rollout import play


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["data.windows=seen", "objective.fastest=0.5", "data.demo_share=0.25", "data.tail=pad"],
        ["data.windows=all", "objective.baseline=task", "train.restart=false", "train.anchor=0.1", "train.ema=0.9"],
    ],
)
def test_the_loop_without_ray_ends_with_the_same_weights(point_start: Path, tmp_path: Path, more: list[str]) -> None:
    demos = point_start.with_name("demos.safetensors")
    settings = [*SETTINGS, f"policy.checkpoint={point_start}", f"data.demos={demos}", *more]
    finish(start(*settings, "scaling.actors=1", f"run.dir={tmp_path / 'ray'}"))
    assert main(["train", *settings, "scaling.ray=false", f"run.dir={tmp_path / 'alone'}"]) == 0
    check_the_same(tmp_path / "ray", tmp_path / "alone")


def test_an_update_without_samples_leaves_the_policy_as_it_is(point_start: Path, tmp_path: Path) -> None:
    settings = [*SETTINGS, f"policy.checkpoint={point_start}", "scaling.ray=false", "eval.episodes=0"]
    settings += ["sampling.groups=1", "sampling.max_groups=1", "sampling.group_size=2", "train.max_staleness=0"]
    for seed in range(20):  # until an update that learns is followed by one whose group is rejected
        run = tmp_path / str(seed)
        assert main(["train", *settings, "train.updates=2", f"run.seed={seed}", f"run.dir={run}"]) == 0
        steps = [json.loads(line)["learner/steps"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        if steps[0] > 0 and steps[1] == 0:
            break
    else:
        pytest.fail("no seed showed the case")
    learnt, kept = (load_policy(run / "checkpoints" / name) for name in ("0001", "0002"))
    assert weights_sha256(cpu_weights(kept)) == weights_sha256(cpu_weights(learnt))
    assert weights_sha256(cpu_weights(kept)) != weights_sha256(cpu_weights(load_policy(point_start)))


def test_an_update_may_end_before_anything_was_played(point_start: Path, tmp_path: Path) -> None:
    settings = [*SETTINGS, f"policy.checkpoint={point_start}", "scaling.ray=false", "train.updates=1"]
    assert main(["train", *settings, "sampling.max_seconds=1.0e-9", f"run.dir={tmp_path / 'run'}"]) == 0
    (row,) = (json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert (row["rollout/episodes"], row["rollout/success_rate"], row["learner/steps"]) == (0, 0.0, 0.0)


def test_a_run_without_ray_tells_its_story(
    point_start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*SETTINGS, f"policy.checkpoint={point_start}", "scaling.ray=false", "train.updates=2"]
    run = tmp_path / "run"
    assert main(["train", *settings, f"run.dir={run}"]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    assert (
        summary["episodes"] == sum(row["rollout/episodes"] for row in rows) + 2 * 4 + 2 * 3
    )  # four before and after, three of each update
    assert summary["episodes"] <= summary["env_steps"] <= 30 * summary["episodes"]
    assert sum(summary["groups"].values()) == sum(row["rollout/episodes"] for row in rows) / 4
    seconds = summary["seconds"]
    assert seconds["rollout"] + seconds["learner_busy"] < seconds["total"]
    capsys.readouterr()
    assert main(["info", str(run)]) == 0
    said = capsys.readouterr().out
    assert "finished: 2 updates" in said
    assert "no faults" in said
    assert main(["report", str(run)]) == 0
    assert '"finished":true' in (run / "report.html").read_text()
    assert main(["compare-runs", str(run), str(run)]) == 0
    assert "the same settings" in capsys.readouterr().out


def test_the_goal_ends_training(point_start: Path, tmp_path: Path) -> None:
    settings = [*SETTINGS, f"policy.checkpoint={point_start}", "scaling.ray=false", "train.stop_at=0.001"]
    assert main(["train", *settings, f"run.dir={tmp_path / 'run'}"]) == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["updates"] == 0


def test_demonstrations_and_evaluation_need_no_ray(
    point_start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.init", None)
    settings = [*SETTINGS, "scaling.ray=false", f"policy.checkpoint={point_start}", f"run.dir={tmp_path / 'run'}"]
    demos, result = tmp_path / "demos.safetensors", tmp_path / "result.json"
    assert main(["demos", *settings, "demos.episodes=3", f"data.demos={demos}"]) == 0
    made = load_trajectories(demos)
    world = make("gymnasium/ript_ray/PointReach-v0", 32, 30)
    for demo in reversed(made):
        again = demonstrate(world, demo.context, DemosConfig())
        np.testing.assert_array_equal(again.frames, demo.frames)
        np.testing.assert_array_equal(again.actions, demo.actions)
    assert len({demo.context for demo in made}) == 3

    assert main(["eval", *settings, "--json", str(result)]) == 0
    played = json.loads(result.read_text())
    policy = load_policy(point_start)
    contexts = evaluation_contexts(load_config(None, settings))["held_out"]
    expected = [
        play(world, policy, context, Acting(5, 10, guidance=1.0), policy_version=0).success
        for context in reversed(contexts)
    ]
    assert played["results"] == {"held_out": expected[::-1]}
    assert played["held_out"]["successes"] == sum(expected)

    assert main(["guidance", *settings, "eval.scales=[1.0,2.0]", "--json", str(result)]) == 0
    assert {row["scale"] for row in json.loads(result.read_text())["table"]} == {1.0, 2.0}
