"""A run told from its directory: info, comparison, the report page and its server."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.serving import report_server
from launch import main
from ript_ray.config import Config, save_config
from ript_ray.errors import UserError
from ript_ray.evaluation import success_summary
from ript_ray.report import MAX_POINTS, curve, report_html, report_json, write_report
from ript_ray.runs import Run, compare_runs, difference_interval, policy_that_played, settings_tried


def write_run(
    folder: Path, updates: int, seed: int = 0, tasks: tuple[str, ...] = (), final: int | None = None, **env: Any
) -> list[dict[str, Any]]:
    """A run directory as a training job leaves it, with made-up numbers; the rows of rollouts."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    save_config(
        Config.model_validate({"run": {"seed": seed}, "env": env, "train": {"updates": updates}}),
        folder / "config.yaml",
    )
    rows, lines = [], []
    for update in range(1, updates + 1):
        row: dict[str, Any] = {"time": 1.8e9 + update, "update": update}
        for section in ("rollout", *(f"task/{task}" for task in tasks)):
            episodes = int(rng.integers(8, 100))
            row[f"{section}/episodes"] = episodes
            row[f"{section}/success_rate"] = int(rng.integers(0, episodes + 1)) / episodes
        row |= {"rollout/groups_accepted": 3, "rollout/groups_rejected": 2, "rollout/groups_all_failed": 2}
        row |= {"rollout/physics_s": float(rng.random()), "rollout/seconds": 5.0, "rollout/staleness": 0.5}
        learnt = {
            "time": row["time"],
            "update": update,
            "learner/steps": 10.0,
            "learner/loss": 0.1,
            "learner/busy_s": 2.0,
        }
        rows.append(row)
        lines += [row, learnt]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "journal.jsonl").write_text('{"kind": "fault", "time": 1.0, "text": "actor 1 died </script>"}\n')
    if final is not None:
        base, end = success_summary([False] * 50), success_summary([True] * final + [False] * (50 - final))
        summary = {
            "env": "libero_object/0",
            "updates": updates,
            "episodes": 400,
            "env_steps": 40_000,
            "groups": {"accepted": 3, "rejected": 2},
            "evaluation": {"held_out": {"base": base, "final": end, "paired_p": 1e-5}},
            "seconds": {"total": 600.0, "rollout": 300.0, "learner_busy": 200.0, "learner_idle": 100.0},
            "errors": [],
            "versions": {"torch": "2.13.0"},
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return rows


def test_a_long_run_becomes_few_points_that_keep_every_episode(tmp_path: Path) -> None:
    rows = write_run(tmp_path / "run", 10_000)
    points = curve(rows, "rollout")
    assert len(points) <= MAX_POINTS
    assert sum(point["n"] for point in points) == sum(row["rollout/episodes"] for row in rows)
    first = rows[: int(points[0]["last"])]
    successes = sum(row["rollout/episodes"] * row["rollout/success_rate"] for row in first)
    assert points[0]["rate"] == pytest.approx(successes / sum(row["rollout/episodes"] for row in first), rel=1e-3)
    assert points[0]["low"] < points[0]["rate"] < points[0]["high"]
    assert points[0]["physics_s"] == pytest.approx(sum(row["rollout/physics_s"] for row in first), rel=1e-3)
    odd = curve([row | {"rollout/episodes": 12_813} for row in rows[:1]], "rollout")
    assert odd[0]["n"] == 12_813
    assert "loss" not in odd[0]  # it is not learnt yet
    assert [point["first"] for point in points[1:]] == [point["last"] + 1 for point in points[:-1]]


def test_the_page_of_a_long_run_is_small_and_asks_nobody_else(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 10_000, tasks=tuple(f"libero_object/{i}" for i in range(10)))
    page = write_report(tmp_path / "run").read_text()
    assert len(page.encode()) < 2_000_000
    # The one address in it is the name of a format, which nobody fetches.
    assert set(re.findall(r"https?://[^\"'\s]+", page)) == {"http://www.w3.org/2000/svg"}
    assert page.count("</script>") == 1  # that in the fault's text is escaped


def test_an_evaluation_was_played_by_the_policy_that_it_names(tmp_path: Path) -> None:
    settings = Config.model_validate({"policy": {"checkpoint": str(tmp_path / "mine")}})
    save_config(settings, tmp_path / "config.yaml")
    assert policy_that_played(tmp_path / "episodes/000000.safetensors", 0) == tmp_path / "mine"
    assert policy_that_played(tmp_path / "nothing/episodes/000000.safetensors", 0) is None


def test_the_settings_that_were_tried_are_counted(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 1)
    write_run(tmp_path / "another seed", 1, seed=1)
    write_run(tmp_path / "another task", 1, id="libero_object/1")
    assert settings_tried(tmp_path / "a") == settings_tried(tmp_path / "another task") == 1
    write_run(tmp_path / "more updates", 2)
    write_run(tmp_path / "larger frames", 1, image_size=128)
    assert settings_tried(tmp_path / "a") == settings_tried(tmp_path / "more updates") == 3
    (tmp_path / "larger frames" / "metrics.jsonl").unlink()  # it never trained
    assert settings_tried(tmp_path / "a") == 2
    for i, text in enumerate(["", "env: {id: libero_object/0}", "env: [", "[1, 2]", "\x00"]):  # of other programs
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "config.yaml").write_text(text)
        (tmp_path / str(i) / "metrics.jsonl").touch()
    assert settings_tried(tmp_path / "a") == 2


