"""The report page of a run: one HTML file without external requests, and the data that it shows.

The page is `report.html` beside this file with the data put in as JSON. Opened from the disk it shows these; served by
a run it asks for newer ones (``report.json``) every few seconds.
"""

from __future__ import annotations

import json
import math
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from ript_ray.evaluation import wilson_interval
from ript_ray.reporting import write_text
from ript_ray.runs import Run

VIDEOS = "videos"
"""Folder of a run with the newest rollouts as videos, and a JSON file of captions."""
CAPTIONS = "captions.json"
_SHARE = 0.01
"""Of the time, that keeping the page of a running job up to date may take."""
MAX_POINTS = 400
"""Points of a curve; a longer run shows several updates together as one."""
_SUMS = (
    "rollout/groups_accepted",
    "rollout/groups_all_failed",
    "rollout/groups_all_succeeded",
    "rollout/physics_s",
    "rollout/render_s",
    "rollout/inference_s",
    "rollout/seconds",
    "learner/busy_s",
    "learner/idle_s",
    "rollout/errors",
)
_MEANS = ("rollout/staleness", "learner/loss", "learner/grad_norm")


def report_data(run: Run) -> dict[str, Any]:
    """Everything the page shows, as plain values."""
    tasks = sorted({key.split("/", 1)[1].rsplit("/", 1)[0] for row in run.rows for key in row if key[:5] == "task/"})
    scaling = run.config.scaling
    captions = run.folder / VIDEOS / CAPTIONS
    return {
        "title": run.folder.name,
        "env": run.config.env.id,
        "objective": run.config.objective.name,
        "state": run.state(),
        "finished": run.summary is not None,
        "updates": {"done": len([r for r in run.rows if "learner/steps" in r]), "planned": run.config.train.updates},
        "points": curve(run.rows, "rollout"),
        "tasks": {task: curve(run.rows, f"task/{task}") for task in tasks} if len(tasks) > 1 else {},
        "evaluation": run.summary["evaluation"] if run.summary else {},
        "evaluation_by_task": run.summary.get("tasks", {}) if run.summary else {},
        "videos": json.loads(captions.read_text()) if captions.exists() else [],
        "plan": {
            "rollout actors": f"{scaling.actors} × {scaling.actor_cpus:g} CPU, {scaling.actor_gpus:g} GPU",
            "learners": f"{scaling.learners} × {scaling.learner_cpus:g} CPU, {scaling.learner_gpus:g} GPU",
            "mode": run.config.train.mode,
            "episodes of an update": f"{run.config.sampling.groups} to {run.config.sampling.max_groups} groups of "
            f"{run.config.sampling.group_size}",
        },
        "settings": {key: str(value) for key, value in run.changed_settings().items()},
        "faults": run.faults,
        "versions": run.summary["versions"] if run.summary else {},
    }


def curve(rows: list[dict[str, Any]], section: str) -> list[dict[str, float]]:
    """Success of a section by update, with the sums and means that the charts stack.

    At most `MAX_POINTS` points: of several updates together, episodes and successes are added up, which keeps the
    intervals right.
    """
    known = [row for row in rows if f"{section}/episodes" in row]
    size = max(1, math.ceil(len(known) / MAX_POINTS))
    points = []
    for at in range(0, len(known), size):
        part = known[at : at + size]
        episodes = sum(int(row[f"{section}/episodes"]) for row in part)
        successes = sum(round(row[f"{section}/success_rate"] * row[f"{section}/episodes"]) for row in part)
        effective = sum(row.get(f"{section}/effective_episodes", row[f"{section}/episodes"]) for row in part)
        low, high = wilson_interval(successes * effective / max(1, episodes), effective)
        point = {
            "first": part[0]["update"],
            "last": part[-1]["update"],
            "n": episodes,
            "rate": successes / max(1, episodes),
        }
        point |= {"low": low, "high": high}
        if section == "rollout":
            for key in (*_SUMS, *_MEANS):
                if values := [row[key] for row in part if key in row]:  # else it is not known (yet)
                    point[key.split("/")[1]] = sum(values) / (len(values) if key in _MEANS else 1)
        points.append({key: v if isinstance(v, int) else float(f"{v:.4g}") for key, v in point.items()})
    return points


def report_json(run: Run) -> str:
    """`report_data` as text that may stand in a script, which "</script>" in a string would end."""
    return json.dumps(report_data(run), separators=(",", ":")).replace("<", "\\u003c")


def report_html(data: str) -> str:
    """The page with the data of a run in it, as `report_json` gives it."""
    return files(__package__).joinpath("report.html").read_text(encoding="utf-8").replace('"RUN_DATA"', data)


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run directory; it appears complete or not at all.

    Raises:
        UserError: when it is no run directory.
    """
    file = run_dir / "report.html"
    write_text(file, report_html(report_json(Run.load(run_dir))))
    return file


class LiveReport:
    """Keeps the page of a running job up to date; less often as the run, and with it the reading of it, gets longer."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._next = 0.0

    def __call__(self, row: dict[str, Any]) -> None:
        """Called with each row of metrics."""
        began = time.monotonic()
        if began >= self._next:
            write_report(self._run_dir)
            self._next = began + (time.monotonic() - began) / _SHARE
