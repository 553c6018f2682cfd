"""A search over settings with Ray Tune: each trial is a training job of its own, as a user would start it.

Trials are compared by the success of their training rollouts, never by held-out states: the exam must not choose.
Every update is reported, so that bad trials end early (ASHA, Li et al. 2020). The search, and each job in it, goes on
where it was interrupted when the same command, with `run.dir`, is given again.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import tune as ray_tune
from ray.tune.schedulers import ASHAScheduler

from cluster.session import ResourcePlan, ray_session
from ript_ray.config import LEARNING, Config, known_keys, load_config
from ript_ray.data.lines import read_json_lines
from ript_ray.errors import UserError, nearest
from ript_ray.runs import rollout_success

METRIC = "success_low"
"""Lower end of the 95 % interval of the last update's rollouts."""
_PROJECT = Path(__file__).parents[1]
_POLL_S = 1.0
_END_TIMEOUT_S = 120.0


def search(
    config: Config, space: dict[str, Any], config_file: Path, settings: list[str], run_dir: Path
) -> dict[str, Any]:
    """Run ``tune.trials`` jobs whose settings are drawn from a space, or one for each point of a grid.

    Args:
        config: as each job has it, apart from what is searched.
        space: from `search_space`.
        config_file: of the jobs.
        settings: ``section.key=value`` of the command line, for the jobs too.
        run_dir: holds the search and the jobs' own folders.

    Returns:
        ``best`` (its settings, folder and success) and ``trials``, the best first.
    """
    own = _of_jobs(settings)
    begun = ray_tune.Tuner.can_restore(str(run_dir.resolve() / "search"))
    _same_search(run_dir / "search.json", begun, config, load_config(config_file, own))
    with ray_session(config.scaling, ResourcePlan.of(config.scaling, jobs=config.tune.parallel)):
        job = {
            "command": [
                sys.executable,
                str(_PROJECT / "launch.py"),
                "train",
                "--config",
                str(config_file.resolve()),
                *own,
            ],
            "address": ray.get_runtime_context().gcs_address,
            "folder": str(run_dir.resolve() / "jobs"),
            "storage": config.run.storage,
        }
        # A trial only watches its job, which reserves for itself; but Tune wants every trial to reserve something.
        trainable = ray_tune.with_resources(ray_tune.with_parameters(_trial, job=job), {"memory": 1e6})
        storage = run_dir.resolve()
        if begun:
            tuner = ray_tune.Tuner.restore(str(storage / "search"), trainable, resume_errored=True)
        else:
            tuner = ray_tune.Tuner(
                trainable,
                param_space=space,
                tune_config=ray_tune.TuneConfig(
                    metric=METRIC,
                    mode="max",
                    num_samples=1 if _is_grid(config) else config.tune.trials,
                    max_concurrent_trials=config.tune.parallel,
                    scheduler=_scheduler(most_updates(config)),
                ),
                run_config=ray_tune.RunConfig(name="search", storage_path=str(storage), verbose=1),
            )
        results = tuner.fit()
    trials = sorted((_told(result) for result in results), key=_worth, reverse=True)
    for trial in trials:
        words = " ".join(_word(key, value) for key, value in trial["settings"].items())
        failed = f"; failed: {trial['error'].strip().splitlines()[-1]}" if trial["error"] else ""
        print(f"  {trial['successes']}/{trial['episodes']} after {trial['updates']} updates: {words}{failed}")
    if not trials[0]["episodes"]:
        raise UserError(f"no trial finished an update; what they said is in {run_dir / 'jobs'}/*.log")
    return {"best": trials[0], "trials": trials}


def _worth(trial: dict[str, Any]) -> tuple[bool, bool, float]:
    """A trial that was ended early was worse than others at the same update, whatever its last one shows."""
    return trial["error"] is None, trial["held_out"] is not None, trial["success_low"]


def _scheduler(updates: int) -> ASHAScheduler | None:
    """Ends the worse trials early. The first update's rollouts are played by the starting policy and tell nothing."""
    return ASHAScheduler(time_attr="update", grace_period=2, max_t=updates + 1) if updates > 2 else None


def most_updates(config: Config) -> int:
    """Of any trial: one that has done as many is at its end."""
    return max(_updates(config))


def _updates(config: Config) -> list[int]:
    """How many a trial may have; of a range both ends."""
    searched = config.tune.search.get("train.updates", [config.train.updates])
    return [int(searched[end]) for end in ("low", "high")] if isinstance(searched, dict) else searched


def _same_search(file: Path, begun: bool, config: Config, jobs: Config) -> None:
    """Note what is searched, or compare it with what the search began with: Tune would go on with that unasked.

    Raises:
        UserError: when it is another search.
    """
    parts = jobs.model_dump(mode="json", include=set(LEARNING))
    own = {"tune.search": config.tune.search, "tune.trials": config.tune.trials, "run.seed": jobs.run.seed}
    asked = json.loads(json.dumps(parts | own))
    if not begun or not file.exists():
        file.write_text(json.dumps(asked, indent=2) + "\n")
        return
    known = json.loads(file.read_text())
    if other := [key for key in asked if asked[key] != known.get(key)]:
        raise UserError(
            f"run.dir={str(file.parent)!r}: the search there began with other settings ({', '.join(other)}); give the "
            "same to go on with it, or another run.dir"
        )


