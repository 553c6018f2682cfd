"""Runs that are really killed, and resumed: they must end as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
from conftest import make_trajectory
from test_faults import point_policy

import launch
from actors.journal import read_journal
from benchmarks.faults import CLUSTER_FAULTS, FAULTS
from ript_ray.data.lines import append_json_line, read_json_lines
from ript_ray.data.storage import save_episode
from ript_ray.errors import UserError
from ript_ray.policies.checkpoints import (
    cpu_weights,
    load_policy,
    newest_policy,
    prune_checkpoints,
    save_policy,
    weights_sha256,
)
from ript_ray.types import EpisodeRecord

ROOT = Path(__file__).parents[1]
TIMING = (
    "time",
    "seconds",
    "busy_s",
    "idle_s",
    "wait_s",
    "physics_s",
    "render_s",
    "inference_s",
    "memory_mb",
    "restarts",
)
"""Ends of the names of metrics that a clock, the machine or an interruption decides."""
SETTINGS = [
    "env.id=gymnasium/ript_ray/PointReach-v0",
    "env.image_size=32",
    "env.max_steps=30",
    "policy.execute=5",
    "sampling.group_size=4",
    "sampling.groups=4",
    "sampling.max_groups=8",
    "sampling.skip_after=1",
    "train.updates=3",
    "objective.baseline=group",
    "objective.fastest=1.0",
    "train.epochs=4",
    "train.min_steps=1",
    "train.batch_size=16",
    "train.micro_batch=16",
    "train.candidates=2",
    "eval.episodes=4",
    "eval.random_placement=0",
    "eval.halving_episodes=3",
    "run.keep_checkpoints=2",
]

pytestmark = pytest.mark.ray

State = Callable[[Path], bool]


@pytest.fixture(scope="module")
def checkpoint(point_start: Path) -> Path:
    return point_start


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "launch.py", "train", *arguments]
    env = os.environ | environment
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out


def wait_until(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not reached():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def stop_when(process: subprocess.Popen[str], run: Path, state: State, how: signal.Signals) -> None:
    """Send a signal as soon as the files of a run are in a state."""
    wait_until(process, lambda: state(run))
    os.kill(process.pid, how)
    process.communicate(timeout=120)


def played(count: int) -> State:
    return lambda run: sum(entry["kind"] == "played" for entry in read_journal(run)) >= count


def collected(step: int, seconds: float = 0.0) -> State:
    """So many seconds after the rollouts of an update were complete, that is, while it is learnt."""

    def reached(run: Path) -> bool:
        if any(entry["kind"] == "collected" and entry["step"] == step for entry in read_journal(run)):
            time.sleep(seconds)
            return True
        return False

    return reached


def story(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Summary and metrics of a run without what clocks decide."""
    summary = json.loads((run / "summary.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: (row["update"], *sorted(row)))
    plain = [{name: value for name, value in row.items() if not name.endswith(TIMING)} for row in rows]
    timeless = {
        name: value
        for name, value in summary.items()
        if name not in ("seconds", "weights_wait_s", "learner_peak_memory_mb", "sessions", "played_again", "errors")
    }
    return timeless, plain


def check_the_same(ray: Path, alone: Path) -> None:
    """Of a Ray job and a run in one process: all that clocks do not decide."""
    expected, found = (json.loads((run / "summary.json").read_text()) for run in (ray, alone))
    for key in (
        "weights_sha256",
        "chosen",
        "evaluation",
        "updates",
        "episodes",
        "env_steps",
        "groups",
        "errors",
        "versions",
    ):
        assert found[key] == expected[key], key

    def rows(run: Path) -> dict[tuple[int, str], float]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return {(r["update"], k): v for r in lines for k, v in r.items() if "/" in k and not k.endswith(TIMING)}

    mine, theirs = rows(alone), rows(ray)
    assert len(mine) > 20
    assert mine[3, "learner/steps"] > 0
    assert mine == {key: theirs[key] for key in mine}


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    # Sockets want a short path, and Ray's processes may still write there in the end.
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as temporary:
        left = Path(temporary) / "ray/ray_current_cluster"  # of a cluster of this machine that is gone
        left.parent.mkdir()
        left.write_text("127.0.0.1:1")
        finish(start(*SETTINGS, f"policy.checkpoint={checkpoint}", f"run.dir={run}", RAY_TMPDIR=temporary))
        logs = list(left.parent.glob("session_latest/logs/train/ray-train-sys-controller*.log"))
        (said,) = (log.read_text() for log in logs)
        assert "with PlacementGroupCleaner" in said
        assert "Failed to stop PlacementGroupCleaner" not in said
    learnt = [row["learner/steps"] for row in story(run)[1] if "learner/steps" in row]
    assert min(learnt) > 0, "a run that learns nothing shows nothing"
    return run


def run_with_stops(
    checkpoint: Path, run: Path, stops: list[tuple[State, signal.Signals]], *more: str
) -> dict[str, Any]:
    """Stop a run at each of these states, resume it each time, and return its summary.

    Episodes are so short that one stop may come when the next state is reached, too; the next then stops a resumed run
    before it has begun.
    """
    process = start(*SETTINGS, *more, f"policy.checkpoint={checkpoint}", f"run.dir={run}")
    for state, how in stops:
        stop_when(process, run, state, how)
        process = start("--resume", str(run))
    finish(process)
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    assert 1 < summary["sessions"] <= len(stops) + 1
    return summary


def test_a_run_without_ray_does_the_same(checkpoint: Path, undisturbed: Path, tmp_path: Path) -> None:
    settings = [*SETTINGS, f"policy.checkpoint={checkpoint}", "scaling.ray=false", f"run.dir={tmp_path / 'run'}"]
    assert launch.main(["train", *settings]) == 0
    check_the_same(undisturbed, tmp_path / "run")


def test_a_finished_run_is_found_again_and_another_job_is_refused_in_its_folder(
    checkpoint: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = ["train", *SETTINGS, f"policy.checkpoint={checkpoint}", f"run.dir={undisturbed}", "run.resume=true"]
    result = tmp_path / "result.json"
    assert launch.main([*same, "--json", str(result)]) == 0
    assert json.loads(result.read_text()) == json.loads((undisturbed / "summary.json").read_text())
    assert launch.main([*same, "train.updates=2"]) == 2
    assert "has another train.updates; give the same settings" in capsys.readouterr().err


def test_a_killed_run_ends_as_if_it_had_never_been(checkpoint: Path, undisturbed: Path, tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "another machine" / "run"
    copied = shutil.copytree(checkpoint, tmp_path / "copied")
    command = [*SETTINGS, f"policy.checkpoint={copied}", f"run.storage={(tmp_path / 'stored').as_uri()}"]
    process = start(*command, f"run.dir={run}")
    stop_when(process, run, collected(1, 0.05), signal.SIGKILL)  # within the second update
    shutil.rmtree(copied)  # it is not on the other machine
    finish(start(*command, f"run.dir={elsewhere}", "run.resume=true"))
    there, here = story(undisturbed), story(elsewhere)
    assert here[0] == there[0]
    assert here[1] == there[1]
    assert len(here[1]) == 6
    summary = json.loads((elsewhere / "summary.json").read_text())
    assert summary["sessions"] == 2
    assert len(summary["chosen"]["table"]) == 2
    final = json.loads((elsewhere / "final/policy.json").read_text())
    assert final["about"] == {"update": summary["chosen"]["update"]}
    assert weights_sha256(cpu_weights(load_policy(elsewhere / "final"))) == summary["weights_sha256"]
    numbers = [entry["number"] for entry in read_journal(elsewhere) if entry["kind"] == "played"]
    assert sorted(numbers) == list(range(summary["episodes"]))  # each once
    assert (tmp_path / "stored/summary.json").read_bytes() == (elsewhere / "summary.json").read_bytes()
    (tmp_path / "stored/summary.json").unlink()  # as if the last copies had failed
    assert launch.main(["train", *command, f"run.dir={elsewhere}", "run.resume=true"]) == 0
    assert (tmp_path / "stored/summary.json").read_bytes() == (elsewhere / "summary.json").read_bytes()
    kept = sorted({summary["best"]["update"], 2, 3})  # the newest two, and the best
    for place in (undisturbed, elsewhere, tmp_path / "stored"):
        assert sorted(path.name for path in (place / "checkpoints").iterdir()) == [f"{update:04d}" for update in kept]


def test_what_a_run_recorded_is_dissected_with_the_policy_that_played_it(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed, run := tmp_path / "run")
    names = json.loads((run / "summary.json").read_text())["policy_versions"]
    played = {e["report"]["policy_version"]: e["number"] for e in read_journal(run) if e["kind"] == "played"}
    assert {0, 1, 2} < played.keys()  # and versions that were published again, to be compared
    for version, number in played.items():
        result = tmp_path / "looks.json"
        code = launch.main(["dissect", str(run / f"episodes/{number:06d}.safetensors"), "--json", str(result)])
        update = names.get(str(version), version)
        if update and not (run / f"checkpoints/{update:04d}").exists():  # run.keep_checkpoints
            assert code == 2
            assert "name another policy: policy.checkpoint=DIR" in capsys.readouterr().err
        else:
            assert code == 0
            assert json.loads(result.read_text())["first_difference"] is None, version


@pytest.mark.parametrize(
    ("how", "state"),
    [
        pytest.param(signal.SIGINT, collected(0, 0.05), id="SIGINT"),
        pytest.param(signal.SIGTERM, played(9), id="SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_stopped_says_so_and_leaves_nothing_running(
    checkpoint: Path, tmp_path: Path, how: signal.Signals, state: State
) -> None:
    def left() -> set[str]:
        return {str(file) for folder in ("/tmp", "/dev/shm") for file in Path(folder).glob("*ript_ray-*")}

    before, run = left(), tmp_path / "run"
    process = start(*SETTINGS, "train.epochs=60", f"policy.checkpoint={checkpoint}", f"run.dir={run}")
    wait_until(process, lambda: state(run))
    processes = psutil.Process(process.pid).children(recursive=True)
    assert len(processes) > 5
    process.send_signal(how)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "nothing that was played is lost: python launch.py train --resume" in out
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive
    assert left() <= before
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert client.get_run((run / "mlflow-run").read_text().strip()).info.status == "KILLED"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_is_killed_anywhere_ends_the_same(checkpoint: Path, undisturbed: Path, tmp_path: Path) -> None:
    total = json.loads((undisturbed / "summary.json").read_text())["episodes"]
    rng = random.Random(0)
    counts = [*sorted(rng.sample(range(1, total - 8), 7)), total - 4 - 2]  # last, two updates' policies are compared
    stops = [(played(count), rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])) for count in counts]
    for step in range(3):
        at = tmp_path / f"learning-{step}"
        run_with_stops(checkpoint, at, [(collected(step, rng.random() * 0.5), signal.SIGKILL)])
        assert story(at) == story(undisturbed)
    run_with_stops(checkpoint, tmp_path / "run", stops)
    assert story(tmp_path / "run") == story(undisturbed)


@pytest.mark.slow
def test_a_run_goes_on_with_more_actors_and_ends_the_same(checkpoint: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [*SETTINGS, f"policy.checkpoint={checkpoint}", f"run.dir={run}"]
    stop_when(start(*command), run, played(12), signal.SIGKILL)
    finish(start(*command, "run.resume=true", "scaling.actors=5", "scaling.actor_cpus=0.2"))
    assert story(run) == story(undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_every_kind_of_process_may_be_killed(tmp_path: Path) -> None:
    file = tmp_path / "faults.json"
    kinds = len(FAULTS | CLUSTER_FAULTS)
    arguments = ["bench", "faults", "--config", "configs/faults.yaml", f"bench.injections={kinds}"]
    command = [sys.executable, "launch.py", *arguments, f"run.dir={tmp_path / 'runs'}", "--json", str(file)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=2300)
    result = json.loads(file.read_text())
    assert len(result["table"]) == result["injected"] == result["survived"] == kinds
    assert result["trajectories_lost"] == 0
    assert result["runs"] == result["runs_with_the_undisturbed_weights"]


@pytest.mark.slow
def test_an_asynchronous_run_loses_nothing_that_was_played(checkpoint: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    summary = run_with_stops(checkpoint, run, [(played(30), signal.SIGKILL)], "train.mode=async")
    journal = read_journal(run)
    numbers = [entry["number"] for entry in journal if entry["kind"] == "played"]
    assert len(numbers) == len(set(numbers))
    resumed = max(i for i, entry in enumerate(journal) if entry["kind"] == "session")
    before, after = (
        {kind: {entry.get("number") for entry in part if entry["kind"] == kind} for kind in ("began", "played")}
        for part in (journal[:resumed], journal[resumed:])
    )
    assert set(summary["played_again"]) == before["began"] & after["began"]  # none, where all had been written down
    assert not set(summary["played_again"]) & before["played"]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path: Path) -> None:
    for update in (1, 2):
        save_policy(tmp_path / f"{update:04d}", point_policy())
    file = tmp_path / "0002" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    update, policy, damaged = newest_policy(tmp_path, at_most=2)
    assert update == 1
    assert policy is not None
    assert len(damaged) == 1
    assert "0002" in damaged[0]
    assert "sha256 is not the one that was written" in damaged[0]
    save_policy(tmp_path / "0004", point_policy())
    (tmp_path / "unaveraged-0004").mkdir()  # without its files, from which training would go on
    update, _, damaged = newest_policy(tmp_path, at_most=4)
    assert update == 1  # 2 is damaged, too
    assert "unaveraged-0004" in damaged[0]
    for update in (9999, 10_000):
        save_policy(tmp_path / f"{update:04d}", point_policy())
    (tmp_path / "0003.aside").mkdir()  # by a person
    assert newest_policy(tmp_path, at_most=10_000)[0] == 10_000
    update, _, newer = newest_policy(tmp_path, at_most=1)  # the journal was cut, or restored without its end
    assert update == 1
    assert len(newer) == 4
    assert all("is newer than the journal" in reason for reason in newer)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    names = ["0001", "0002", "0003", "0010", "unaveraged-0002", "unaveraged-0010"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "policy.json").write_text("{}")
    prune_checkpoints(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name for name in names if name != "0001"]
    prune_checkpoints(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0003", "0010", "unaveraged-0010"]
    for update in (11, 12):
        (tmp_path / f"{update:04d}").mkdir()
    prune_checkpoints(tmp_path, 2, best=[2, 3, 10])  # the second is gone
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0003", "0011", "0012"]


def test_a_line_is_added_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    append_json_line(file, {"update": 1})
    before = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            append_json_line(file, {"update": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == before
    append_json_line(file, {"update": 2})
    assert read_json_lines(file) == [{"update": 1}, {"update": 2}]


@pytest.mark.slow
def test_an_update_that_would_fail_again_is_not_tried_again(checkpoint: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(*SETTINGS, "train.lr=1e30", f"policy.checkpoint={checkpoint}", f"run.dir={run}")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "try a lower train.lr" in err
    assert "starting again" not in err
    assert len(list((run / "faults").glob("update-1-rank-0.safetensors"))) == 1
    assert sum(entry["kind"] == "session" for entry in read_journal(run)) == 1


def test_a_disk_that_is_full_is_the_disks_fault_and_leaves_what_was_there(tmp_path: Path) -> None:
    trajectory = make_trajectory()
    file = tmp_path / "000000.safetensors"
    save_episode(file, EpisodeRecord.of(trajectory, 60), trajectory)
    before = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(OSError, match=r"000000.safetensors cannot be written: .*File too large"):
            save_episode(file, EpisodeRecord.of(trajectory, 60), trajectory)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == before


def test_a_line_that_was_cut_short_is_dropped_and_a_damaged_one_named(tmp_path: Path) -> None:
    from actors.journal import Journal

    journal = Journal(tmp_path)
    assert journal.settle("busy_groups", 3) == 3
    journal.given_up(0, "it hangs")
    journal.collected(0, "quota", 1.5)
    del journal
    file = tmp_path / "journal.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"kind": "coll')
    journal = Journal(tmp_path)
    assert journal.sessions == 2
    assert journal.settle("busy_groups", 4) == 3
    assert journal.take("collected") is None
    entry = journal.take("given_up")
    assert entry is not None
    assert entry["reason"] == "it hangs"
    assert journal.take("collected") is not None
    assert not journal.replaying
    del journal
    lines = whole.splitlines(keepends=True)
    file.write_text(lines[0] + lines[1][:20] + "\n" + lines[2])
    with pytest.raises(UserError, match=r"journal.jsonl: line 2 is damaged"):
        Journal(tmp_path)


@pytest.mark.slow
def test_a_soak_tells_how_each_lasting_process_grows(tmp_path: Path) -> None:
    arguments = ["bench", "soak", "--config", "configs/faults.yaml", "bench.soak_updates=20", "train.epochs=1"]
    arguments += [f"run.dir={tmp_path / 'soak'}", "--json", str(tmp_path / "soak.json")]
    done = subprocess.run([sys.executable, "launch.py", *arguments], cwd=ROOT, timeout=600, check=False)
    assert done.returncode == 0
    result = json.loads((tmp_path / "soak.json").read_text())
    names = {name.split()[0] for name in result["processes"]}
    assert {"driver", "raylet", "Coordinator", "SamplePool", "WeightStore", "RolloutActor"} <= names
    assert result["episodes"] >= 20 * 8 * 4
    assert all(row["mb"] > 5 and row["files"] > 0 for row in result["processes"].values())
    assert result["worst_mb_per_hour"] == max(row["mb_per_hour"] for row in result["processes"].values())


@pytest.mark.slow
def test_both_modes_are_compared_on_the_same_job(tmp_path: Path) -> None:
    arguments = ["bench", "async", "--config", "configs/faults.yaml", "train.updates=4"]
    arguments += [f"run.dir={tmp_path / 'async'}", "--json", str(tmp_path / "async.json")]
    done = subprocess.run([sys.executable, "launch.py", *arguments], cwd=ROOT, timeout=600, check=False)
    assert done.returncode == 0
    result = json.loads((tmp_path / "async.json").read_text())
    assert result["speedup"] == pytest.approx(result["sync"]["seconds"] / result["async"]["seconds"])
    assert result["sync"]["staleness"]["max"] <= 2
    for mode in ("sync", "async"):
        row = result[mode]
        assert 0 < row["learner_busy_share"] < 1
        assert 0 < row["actors_busy_share"] < 1
        assert 0 <= row["seconds_to_what_both_reach"] <= row["seconds"]
        assert row["evaluation"]["held_out"]["episodes"] == 8
