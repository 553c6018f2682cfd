"""Objectives on equal footing: same starting policy, same contexts, same budget of episodes, several seeds.

For each seed the rollouts of the first round are the same for all objectives, since the same policy plays the same
contexts with the same noise; they are made once. What follows is each objective's own.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import time
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from pydantic import ValidationError
from scipy.stats import t as student_t

from actors.dispatcher import Dispatcher, Episode
from actors.rollout import RolloutActor
from actors.weights import WeightStore, publish
from cluster.session import ResourcePlan, ray_session, spawn, start_actors
from learner.steps import plan_steps
from learner.update import update
from ript_ray.algos.advantages import is_kept
from ript_ray.algos.objectives import check_objective
from ript_ray.algos.sampling import ContextSampler, training_starts
from ript_ray.config import Config, resolve
from ript_ray.data.shards import make_shard, samples_of, trained_starts
from ript_ray.errors import UserError, nearest
from ript_ray.evaluation import evaluation_contexts, success_summary
from ript_ray.policies.checkpoints import cpu_weights, load_policy, to_publish, weights_sha256
from ript_ray.policies.policy import Policy
from ript_ray.reporting import progress_bar, versions, write_json
from ript_ray.types import Context, EpisodeReport, Sample, Trajectory

LAYOUT = 2
"""Of the file of results: one of another layout is refused, not continued."""
CONTROL = "imitation of successes"
"""What the others are compared with: failures teach nothing to the condition by which it acts."""
_ON_POLICY = {"restart": False, "max_staleness": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    CONTROL: {"objective": {"name": "advantage_weighted", "negatives": "relu"}},
    "imitation": {"objective": {"name": "imitation"}},
    "cfg": {"objective": {"name": "cfg"}, "scales": (1.0, 2.0)},
    "label_dropout": {"objective": {"name": "label_dropout"}, "scales": (1.0, 2.0)},
    "advantage_weighted, hinge": {"objective": {"name": "advantage_weighted", "negatives": "hinge"}},
    "nft": {"objective": {"name": "nft", "beta": 0.3}, "train": _ON_POLICY},
    "fpo": {"objective": {"name": "fpo"}, "train": {"lr": 1e-4, **_ON_POLICY}},
    "flow_sde": {"objective": {"name": "flow_sde"}, "train": {"lr": 2e-5, **_ON_POLICY}},
}
"""What is compared: the settings in which each differs from the configuration, and the scales of guidance at which it
is evaluated, 1 by default. `cfg` at scale 1 acts by the condition that successes alone have taught; at scale 2 the
failures have a say. The last three learn from what the policy before the update made; the last two compare with how
likely that was, which only small steps keep meaningful. Beside them stands any ``module:function``, with the settings
as configured."""


@dataclass(slots=True)
class _Group:
    round: int
    trajectories: list[Trajectory]
    rewards: np.ndarray


@dataclass(slots=True)
class _Players:
    """Actors that play episodes with weights as they are published."""

    config: Config
    actors: list[Any]
    store: Any
    version: int = -1

    def adopt(self, policy: Policy) -> None:
        """Act with this policy from now on."""
        self.version += 1
        publish(self.store, self.version, *to_publish(policy, self.config.policy.precision))

    def play(self, contexts: Sequence[Context], guidance: float, exploring: bool, what: str) -> list[Trajectory]:
        """One episode of each context, in their order; ``what`` they are for is shown meanwhile."""
        dispatcher = Dispatcher(self.actors, self.config.scaling)
        for context in contexts:
            dispatcher.submit(Episode(0, context, guidance, exploring))
        played = {}
        with progress_bar(len(contexts), what, unit="episode") as bar:
            while (outcome := dispatcher.next()) is not None:
                if outcome.report is None:
                    raise RuntimeError(f"{outcome.episode.context} failed: {outcome.reason}")
                played[outcome.episode.context] = ray.get(outcome.reference, timeout=60)
                bar.update()
        return [played[context] for context in contexts]

    def successes(self, contexts: Sequence[Context], guidance: float, what: str) -> list[bool]:
        """How evaluation ends, by context."""
        played = self.play(contexts, guidance, False, f"{what}, evaluation at w = {guidance:g}")
        return [bool(trajectory.success) for trajectory in played]


@dataclass(slots=True)
class _Run:
    """One objective with one seed, evaluated at one scale of guidance."""

    objective: str
    """With the scale where it is not 1."""
    seed: int
    episodes: list[int] = field(default_factory=lambda: [0])
    """Tried so far, at each evaluation."""
    seconds: list[float] = field(default_factory=lambda: [0.0])
    """Of rollouts and updates so far, at each evaluation."""
    successes: list[int] = field(default_factory=list)
    outcomes: list[bool] = field(default_factory=list)
    """Of the last evaluation, by context."""
    update_seconds: list[float] = field(default_factory=list)
    training_rates: list[float] = field(default_factory=list)


def measure(config: Config) -> dict[str, Any]:
    """Success of every objective on held-out states after each round, for ``bench.seeds`` seeds.

    Each round rolls out ``sampling.groups`` groups, mixed or not, so that every objective tries equally many episodes.
    All act with the same ``policy.explore``, which `flow_sde` needs, and are evaluated without it.

    After every run the result so far is written into ``run.dir`` (``runs/objectives`` by default), with a figure. When
    the same comparison was begun there before, it is continued.

    Args:
        config: ``bench.*`` says how much is compared; the rest is the job.

    Raises:
        UserError: for an unknown name in ``bench.objectives``, or settings with which one of them cannot be trained.
    """
    names = config.bench.objectives or tuple(VARIANTS)
    for name in names:
        if name not in VARIANTS and not all(name.partition(":")):
            raise UserError(
                f"bench.objectives: unknown name {name!r}; {nearest(name, VARIANTS)}, or module:function, one of yours"
            )
    configs = {name: _config_of(config, name) for name in names}
    folder = Path(config.run.dir or "runs/objectives")
    folder.mkdir(parents=True, exist_ok=True)
    start = load_policy(resolve(config.policy.checkpoint))
    result = _begun(folder / "objectives.json", config, weights_sha256(cpu_weights(start)))
    done = {(run["objective"], run["seed"]) for run in result["runs"]}
    with ray_session(config.scaling, ResourcePlan.of(config.scaling, learners=False)):
        store = spawn(WeightStore, name="WeightStore")
        actors, _ = start_actors(RolloutActor, config.scaling, config, start.describe(), "WeightStore")
        players = _Players(config, actors, store)
        made_with = versions(ray.get(actors[0].renderer.remote()))
        players.adopt(start)
        contexts = evaluation_contexts(config)["held_out"]
        scales = {scale for name in names for scale in _scales(name)}
        base = result.setdefault("base", {})
        base |= {f"{s:g}": players.successes(contexts, s, "start") for s in sorted(scales) if f"{s:g}" not in base}
        for seed in range(config.run.seed, config.run.seed + config.bench.seeds):
            missing = [name for name in names if (_label(name, _scales(name)[-1]), seed) not in done]
            if not missing:
                continue
            players.adopt(start)
            sampler = ContextSampler(training_starts(config.env), config.sampling, seed)
            began = time.perf_counter()
            first = _collect(players, sampler, 0, f"seed {seed}")
            took = result.setdefault("rollout_seconds", {})  # when they were made first: the same work for all
            first_seconds = took.setdefault(str(seed), time.perf_counter() - began)
            for name in missing:
                runs = _learn(configs[name], players, start, (name, seed), (first, first_seconds))
                for scale, run in runs.items():
                    run.successes.insert(0, sum(base[f"{scale:g}"]))
                    result["runs"].append(asdict(run) | {"versions": made_with})
                result["table"] = _table(result["runs"], [context.start for context in contexts])
                write_json(folder / "objectives.json", result)
                plot(folder / "objectives.png", result, len(contexts))
    return result


def _begun(file: Path, config: Config, start_sha256: str) -> dict[str, Any]:
    """The result so far of the same comparison, from the same start, or an empty one."""
    settings = _compared(config)
    settings |= {"rounds": config.bench.rounds, "start_sha256": start_sha256, "layout": LAYOUT}
    settings["variants"] = {name: changes | {"scales": list(_scales(name))} for name, changes in VARIANTS.items()}
    if file.exists():
        result: dict[str, Any] = json.loads(file.read_text())
        known = result["settings"]
        with contextlib.suppress(ValidationError):  # a newer version may know settings that it had not
            known |= _compared(Config.model_validate({key: known[key] for key in Config.model_fields if key in known}))
        if known != settings:
            raise UserError(f"{file} is of other settings or another layout; choose another run.dir, or remove it")
        return result
    return {"benchmark": "objectives", "env": config.env.id, "settings": settings, "runs": []}


def _compared(config: Config) -> dict[str, Any]:
    """The settings that a comparison stands for."""
    return config.model_dump(mode="json", exclude={"bench": True, "run": {"dir", "mlflow_uri", "name"}})


def _learn(
    config: Config, players: _Players, start: Policy, which: tuple[str, int], shared: tuple[list[_Group], float]
) -> dict[float, _Run]:
    """All rounds of one objective: collect (the first time: take what is shared), update from the start, evaluate.

    Args:
        config: of the comparison, with what is the objective's own.
        players: play.
        start: the starting policy.
        which: name of the variant, and seed.
        shared: the first round's rollouts, and the seconds that they took.

    Returns:
        One run for each scale of guidance, without the successes of the starting policy.
    """
    name, seed = which
    what = f"seed {seed}, {name}"
    runs = {scale: _Run(_label(name, scale), seed) for scale in _scales(name)}
    sampler = ContextSampler(training_starts(config.env), config.sampling, seed)
    contexts = evaluation_contexts(config)["held_out"]
    groups: list[_Group] = []
    learning = acting = start
    for index in range(config.bench.rounds):
        began = time.perf_counter()
        # The first round is drawn again as well, so that the sampler goes on from there.
        new = _collect(players, sampler, index, what, shared[0] if index == 0 else None)
        seconds = shared[1] if index == 0 else time.perf_counter() - began
        groups = [group for group in groups if index - group.round <= config.train.max_staleness] + new
        learning = copy.deepcopy(start if config.train.restart else learning)
        began = time.perf_counter()
        acting = _update(learning, groups, config, seed * 1009 + index, config.train.averages(index)) or acting
        took = time.perf_counter() - began
        players.adopt(acting)
        for scale, run in runs.items():
            run.update_seconds.append(took)
            run.training_rates.append(float(np.mean([group.rewards for group in new])))
            run.episodes.append(run.episodes[-1] + sum(len(group.rewards) for group in new))
            run.seconds.append(run.seconds[-1] + seconds + took)
            run.outcomes = players.successes(contexts, scale, what)
            run.successes.append(sum(run.outcomes))
    return runs


def _scales(name: str) -> tuple[float, ...]:
    scales: tuple[float, ...] = VARIANTS.get(name, {}).get("scales", (1.0,))
    return scales


def _label(name: str, scale: float) -> str:
    return name if scale == 1.0 else f"{name}, w = {scale:g}"


def _collect(
    players: _Players, sampler: ContextSampler, index: int, what: str, made: list[_Group] | None = None
) -> list[_Group]:
    """The rollouts of round ``index``, or those that were made of the same contexts before."""
    config = players.config
    drawn = [sampler.next_group() for _ in range(config.sampling.groups)]
    if made is None:
        contexts = [context for group in drawn for context in group.contexts]
        played = players.play(contexts, 1.0, True, f"{what}, rollouts")
        size = config.sampling.group_size
        parts = [played[i : i + size] for i in range(0, len(played), size)]
        made = [_Group(index, part, np.array([t.reward for t in part])) for part in parts]
    for group, result in zip(drawn, made, strict=True):
        sampler.record(group, result.rewards)
    return made


def _update(learning: Policy, groups: list[_Group], config: Config, seed: int, averaging: bool) -> Policy | None:
    """Train on these groups, as the pool and the learner do it.

    Returns:
        The policy to act with; None when there was nothing to learn.
    """
    train, objective = config.train, config.objective
    kept = [group.trajectories for group in groups if is_kept(group.rewards, objective)]
    samples: dict[int, Sample] = {}
    for i, trajectories in enumerate(kept):
        samples |= samples_of(i, [EpisodeReport.of(trajectory) for trajectory in trajectories], trajectories)
    if not samples:
        return None
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # nobody plays meanwhile
    # Every objective takes the same number of steps, whatever was rejected.
    data = config.data.model_copy(update={"windows": "seen"})  # nobody renders others here
    played = [EpisodeReport.of(trajectory) for group in groups for trajectory in group.trajectories]
    every = sum(len(trained_starts(report, data)) for report in played)
    train = train.model_copy(update={"min_steps": max(1, train.epochs * every // train.batch_size)})
    chosen = {"data": data, "train": train, "run": config.run.model_copy(update={"seed": seed})}
    shard, _ = make_shard(0, samples, config.model_copy(update=chosen))
    steps = plan_steps(shard, shard.trajectories, train.micro_batch)
    if not steps:
        return None
    generator = torch.Generator().manual_seed(seed)
    return update(learning, steps, train, objective, generator, averaging=averaging)[0]


def _config_of(config: Config, variant: str) -> Config:
    """The configuration with what is the variant's own.

    Raises:
        UserError: when that is none with which a job could train.
    """
    settings = config.model_dump()
    changed = VARIANTS.get(variant, {"objective": {"name": variant}})
    settings["train"] |= changed.get("train", {}) | {"updates": config.bench.rounds}
    settings["objective"] |= changed["objective"]
    settings["policy"]["guidance"] = settings["eval"]["guidance"] = 1.0  # the table has scales of its own
    try:
        checked = Config.model_validate(settings)
        check_objective(checked)
        return checked
    except ValidationError as error:
        raise UserError(f"bench.objectives, {variant!r}: {error.errors()[0]['msg']}") from None


def _table(runs: list[dict[str, Any]], starts: Sequence[Hashable]) -> list[dict[str, Any]]:
    """Success of each objective after the last round, all seeds together, with the 95 % interval; and its cost.

    That interval takes the updates as they were, and knows which episodes share a start. An update's own noise is
    larger, so ``difference`` compares seed by seed with `CONTROL` (of the same rollouts): the mean over seeds, and its
    95 % interval by Student's t.
    """
    episodes = len(starts)
    control = {run["seed"]: run["successes"][-1] / episodes for run in runs if run["objective"] == CONTROL}
    rows = []
    for name in dict.fromkeys(run["objective"] for run in runs):
        own = [run for run in runs if run["objective"] == name]
        together = success_summary([won for run in own for won in run["outcomes"]], [*starts] * len(own))
        by_seed = [run["successes"][-1] / episodes for run in own]
        pairs = zip(own, by_seed, strict=True)
        differences = [rate - control[run["seed"]] for run, rate in pairs if run["seed"] in control]
        rows.append(
            {
                "objective": name,
                "seeds": len(own),
                **together,
                "by_seed": by_seed,
                "difference": _mean_with_interval(differences) if name != CONTROL else None,
                "update_seconds": float(np.mean([s for run in own for s in run["update_seconds"]])),
            }
        )
    return sorted(rows, key=lambda row: -row["rate"])


def _mean_with_interval(values: Sequence[float]) -> dict[str, Any]:
    """The mean and its 95 % interval, None where there are too few values for either."""
    if len(values) < 2:
        return {"mean": values[0] if values else None, "ci95": None}
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / len(values) ** 0.5
    half = error * float(student_t.ppf(0.975, len(values) - 1))
    return {"mean": mean, "ci95": [mean - half, mean + half]}


def plot(file: Path, result: dict[str, Any], episodes: int) -> None:
    """Success against episodes tried and against seconds: the mean of the seeds of each objective and, where there are
    two or more, its 95 % interval.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(12, 4), sharey=True)
    names = list(dict.fromkeys(run["objective"] for run in result["runs"]))
    for axes, key, label in zip(panels, ("episodes", "seconds"), ("episodes tried", "seconds"), strict=True):
        for i, name in enumerate(names):
            own = [run for run in result["runs"] if run["objective"] == name]
            rates = np.array([run["successes"] for run in own]) / episodes
            x = np.mean([run[key] for run in own], axis=0)
            points = [_mean_with_interval(column) for column in rates.T.tolist()]
            half = [0.0 if point["ci95"] is None else point["ci95"][1] - point["mean"] for point in points]
            # Side by side, where all have tried as many episodes.
            x = x + (0.015 * x.max() * (i - len(names) / 2) if key == "episodes" else 0.0) * (x > 0)
            axes.errorbar(x, rates.mean(0), yerr=half, label=name, color=f"C{i}", marker="o", capsize=3)
        axes.set(xlabel=label, ylim=(0, 1))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("success on held-out states")
    panels[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(result["env"])
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)
