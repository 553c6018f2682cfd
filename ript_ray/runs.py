"""A run as its directory tells it, finished or not: for ``info``, ``compare-runs`` and the report page."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from ript_ray.config import LEARNING, Config, load_config, resolve
from ript_ray.data.lines import read_json_lines
from ript_ray.errors import UserError
from ript_ray.evaluation import wilson_interval
from ript_ray.reporting import describe_rate, describe_summary

log = logging.getLogger("ript_ray")


@dataclass(frozen=True, slots=True)
class Run:
    """What is known of a run."""

    folder: Path
    config: Config
    rows: list[dict[str, Any]]
    """Metrics of each update, of rollouts and of the learner together, in order."""
    summary: dict[str, Any] | None
    """None while it is not finished."""
    faults: list[str]
    """That it survived so far."""

    @classmethod
    def load(cls, folder: Path) -> Run:
        """Read a run directory.

        Raises:
            UserError: when it is none, or when a file in it is damaged.
        """
        if not (folder / "config.yaml").is_file():
            raise UserError(f"{folder}: no config.yaml there; expected a directory that train made, for example runs/…")
        updates: dict[int, dict[str, Any]] = {}
        for row in read_json_lines(folder / "metrics.jsonl"):
            updates.setdefault(int(row["update"]), {}).update(row)
        summary = None
        if (folder / "summary.json").exists():
            try:
                summary = json.loads((folder / "summary.json").read_text())
            except ValueError as error:
                raise UserError(f"{folder / 'summary.json'} is damaged: {error}") from error
        journal = folder / "journal.jsonl"
        entries = read_json_lines(journal, containing='"fault"') if summary is None else []
        faults = [entry["text"] for entry in entries if entry["kind"] == "fault"]
        return cls(
            folder=folder,
            config=load_config(folder / "config.yaml", []),
            rows=[updates[update] for update in sorted(updates)],
            summary=summary,
            faults=faults if summary is None else summary["errors"],
        )

    @property
    def settings(self) -> dict[str, Any]:
        """All settings by dotted key."""
        return _flat(self.config)

    def changed_settings(self) -> dict[str, Any]:
        """Settings that are not the types' defaults."""
        return {key: self.settings[key] for key in self.changed_by(Config())}

    def changed_by(self, config: Config) -> list[str]:
        """Keys whose values differ in another configuration."""
        others = _flat(config)
        return [key for key, value in self.settings.items() if value != others[key]]

    def state(self) -> str:
        """Finished or not, in words."""
        if self.summary is not None:
            return f"finished: {self.summary['updates']} updates in {self.summary['seconds']['total'] / 60:.1f} min"
        if not self.rows:
            return "not finished; no update yet"
        seen = datetime.fromtimestamp(self.rows[-1]["time"])
        return f"not finished; update {self.rows[-1]['update']}, last heard of {seen:%Y-%m-%d %H:%M:%S}"


def settings_tried(run_dir: Path) -> int:
    """In how many settings training was tried on a run's task, by it and the runs in the same folder.

    Seeds, names, and where and how wide a run ran make no other setting. Whoever picks the best of many has to say so.
    """
    own = _what_was_tried(run_dir / "config.yaml")
    tried = [own]
    for file in run_dir.resolve().parent.glob("*/config.yaml"):
        try:
            if (file.parent / "metrics.jsonl").exists():
                tried.append(_what_was_tried(file))
        except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError):  # it is no run, or none of ours
            log.warning("%s is not counted among the settings that were tried", file)
    return len({yaml.safe_dump(settings) for settings in tried if settings["env"]["id"] == own["env"]["id"]})


def policy_folder(run_dir: Path, update: int) -> Path:
    """Where a run has the policy of an update; of 0, the one that it began with."""
    return run_dir / "checkpoints" / f"{update:04d}" if update else run_dir / "start"


def policy_that_played(episode: Path, version: int) -> Path | None:
    """The folder of the policy that played an episode which is in a directory of train, eval or guidance; None where it
    is in no such.

    Raises:
        UserError: when the run has its checkpoint no more.
    """
    run_dir = episode.resolve().parent.parent
    if not (run_dir / "start").is_dir():  # it learnt nothing
        config = run_dir / "config.yaml"
        return resolve(load_config(config, []).policy.checkpoint) if config.exists() else None
    summary = run_dir / "summary.json"
    names = json.loads(summary.read_text()).get("policy_versions", {}) if summary.exists() else {}
    update = names.get(str(version), version)
    folder = policy_folder(run_dir, update)
    if not folder.is_dir():
        raise UserError(
            f"{episode} was played by the policy of update {update}, and {folder} is not there (any more: "
            "run.keep_checkpoints); name another policy: policy.checkpoint=DIR"
        )
    return folder


def _what_was_tried(file: Path) -> dict[str, Any]:
    # As it stands there: a run of an earlier version may have keys that are no more.
    settings = yaml.safe_load(file.read_text())
    tried = {name: settings[name] for name in LEARNING}
    if "id" not in tried["env"]:
        raise LookupError("env.id")
    return tried


