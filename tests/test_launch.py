"""The command line, run as a user runs it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch

from cluster.doctor import examine_rendering
from launch import default_config, main
from ript_ray.config import Config, load_config, save_config
from ript_ray.policies.checkpoints import load_policy

ROOT = Path(__file__).parents[1]


def launch(*arguments: str, timeout: int = 500) -> subprocess.CompletedProcess[str]:
    """Run ``python launch.py`` with arguments."""
    command = [sys.executable, str(ROOT / "launch.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, check=False)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train", "train.updats=1"], "did you mean 'train.updates'"),
        (["train", "env.id=libero_objct/0"], "did you mean 'libero_object'"),
        (["train", "policy.checkpoint=nowhere"], "nowhere': policy.json not found there"),
        (["train", "scaling.actors=500"], "scaling.actors=500: the job needs"),
        (["train", "scaling.learner_gpus=64"], "GPUs"),
        (["eval", "--config", "nowhere.yaml"], "no such file"),
        (["bench", "lerner"], "did you mean 'learner'"),
        (["train", "--json", "configs"], "--json configs: is a folder"),
        (
            ["eval", "scaling.address=http://127.0.0.1:9"],
            "scaling.address='http://127.0.0.1:9' (or RAY_ADDRESS): expected auto",
        ),
        (["train", "quick"], "expected section.key=value"),
        (["eval", "env.id=libero_goal/0,libero_gaol/1"], "did you mean 'libero_goal'"),
        (["bench", "env", "--suite", "libero_spatal", "--task", "3"], "did you mean 'libero_spatial'"),
        (["replay", "nowhere"], "no episode at nowhere; runs leave theirs in RUN_DIR/episodes"),
        (["replay"], "expected 1 path, found 0"),
        (["info", "nowhere"], "no config.yaml there"),
        (["submit"], "run.dir=None: a job's own folder is deleted when it ends"),
        (["tune"], "tune.search is empty"),
        (["tune", "tune.search={train.lrr: [1]}"], "did you mean 'train.lr'"),
        (
            ["tune", "tune.search={train.epochs: [3, -1]}"],
            "train.epochs=-1: input should be greater",
        ),
        (["tune", "tune.search={train.lr: {low: 1}}"], "expected a list, or low and high"),
        (["tune", "tune.search={eval.guidance: [1, 2]}"], "eval.guidance has no say in the rollouts"),
        (["tune", "tune.search={train.lr: [1.0e-4, 2.0e-4]}", "train.updates=1"], "set train.updates=2 or more"),
        (["tune", "tune.search={train.updates: [1, 4]}"], "set train.updates=2 or more"),
        (["train", "--config", "configs/default.yaml", "--resume", "runs/x"], "a run has its configuration"),
        (["bench", "objectives", "bench.objectives=[imitatoin]"], "did you mean 'imitation'"),
        (["bench", "objectives", "bench.objectives=[nobody:loss]"], "No module named 'nobody'"),
        (["train", "scaling.actor_labels={role: rollout}"], "0 fit on the 1 nodes with scaling.actor_labels={'role'"),
        (["train", "scaling.ray=false", "train.mode=async"], "one process can only collect and learn in turn"),
    ],
)
def test_a_mistake_ends_with_one_message_and_exit_code_2(
    arguments: list[str], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *([f"run.dir={tmp_path}"] if arguments[0] == "train" else [])]) == 2
    said = capsys.readouterr().err
    assert part in said
    assert "Traceback" not in said


def test_a_submitted_job_must_not_write_into_its_own_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")  # as Ray does for the job's driver
    assert main(["train", "run.dir=runs/first"]) == 2
    assert "run.dir='runs/first': a job's own folder is deleted when it ends" in capsys.readouterr().err


def test_a_damaged_journal_is_named_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_config(Config(), tmp_path / "config.yaml")
    (tmp_path / "journal.jsonl").write_text(
        '{"kind": "session", "time": 0}\n{"kind": \n{"kind": "opened", "time": 1}\n'
    )
    assert main(["train", "--resume", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'journal.jsonl'}" in said
    assert "line 2" in said


def test_a_python_without_the_packages_is_told_what_to_run() -> None:
    command = [sys.executable, "-S", str(ROOT / "launch.py"), "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"error: the package '\w+' is not there for .*; run: make setup .*\n", done.stderr)


def test_a_command_that_names_no_configuration_has_the_default_or_its_own() -> None:
    names = {
        ("bench", "objectives"): "objectives.yaml",
        ("bench", "soak"): "faults.yaml",
        ("bench", "learner"): "default.yaml",
        ("train", "run.name=objectives"): "default.yaml",
    }
    for (command, word), name in names.items():
        file = default_config(command, [word, "run.seed=1"])
        assert file.name == name
        assert file.is_file()


def test_the_policy_benchmark_needs_neither_ray_nor_a_simulator(tmp_path: Path) -> None:
    file = tmp_path / "policy.json"
    program = f"""