def search_space(config: Config, config_file: Path, settings: list[str]) -> dict[str, Any]:
    """Ray Tune's search space: a list is a choice, {low, high} and {low, high, log: true} are ranges.

    Raises:
        UserError: when ``tune.search`` names no settings, or a job could not have them.
    """
    if not config.tune.search:
        raise UserError(
            "tune.search is empty: expected keys with lists or ranges, for example "
            "'tune.search={train.lr: {low: 1.0e-4, high: 1.0e-3, log: true}, objective.fastest: [0.5, 1.0]}'"
        )
    space = {}
    for key, values in config.tune.search.items():
        if key not in known_keys():
            raise UserError(f"tune.search: unknown key {key!r}; {nearest(key, known_keys())}")
        if key.startswith("eval.") or key == "train.candidates":
            raise UserError(
                f"tune.search: {key} has no say in the rollouts by which trials are compared; leave it out (for the "
                "guidance scale: python launch.py guidance policy.checkpoint=RUN_DIR/final)"
            )
        if isinstance(values, list) and values:
            space[key] = ray_tune.grid_search(values) if _is_grid(config) else ray_tune.choice(values)
            tried = values
        elif isinstance(values, dict) and {"low", "high"} <= set(values) <= {"low", "high", "log"}:
            space[key] = _range(key, values)
            tried = [values["low"], values["high"]]
        else:
            raise UserError(
                f"tune.search: {key}={values!r}; expected a list, or low and high, with log: true or without"
            )
        for value in tried:
            load_config(config_file, [*_of_jobs(settings), _word(key, value)])
    if min(_updates(config)) == 1:
        raise UserError(
            "train.updates=1: trials are compared by their last update's rollouts, and those of the first are played "
            "by the starting policy; set train.updates=2 or more"
        )
    return space


def _range(key: str, values: dict[str, Any]) -> Any:
    """Ray Tune's range from ``low`` to ``high``; of whole numbers where the setting is one."""
    low, high, log = values["low"], values["high"], bool(values.get("log"))
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (low, high))
    if not numbers or not low < high or (log and low <= 0):
        raise UserError(
            f"tune.search: {key}={values!r}; expected numbers (1.0e-4, not 1e-4), low less than high, and with log: "
            "true more than 0"
        )
    section, _, name = key.partition(".")
    kind = type(getattr(Config(), section)).model_fields[name].annotation
    if kind in (int, int | None):
        return ray_tune.lograndint(low, high + 1) if log else ray_tune.randint(low, high + 1)
    return ray_tune.loguniform(low, high) if log else ray_tune.uniform(low, high)


def _is_grid(config: Config) -> bool:
    """Are there only lists? Then every combination is tried once."""
    return all(isinstance(values, list) for values in config.tune.search.values())


def _of_jobs(settings: list[str]) -> list[str]:
    """Settings of the jobs: each has a folder of its own, and no server of its page."""
    return [word for word in settings if not word.startswith(("tune.", "run.dir=", "run.resume=", "run.report_"))]


def _word(key: str, value: Any) -> str:
    return f"{key}={yaml.safe_dump(value, default_flow_style=True).removesuffix('...' + chr(10)).strip()}"


def _trial(params: dict[str, Any], job: dict[str, Any]) -> None:
    """One job, in a process of its own; reports after each update and ends with it."""
    trial = ray_tune.get_context().get_trial_id()
    run_dir = Path(job["folder"]) / trial
    command = [*job["command"], *(_word(key, value) for key, value in params.items())]
    command += [f"run.dir={run_dir}", "run.resume=true", "run.report_port=null", f"scaling.address={job['address']}"]
    if job["storage"] is not None:
        command.append(f"run.storage={job['storage'].rstrip('/')}/{trial}")
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with run_dir.with_suffix(".log").open("a") as log:
        process = subprocess.Popen(command, cwd=_PROJECT, stdout=log, stderr=log)
        try:
            reported = 0
            while True:
                ended = process.poll() is not None
                rows = [row for row in read_json_lines(run_dir / "metrics.jsonl") if "rollout/episodes" in row]
                for row in rows[reported:]:
                    success = rollout_success(row)
                    ray_tune.report(
                        {
                            "update": row["update"],
                            "successes": success["successes"],
                            "episodes": success["episodes"],
                            METRIC: success["ci95"][0],
                            "folder": str(run_dir),
                        }
                    )
                reported = len(rows)
                if ended:
                    break
                time.sleep(_POLL_S)
            if process.returncode != 0:
                raise RuntimeError(f"the job ended with exit code {process.returncode}; see {log.name}")
        finally:
            if process.poll() is None:  # the search ends this trial
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(timeout=_END_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _told(result: Any) -> dict[str, Any]:
    """A trial for the table."""
    metrics = result.metrics or {}
    folder = metrics.get("folder")
    summary = Path(folder) / "summary.json" if folder else None
    return {
        "settings": result.config,
        "folder": folder,
        "updates": metrics.get("update", 0),
        "successes": metrics.get("successes", 0),
        "episodes": metrics.get("episodes", 0),
        "success_low": metrics.get(METRIC, 0.0),
        "error": str(result.error) if result.error else None,
        "held_out": json.loads(summary.read_text())["evaluation"] if summary and summary.exists() else None,
    }
