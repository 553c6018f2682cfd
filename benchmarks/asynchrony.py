"""Rollouts in turn with the learner against rollouts that go on meanwhile: the same job on the same machine."""

from __future__ import annotations

from typing import Any

from benchmarks.job import Job, new_folder, with_start
from ript_ray.config import Config
from ript_ray.data.lines import read_json_lines
from ript_ray.reporting import write_json

MODES = ("sync", "async")


def measure(config: Config) -> dict[str, Any]:
    """Train once in each mode with as many updates.

    Args:
        config: of the job; ``train.lead`` and ``train.max_staleness`` bound the asynchronous one. ``run.dir`` takes
            the files.

    Returns:
        By mode: seconds of training, seconds to the success that both reach, shares of time in which the learner and
        the actors worked, the ages of samples in versions, and the final success; and the ratio of the times.

    Raises:
        UserError: when a job fails.
    """
    folder = new_folder(config, "async")
    config = with_start(config, folder)
    done: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    for mode in MODES:
        train = config.train.model_copy(update={"mode": mode})
        job = Job(config.model_copy(update={"train": train}), folder / mode)
        done[mode] = job.finish(config.bench.job_timeout_s), read_json_lines(job.folder / "metrics.jsonl")
    both_reach = min(max(success for _, success in _curve(rows)) for _, rows in done.values())
    result: dict[str, Any] = {"benchmark": "async", "env": config.env.id, "both_reach": both_reach}
    result |= {mode: _told(*done[mode], config.scaling.actors, both_reach) for mode in MODES}
    result["speedup"] = result["sync"]["seconds"] / result["async"]["seconds"]
    write_json(folder / "async.json", result)
    return result


def _began(rows: list[dict[str, Any]]) -> float:
    """When the first rollouts for training began."""
    first = next(row for row in rows if "rollout/seconds" in row)
    return float(first["time"] - first["rollout/seconds"])


def _curve(rows: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Seconds until the rollouts of each update were there, and their success."""
    began = _began(rows)
    return [(row["time"] - began, row["rollout/success_rate"]) for row in rows if "rollout/success_rate" in row]


def _told(summary: dict[str, Any], rows: list[dict[str, Any]], actors: int, goal: float) -> dict[str, Any]:
    seconds = max(row["time"] for row in rows) - _began(rows)
    acted = sum(row.get(f"rollout/{part}_s", 0.0) for row in rows for part in ("physics", "render", "inference"))
    return {
        "seconds": seconds,
        "seconds_to_what_both_reach": min(at for at, success in _curve(rows) if success >= goal),
        "learner_busy_share": summary["seconds"]["learner_busy"] / seconds,
        "actors_busy_share": acted / (actors * seconds),
        "staleness": summary["staleness"],
        "evaluation": {name: column["final"] for name, column in summary["evaluation"].items()},
    }