import sys
for absent in ("ray", "mujoco", "robosuite", "libero"):
    sys.modules[absent] = None
import launch
sys.exit(launch.main(["bench", "policy", "--json", {str(file)!r}]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=500, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert result["training"]["samples_per_second"] > 0


@pytest.mark.parametrize(("left", "part"), [("journal.jsonl", "--resume"), ("checkpoints", "holds another run")])
def test_a_new_run_does_not_go_on_in_the_folder_of_another(
    left: str, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / left).mkdir()
    assert main(["train", f"run.dir={tmp_path}"]) == 2
    assert part in capsys.readouterr().err


def check_the_model_in_mlflow(run: Path) -> None:
    """Loaded by MLflow and asked for actions, it answers as the policy does that the run ended with."""
    mlflow.set_tracking_uri(f"sqlite:///{run.parent / 'mlflow.db'}")
    model = mlflow.pyfunc.load_model(f"runs:/{(run / 'mlflow-run').read_text().strip()}/policy")
    rng = np.random.default_rng(0)
    seen: dict[str, Any] = {
        "frames": rng.integers(0, 256, (3, 2, 64, 64, 3), dtype=np.uint8),
        "states": rng.normal(size=(3, 8)).astype(np.float32),
        "instructions": ["pick up the alphabet soup and place it in the basket"] * 3,
        "seed": 5,
    }
    policy = load_policy(run / "final")
    noise = torch.randn(3, policy.horizon, policy.action_dim, generator=torch.Generator().manual_seed(5))
    frames, states = torch.from_numpy(seen["frames"]), torch.from_numpy(seen["states"])
    with torch.no_grad():
        expected, _ = policy.act(frames, states, seen["instructions"], noise, guidance=2.0)
    np.testing.assert_allclose(model.predict(seen), expected.numpy(), atol=1e-6)


@pytest.mark.libero
@pytest.mark.ray
def test_the_train_command_of_the_readme_leaves_a_whole_run_behind(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = launch(
        "train",
        f"run.dir={run}",
        "env.max_steps=70",
        "sampling.group_size=2",
        "sampling.groups=1",
        "sampling.max_groups=2",
        "objective.name=imitation",
        "train.updates=2",
        "train.candidates=2",
        "train.epochs=2",
        "train.min_steps=1",
        "train.batch_size=8",
        "train.micro_batch=8",
        "eval.episodes=2",
        "eval.random_placement=1",
        "eval.shifted=2",
        "eval.halving_episodes=2",
        "--json",
        str(tmp_path / "result.json"),
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert json.loads((tmp_path / "result.json").read_text()) == summary
    assert {name: column["final"]["episodes"] for name, column in summary["evaluation"].items()} == {
        "held_out": 2,
        "random_placement": 1,
        "shifted": 2,
    }
    for column in summary["evaluation"].values():
        assert set(column) == {"base", "final", "paired_p"}
        assert set(column["base"]) == {"successes", "episodes", "effective_episodes", "rate", "ci95"}
    assert summary["updates"] == 2
    assert summary["episodes"] == 14 + 2 * 2  # two of each update's policy, to choose one
    assert summary["chosen"]["update"] in (1, 2)
    assert [row["episodes"] for row in summary["chosen"]["table"]] == [2, 2]
    assert summary["groups"] == {"accepted": 2, "rejected": 0}
    assert summary["samples"]["trained"] > 0
    # The first update's samples are trained on twice.
    histogram = summary["staleness"].pop("histogram")
    assert histogram["0"] == 2 * histogram["1"]
    assert summary["staleness"] == {"mean": pytest.approx(1 / 3), "max": 1, "dropped": 0}
    assert {"total", "rollout", "render", "physics", "inference", "learner_busy", "learner_idle"} <= set(
        summary["seconds"]
    )
    assert {"python", "torch", "ray", "mujoco", "robosuite", "renderer"} <= set(summary["versions"])
    assert len(summary["weights_sha256"]) == 64
    assert summary["errors"] == []
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {row["update"] for row in rows} == {1, 2}
    named = re.findall(r"`([\w/]+)`", (ROOT / "docs" / "metrics.md").read_text())
    numbers = {key for row in rows for key in row} | set(summary)
    assert {key for key in numbers if not key.startswith("task/")} <= {*named, "update", "time"}
    files = ["config.yaml", "success.png", "run.log", "report.html", "final/model.safetensors"]
    videos = [entry["file"] for entry in json.loads((run / "videos/captions.json").read_text())]
    for file in [*files, "before-failure.mp4", *videos]:
        assert (run / file).stat().st_size > 0, file
    assert videos[0].startswith("videos/00002-")  # the newest first
    check_the_model_in_mlflow(run)
    assert "update 2, learner/steps" in (run / "run.log").read_text()
    assert (tmp_path / "mlflow.db").exists()
    assert launch("train", f"run.dir={run}").returncode == 2  # a finished run is not overwritten

    settings = [f"policy.checkpoint={run}/final", "env.max_steps=70", "eval.episodes=2", "eval.random_placement=0"]
    done = launch("eval", *settings, f"run.dir={tmp_path}/eval")
    assert done.returncode == 0, done.stderr
    assert "95 % interval" in done.stdout


@pytest.mark.libero
@pytest.mark.ray
def test_asynchronous_training_on_every_window_with_the_learner_in_the_driver(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = launch(
        "train",
        f"run.dir={run}",
        "env.max_steps=60",
        "data.windows=all",
        "data.tail=drop",
        "sampling.group_size=2",
        "sampling.groups=1",
        "sampling.max_groups=1",
        "train.mode=async",
        "train.lead=1",
        "train.max_staleness=1",
        "objective.name=imitation",
        "train.updates=3",
        "train.epochs=1",
        "train.min_steps=1",
        "train.batch_size=8",
        "train.micro_batch=8",
        "train.precision=bfloat16",
        "train.candidates=1",
        "eval.episodes=0",
        "eval.random_placement=0",
        "scaling.learners=0",
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert summary["updates"] == 3
    # Six episodes of 60 steps (none can succeed so early), 11 windows each. Those of the first update are used in the
    # second again and too old for the third; likewise each episode of the second that was collected ahead.
    assert summary["env_steps"] == 360
    dropped = summary["staleness"]["dropped"]
    assert dropped in (2, 3, 4)
    assert summary["samples"]["windows"] == 22 + 44 + 11 * (6 - dropped)
    assert summary["staleness"]["max"] <= 1
    assert summary["seconds"]["render"] > 0


@pytest.mark.libero
@pytest.mark.ray
def test_demonstrations_and_imitation(tmp_path: Path) -> None:
    demos, policy = tmp_path / "demos.safetensors", tmp_path / "policy"
    common = (f"data.demos={demos}", f"run.dir={tmp_path}/run")
    done = launch("demos", "demos.episodes=2", "env.max_steps=60", "scaling.actors=0", "demos.frame_every=20", *common)
    assert done.returncode == 0, done.stderr
    assert re.search(r"rollout actors fit, by \w+ .*; each takes 0\.\d\d GB", done.stdout)
    done = launch("sft", "sft.steps=3", "train.batch_size=4", f"sft.output={policy}", *common)
    assert done.returncode == 0, done.stderr
    assert (policy / "model.safetensors").exists()


def test_the_doctor_looks_at_any_world() -> None:
    config = load_config(ROOT / "configs" / "faults.yaml", [])
    assert examine_rendering(config).startswith("gymnasium/ript_ray/PointReach-v0 renders with")


@pytest.mark.libero
def test_the_doctor_finds_this_machine_ready(tmp_path: Path) -> None:
    done = launch("doctor", "--json", str(tmp_path / "doctor.json"))
    assert done.returncode == 0, done.stderr
    checks = json.loads((tmp_path / "doctor.json").read_text())
    assert all(check["ok"] for check in checks.values()), checks


@pytest.mark.slow
@pytest.mark.libero
def test_the_environment_benchmark_reports_its_ratios_and_finds_nothing_that_differs(tmp_path: Path) -> None:
    file = tmp_path / "env.json"
    done = launch("bench", "env", "--suite", "libero_spatial", "--task", "4", "--json", str(file))
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert result["env"] == "libero_spatial/4"
    assert result["states_identical"]
    assert result["frames_identical"]
    assert result["differences"] == []
    assert result["episode_speedup"] > 5
    assert result["scaling"]["1"] == 1
    assert 0.09 < result["frames_rendered_share"] < 0.11  # a look every ten steps
    for key in ("control_step_over_physics", "reset_seconds", "construction_seconds", "memory_mb"):
        assert result[key] > 0


@pytest.mark.slow
@pytest.mark.libero
@pytest.mark.ray
def test_objectives_are_compared_on_equal_footing(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    settings = (
        f"run.dir={tmp_path}/run",
        "bench.objectives=[cfg,imitation of successes,flow_sde]",
        "bench.seeds=1",
        "bench.rounds=2",
        "env.max_steps=40",
        "policy.execute=20",
        "sampling.groups=1",
        "sampling.group_size=2",
        "sampling.max_groups=1",
        "train.epochs=1",
        "train.batch_size=4",
        "train.micro_batch=4",
        "eval.episodes=2",
    )
    config = str(ROOT / "configs" / "objectives.yaml")
    done = launch("bench", "objectives", "--config", config, *settings, "--json", str(file))
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    names = ["cfg", "cfg, w = 2", "imitation of successes", "flow_sde"]
    assert [run["objective"] for run in result["runs"]] == names
    for run in result["runs"]:
        assert run["episodes"] == [0, 2, 4]
        assert len(run["successes"]) == 3
        assert run["seconds"] == sorted(run["seconds"])
    # The first round is the same for all.
    assert len({run["training_rates"][0] for run in result["runs"]}) == 1
    assert {row["objective"]: row["episodes"] for row in result["table"]} == dict.fromkeys(names, 2)
    rates = {row["objective"]: row["rate"] for row in result["table"]}
    for row in result["table"]:
        if row["objective"] == "imitation of successes":
            assert row["difference"] is None
        else:  # of one seed nobody knows how far off it is
            assert row["difference"] == {"mean": row["rate"] - rates["imitation of successes"], "ci95": None}
    assert json.loads((tmp_path / "run" / "objectives.json").read_text()) == result
    assert (tmp_path / "run" / "objectives.png").stat().st_size > 10_000
    # What was done is not done again, and other settings are not mixed with it.
    done = launch("bench", "objectives", "--config", config, *settings, "bench.objectives=[nft]", "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert json.loads(file.read_text())["runs"][:4] == result["runs"]
    assert json.loads(file.read_text())["runs"][4]["objective"] == "nft"
    done = launch("bench", "objectives", "--config", config, *settings, "train.lr=1e-3")
    assert "is of other settings or another layout; choose another run.dir" in done.stderr
    done = launch("bench", "objectives", "--config", config, "bench.objectives=[cgf]")
    assert done.returncode == 2
    assert "bench.objectives: unknown name 'cgf'; did you mean 'cfg'" in done.stderr
