"""What a finished run says of itself: its summary, and the files it leaves for people."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import ray

from ript_ray.config import Config
from ript_ray.evaluation import before_and_after, by_task, evaluation_contexts
from ript_ray.report import write_report
from ript_ray.reporting import describe_summary, plot_success, versions, write_json, write_video

log = logging.getLogger("ript_ray")


def summarise(
    config: Config,
    base: dict[str, Any],
    final: dict[str, Any],
    totals: dict[str, Any],
    counts: dict[str, Any],
    rows: list[dict[str, Any]],
    renderer: str,
) -> dict[str, Any]:
    """The content of ``summary.json``."""
    contexts = evaluation_contexts(config)
    seconds = totals.pop("seconds")
    for part in ("busy", "idle"):
        seconds[f"learner_{part}"] = sum(row.get(f"learner/{part}_s", 0.0) for row in rows)
    frames = totals.pop("frames")
    rendered = frames["looked"] + counts.pop("training_frames")
    return {
        "env": config.env.id,
        "evaluation": {
            name: before_and_after(contexts[name], base["results"][name], after)
            for name, after in final["results"].items()
        },
        "frames": {"rendered": rendered, "eager": frames["eager"], "share": rendered / max(1, frames["eager"])},
        "tasks": {
            name: by_task(contexts[name], base["results"][name], after) for name, after in final["results"].items()
        }
        if len(config.env.ids) > 1
        else {},
        "held_out_init_states": list(config.env.eval_init_states),
        "train_init_states": list(config.env.train_init_states),
        "train_placements": config.env.train_placements,
        **totals,
        **counts,
        "seconds": seconds,
        "learner_peak_memory_mb": max((row.get("learner/peak_memory_mb", 0.0) for row in rows), default=0.0),
        "versions": versions(renderer),
    }


def leave_behind(
    run_dir: Path, summary: dict[str, Any], rows: list[dict[str, Any]], actor: Any, outcomes: dict[str, Any]
) -> None:
    """Write summary, curve, and videos of a failed and of a successful rollout before and after."""
    try:
        plot_success(run_dir / "success.png", summary, rows)
        for when, outcome in outcomes.items():
            for success, kept in outcome["kept"].items():
                for reference in kept.values():
                    frames = ray.get(actor.film.remote(reference), timeout=300)
                    write_video(run_dir / f"{when}-{'success' if success else 'failure'}.mp4", frames, 10.0)
    except Exception:  # whatever it is, the run is finished and does not fail for want of a picture
        log.exception("no picture of success, or no video of every outcome")
    write_json(run_dir / "summary.json", summary)  # last: with it the run is finished, and not resumed any more
    for error in summary["errors"]:
        log.warning("survived: %s", error)
    log.info(describe_summary(summary))
    try:
        write_report(run_dir)
        print(describe_summary(summary))
        print(f"  everything in {run_dir}")
    except OSError:  # of the disk, or of a terminal that is gone
        log.exception("the run is finished, though not told of")