def describe_run(run: Run) -> str:
    """A run's story: its settings, each update, its end and its faults."""
    lines = [f"{run.folder}: {run.config.env.id}, {run.config.objective.name}, seed {run.config.run.seed}", run.state()]
    lines.append("  settings: " + ", ".join(f"{key}={value}" for key, value in run.changed_settings().items()))
    lines.append(
        "  update  training success                       groups +/−   learner steps  loss     rollouts  learning"
    )
    for row in run.rows:
        rolled = _rate(row) if "rollout/episodes" in row else ""
        groups = f"{row.get('rollout/groups_accepted', 0):.0f}/{row.get('rollout/groups_rejected', 0):.0f}"
        learnt = (
            f"{row['learner/steps']:>13.0f}  {row.get('learner/loss', 0):<8.4f}" if "learner/steps" in row else " " * 23
        )
        seconds = f"{row.get('rollout/seconds', 0):>7.0f} s {row.get('learner/busy_s', 0):>7.0f} s"
        lines.append(f"  {row['update']:>6}  {rolled:<38} {groups:<12} {learnt} {seconds}")
    if run.summary is not None:
        lines.append(describe_summary(run.summary))
        lines.append("  versions: " + ", ".join(f"{name} {found}" for name, found in run.summary["versions"].items()))
    lines += [f"  survived: {fault}" for fault in run.faults] or ["  no faults"]
    return "\n".join(lines)


def compare_runs(first: Run, second: Run) -> dict[str, Any]:
    """What differs between two runs.

    Returns:
        ``settings`` and ``versions`` (pairs of those that differ), ``training`` (for each update both have: both
        summaries and whether their 95 % intervals are disjoint), and ``evaluation`` (for each column: both final
        summaries, their difference with its interval, and a p value), the last two without runs that have none.
    """
    from scipy.stats import fisher_exact

    settings = {k: (v, second.settings[k]) for k, v in first.settings.items() if v != second.settings[k]}
    found = [run.summary["versions"] if run.summary else {} for run in (first, second)]
    names = sorted(found[0].keys() & found[1].keys())
    rows = [{row["update"]: row for row in run.rows if "rollout/episodes" in row} for run in (first, second)]
    training = []
    for update in sorted(rows[0].keys() & rows[1].keys()):
        pair = [rollout_success(side[update]) for side in rows]
        apart = pair[0]["ci95"][0] > pair[1]["ci95"][1] or pair[1]["ci95"][0] > pair[0]["ci95"][1]
        training.append({"update": update, "first": pair[0], "second": pair[1], "disjoint": apart})
    evaluation = {}
    if first.summary and second.summary:
        ends = [run.summary["evaluation"] for run in (first, second) if run.summary]
        for name in ends[0].keys() & ends[1].keys():
            a, b = (end[name]["final"] for end in ends)
            if not a["episodes"] or not b["episodes"]:  # none of them could be played to its end
                continue
            table = [_effective_counts(x) for x in (a, b)]
            evaluation[name] = {
                "first": a,
                "second": b,
                "difference": b["rate"] - a["rate"],
                "ci95": list(difference_interval(a, b)),
                "p": float(fisher_exact(table).pvalue),
            }
    versions = {name: (found[0][name], found[1][name]) for name in names if found[0][name] != found[1][name]}
    return {"settings": settings, "versions": versions, "training": training, "evaluation": evaluation}


def difference_interval(first: dict[str, Any], second: dict[str, Any]) -> tuple[float, float]:
    """The 95 % interval of the difference of two success rates, second less first (Newcombe 1998, method 10)."""
    (low_a, high_a), (low_b, high_b) = first["ci95"], second["ci95"]
    a, b = first["rate"], second["rate"]
    below = ((b - low_b) ** 2 + (high_a - a) ** 2) ** 0.5
    above = ((high_b - b) ** 2 + (a - low_a) ** 2) ** 0.5
    return b - a - below, b - a + above


def describe_comparison(first: Run, second: Run, result: dict[str, Any]) -> str:
    """What `compare_runs` found, for people."""
    lines = [f"{first.folder} → {second.folder}"]
    lines += [f"  {key}: {a} → {b}" for key, (a, b) in result["settings"].items()] or ["  the same settings"]
    lines += [f"  version of {name}: {a} → {b}" for name, (a, b) in result["versions"].items()]
    for row in result["training"]:
        told = "  (intervals disjoint)" if row["disjoint"] else ""
        lines.append(f"  update {row['update']}: {describe_rate(row['first'])} → {describe_rate(row['second'])}{told}")
    for name, column in result["evaluation"].items():
        low, high = column["ci95"]
        lines.append(
            f"  {name.replace('_', ' ')} at the end: {describe_rate(column['first'])} → "
            f"{describe_rate(column['second'])}, difference {column['difference']:+.0%} (95 % interval {low:+.0%} to "
            f"{high:+.0%}), Fisher's exact p = {column['p']:.2g} with as many independent episodes as tell as much"
        )
    if result["evaluation"]:
        lines.append(
            "  the intervals are those of these two policies: another run with the same settings can end several "
            "points off, so settings are compared over several run.seed"
        )
    else:
        lines.append("  no final evaluation of both to compare")
    return "\n".join(lines)


def _effective_counts(summary: dict[str, Any]) -> tuple[int, int]:
    """Successes and failures of so many independent episodes as tell as much."""
    episodes = round(summary.get("effective_episodes", summary["episodes"]))  # an earlier version had none
    successes = round(summary["rate"] * episodes)
    return successes, episodes - successes


def _flat(config: Config) -> dict[str, Any]:
    sections = config.model_dump(mode="json")
    return {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}


def rollout_success(row: dict[str, Any]) -> dict[str, Any]:
    """The success of an update's rollouts, from its row of metrics; as `success_summary` has it."""
    episodes = int(row["rollout/episodes"])
    effective, rate = row.get("rollout/effective_episodes", episodes), row["rollout/success_rate"]
    return {
        "successes": round(rate * episodes),
        "episodes": episodes,
        "effective_episodes": effective,
        "rate": rate,
        "ci95": list(wilson_interval(rate * effective, effective)),
    }


def _rate(row: dict[str, Any]) -> str:
    return describe_rate(rollout_success(row))