def test_a_run_tells_its_story_finished_or_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "half", 2)
    assert main(["info", str(tmp_path / "half"), "--json", str(tmp_path / "info.json")]) == 0
    said = capsys.readouterr().out
    assert "not finished; update 2" in said
    assert "survived: actor 1 died" in said
    assert "train.updates=2" in said
    assert json.loads((tmp_path / "info.json").read_text())["summary"] is None
    write_run(tmp_path / "whole", 2, final=40)
    assert main(["info", str(tmp_path / "whole")]) == 0
    assert "80% (40/50" in capsys.readouterr().out
    assert main(["info", str(tmp_path)]) == 2
    assert "no config.yaml there" in capsys.readouterr().err


def test_what_differs_between_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a", 2, final=20)
    write_run(tmp_path / "b", 3, seed=1, final=40, image_size=128)
    result = compare_runs(Run.load(tmp_path / "a"), Run.load(tmp_path / "b"))
    assert set(result["settings"]) == {"run.seed", "env.image_size", "train.updates"}
    assert [row["update"] for row in result["training"]] == [1, 2]
    assert result["evaluation"]["held_out"]["difference"] == pytest.approx(0.4)
    # Fisher's exact test by its definition: tables with the same margins that are no more likely than this one.
    from math import comb

    chances = [comb(50, k) * comb(50, 60 - k) / comb(100, 60) for k in range(10, 51)]
    expected = sum(chance for chance in chances if chance <= chances[10] * (1 + 1e-9))
    assert result["evaluation"]["held_out"]["p"] == pytest.approx(expected)
    for name in "ab":  # two episodes from each start, with the same outcome
        file = tmp_path / name / "summary.json"
        summary = json.loads(file.read_text())
        summary["evaluation"]["held_out"]["final"]["effective_episodes"] = 25.0
        file.write_text(json.dumps(summary))
    chances = [comb(25, k) * comb(25, 30 - k) / comb(50, 30) for k in range(5, 26)]
    expected = sum(chance for chance in chances if chance <= chances[5] * (1 + 1e-9))
    result = compare_runs(Run.load(tmp_path / "a"), Run.load(tmp_path / "b"))
    assert result["evaluation"]["held_out"]["p"] == pytest.approx(expected)
    assert main(["compare-runs", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "env.image_size: 64 → 128" in capsys.readouterr().out


def test_the_interval_of_a_difference_is_newcombes() -> None:
    # Newcombe 1998, Table II: 56/70 − 48/80 by method 10.
    first, second = success_summary([True] * 48 + [False] * 32), success_summary([True] * 56 + [False] * 14)
    assert difference_interval(first, second) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_a_run_serves_its_page_and_nothing_else(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, 3)
    (run / "videos").mkdir()
    (run / "videos" / "00003-failure.mp4").write_bytes(b"film")

    def get(path: str) -> bytes:
        with urllib.request.urlopen(f"{address}{path}", timeout=10) as answer:
            return bytes(answer.read())

    with report_server(run, "127.0.0.1", 0) as address:
        assert get("/").decode() == report_html(report_json(Run.load(run)))
        assert json.loads(get("/report.json"))["updates"] == {"done": 3, "planned": 3}
        assert get("/videos/00003-failure.mp4") == b"film"
        part = urllib.request.Request(f"{address}/videos/00003-failure.mp4", headers={"Range": "bytes=1-2"})
        with urllib.request.urlopen(part, timeout=10) as answer:
            assert (answer.status, answer.headers["Content-Range"], answer.read()) == (206, "bytes 1-2/4", b"il")
        part.add_header("Range", "bytes=4-")
        with pytest.raises(urllib.error.HTTPError, match="416"):
            urllib.request.urlopen(part, timeout=10)
        for path in ("/config.yaml", "/videos/../config.yaml", "/videos/..%2Fconfig.yaml", "/videos/no.mp4"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                get(path)
        port = int(str(address).rpartition(":")[2])
        with (
            pytest.raises(UserError, match=f"run.report_port={port}: cannot listen"),
            report_server(run, "127.0.0.1", port),
        ):
            pass
    with pytest.raises(urllib.error.URLError):
        get("/")


@pytest.mark.slow
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    """A run of 10,000 updates is shown within a second by a real browser, on a phone's width too."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "this test needs a browser: apt-get install chromium"
    write_run(tmp_path / "run", 10_000, tasks=("libero_object/0", "libero_object/1"), final=40)
    page = write_report(tmp_path / "run")
    # The time at which all is drawn, and whether anything is wider than the window, written where --dump-dom shows it.
    probe = """<script>
      const count = name => document.querySelectorAll(name).length;
      const wide = document.documentElement.scrollWidth > innerWidth;  // lays everything out, before the clock is read
      document.title = JSON.stringify({ms: performance.now(), wide, charts: count("svg"), paths: count("path"),
        tasks: count("option"), state: document.getElementById("state").textContent});
    </script>"""
    page.write_text(page.read_text().replace("</html>", probe + "</html>"))
    for width in (390, 1280):
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
        began = time.monotonic()
        done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
        assert time.monotonic() - began < 60
        title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
        assert title, done.stdout[:2000]
        seen = json.loads(title[1].replace("&amp;", "&"))
        assert seen["charts"] == 6
        assert seen["paths"] >= 12
        assert seen["tasks"] == 3
        assert not seen["wide"]
        assert seen["state"].startswith("finished: 10000 updates")
        assert seen["ms"] < 1000
