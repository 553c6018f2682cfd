"""The coordinator: sends contexts to rollout actors, collects what comes back, refills what was rejected.

    sampler ──group of K contexts──▶ queue ──one episode per free actor──▶ RolloutActor.collect
       ▲                                                                        │ (report, reference)
       └── refill while the quota of mixed groups is not met ◀── SamplePool.add ┘
                                                                      │ quota met or budget spent
                                                                      ▼
                                                            SamplePool.seal(step) ──▶ learners

Loop        consumes              produces            waits for                          unblocked by
run         finished episodes     sealed steps        weights version ≥ step − lead      WeightStore.publish
evaluate    held-out contexts     success counts      its episodes                       –

It is the caller of `collect`, hence the owner of every trajectory: an actor that dies loses only the episode it runs,
which is played again. Every wait is bounded by the episode's time limit.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.dispatcher import Dispatcher, Episode, Outcome
from actors.rollout import EpisodeReport
from ript_ray.algos.sampling import ContextSampler, Group, training_starts
from ript_ray.config import Config, SamplingConfig
from ript_ray.data.storage import save_episode
from ript_ray.evaluation import evaluation_contexts, wilson_interval
from ript_ray.types import Context


@dataclass(slots=True)
class _Totals:
    episodes: int = 0
    env_steps: int = 0
    surplus: int = 0
    frames: int = 0
    """Rendered because a policy looked."""
    eager_frames: int = 0
    """That rendering every step would have taken."""
    errors: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("physics", "render", "inference"), 0.0))
    weights_wait_s: list[float] = field(default_factory=list)
    rollout_s: float = 0.0
    ended_by: Counter[str] = field(default_factory=Counter)
    """How often each quota or budget ended the rollouts of an update."""


@dataclass(slots=True)
class _Collection:
    """The rollouts of one update while they come in."""

    groups: dict[int, Group] = field(default_factory=dict)
    """Open ones."""
    rewards: dict[int, list[float]] = field(default_factory=dict)
    """Of finished rollouts, by group."""
    opened: int = 0
    accepted: int = 0
    all_failed: int = 0
    all_succeeded: int = 0
    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Since the collection began."""
        return time.perf_counter() - self.started

    def open(self, group: Group) -> None:
        """Note a group that is now rolled out."""
        self.groups[group.id], self.rewards[group.id] = group, []
        self.opened += 1

    def ended_by(self, config: SamplingConfig) -> str | None:
        """The quota or the budget that ends it, if one does."""
        if self.accepted >= math.ceil(config.enough * config.groups):
            return "quota"
        if config.max_seconds is not None and self.seconds > config.max_seconds:
            return "seconds"
        return "groups" if not self.groups and self.opened >= config.max_groups else None

    def metrics(self) -> dict[str, float]:
        """A row of metrics: success with its 95 % interval, groups, seconds."""
        finished = [reward for rewards in self.rewards.values() for reward in rewards]
        low, high = wilson_interval(round(sum(finished)), len(finished))
        return {
            "rollout/success_rate": float(np.mean(finished)) if finished else 0.0,
            "rollout/success_low": low,
            "rollout/success_high": high,
            "rollout/episodes": len(finished),
            "rollout/groups_accepted": self.accepted,
            "rollout/groups_rejected": self.all_failed + self.all_succeeded,
            "rollout/groups_all_failed": self.all_failed,
            "rollout/groups_all_succeeded": self.all_succeeded,
            "rollout/groups_cancelled": len(self.groups),
            "rollout/seconds": self.seconds,
        }


@ray.remote(num_cpus=0, max_concurrency=4)
class Coordinator:
    """Drives rollouts for training and evaluation.

    Args:
        config: the whole configuration.
        actors: handles of `RolloutActor`.
        pool: handle of `SamplePool`.
        store: handle of `WeightStore`.
        run_dir: episodes are recorded in its ``episodes`` folder; None records none.
    """

    def __init__(self, config: Config, actors: list[Any], pool: Any, store: Any, run_dir: Path | None = None) -> None:
        self._config = config
        self._actors = actors
        self._pool = pool
        self._store = store
        self._episodes_dir = run_dir / "episodes" if run_dir is not None else None
        self._sampler = ContextSampler(training_starts(config.env), config.sampling, config.run.seed)
        self._totals = _Totals()
        self._rows: list[dict[str, Any]] = []
        self._learner_starts = 0
        self._lock = threading.Lock()
        self._stage = "starting"
        self._done = 0
        self._expected = 0
        self._shares = _planned_work(config, training=pool is not None)
        self._finished = dict.fromkeys(self._shares, 0.0)

    def __repr__(self) -> str:
        return "Coordinator"

    def run(self) -> None:
        """Collect samples for every update, in step with the learner (``sync``) or ahead of it (``async``)."""
        config = self._config
        dispatcher = Dispatcher(self._actors, config.scaling)
        for step in range(config.train.updates):
            lead = config.train.lead if config.train.mode == "async" else 0
            self._enter("waiting for weights", 0)
            self._wait_for_weights(max(0, step - lead))
            if self._collect(step, dispatcher):
                self._ask(self._pool.finish.remote(step))
                break
            jobs = self._ask(self._pool.seal.remote(step))
            if jobs:
                # The learner may start: frames come in the order in which it needs them.
                references = dispatcher.render(jobs)
                self._ask(self._pool.rendering.remote(jobs, references))
        self._enter("learning", 0)

    def evaluate(self, stage: str, keep: int = 0) -> dict[str, Any]:
        """Play the held-out contexts with the newest weights.

        Args:
            stage: shown as progress.
            keep: how many trajectories of each result to keep for videos.

        Returns:
            ``results`` (by column of `evaluation_contexts`, a list of successes in the order of its contexts, None
            where the environment failed), and ``kept``: references of failures and successes by context index.
        """
        columns = evaluation_contexts(self._config)
        contexts = [context for column in columns.values() for context in column]
        results, kept = self._play(stage, contexts, self._config.eval.guidance, keep)
        ordered = iter(results)
        return {"results": {name: list(islice(ordered, len(column))) for name, column in columns.items()}, "kept": kept}

    def play(self, stage: str, contexts: list[Context], guidance: float) -> list[bool | None]:
        """Successes in the order of the contexts, None where the environment failed."""
        return self._play(stage, contexts, guidance, keep=0)[0]

    def _play(
        self, stage: str, contexts: list[Context], guidance: float, keep: int
    ) -> tuple[list[bool | None], dict[bool, dict[int, Any]]]:
        dispatcher = Dispatcher(self._actors, self._config.scaling)
        position = {context: i for i, context in enumerate(contexts)}
        self._enter(stage, len(contexts))
        for context in contexts:
            dispatcher.submit(Episode(-1, context, guidance))
        results: list[bool | None] = [None] * len(contexts)
        kept: dict[bool, dict[int, Any]] = {True: {}, False: {}}
        while dispatcher.outstanding:
            for outcome in dispatcher.wait():
                report, i = outcome.report, position[outcome.episode.context]
                if report is None:
                    self._set_aside(outcome, dispatcher)
                    continue
                results[i] = report.success
                if len(kept[report.success]) < keep:
                    kept[report.success][i] = outcome.reference
                self._note(report)
        self._totals.errors += dispatcher.errors
        return results, kept

    def log(self, row: dict[str, Any]) -> None:
        """Add a row of metrics (learners call this)."""
        with self._lock:
            self._rows.append({"time": time.time()} | row)

    def progress(self, seen: int) -> dict[str, Any]:
        """What happens now, and the rows of metrics after the first ``seen``."""
        with self._lock:
            return {
                "stage": self._stage,
                "done": self._done,
                "expected": self._expected,
                "fraction": sum(self._shares[k] * self._finished[k] for k in self._shares),
                "rows": self._rows[seen:],
            }

    def totals(self) -> dict[str, Any]:
        """Sums over the whole run, for the summary."""
        totals = self._totals
        waits = totals.weights_wait_s
        return {
            "episodes": totals.episodes,
            "env_steps": totals.env_steps,
            "surplus": totals.surplus,
            "errors": totals.errors,
            "skipped_states": self._sampler.skipped,
            "collections_ended_by": dict(totals.ended_by),
            "set_aside": [asdict(entry) for entry in self._sampler.aside],
            "frames": {"looked": totals.frames, "eager": totals.eager_frames},
            "seconds": {"rollout": totals.rollout_s} | totals.seconds,
            "weights_wait_s": {"mean": float(np.mean(waits)) if waits else 0.0, "max": max(waits, default=0.0)},
        }

    def learners_started(self, step: int) -> None:
        """The learner group begins at update ``step`` (it calls this); more than once means that it had been lost."""
        with self._lock:
            self._learner_starts += 1
            if self._learner_starts > 1:
                self._totals.errors.append(f"the learner group was lost and started again at update {step + 1}")

    def learning(self, step: int, done: int, expected: int) -> None:
        """Progress of the learner, which calls this; rollouts that run meanwhile are shown rather."""
        stage = f"update {step + 1}: learning"
        with self._lock:
            self._finished[stage] = done / expected
            if not self._stage.endswith("rollouts"):
                self._stage, self._done, self._expected = stage, done, expected

    def _collect(self, step: int, dispatcher: Dispatcher) -> bool:
        """Roll groups out until enough mixed ones were accepted or a budget is spent; cancel the surplus.

        Returns:
            Whether the goal ``train.stop_at`` is reached.
        """
        config = self._config.sampling
        self._enter(f"update {step + 1}: rollouts", config.groups * config.group_size)
        now = _Collection()
        # Enough open groups to keep every actor busy, even when fewer are still wanted.
        busy = -(-len(self._actors) // config.group_size)
        errors_before = len(dispatcher.errors)
        while (ended_by := now.ended_by(config)) is None:
            while now.opened < config.max_groups and len(now.groups) < max(config.groups - now.accepted, busy):
                group = self._sampler.next_group()
                now.open(group)
                acting = self._config.policy
                for context in group.contexts:
                    dispatcher.submit(Episode(group.id, context, acting.guidance, acting.explore))
            for outcome in dispatcher.wait():
                if outcome.report is None:
                    now.opened -= self._give_up(outcome, now.groups, dispatcher)
                else:
                    self._take(outcome, now)
        self._totals.surplus += dispatcher.cancel(set(now.groups))
        for group_id in now.groups:
            self._ask(self._pool.discard.remote(group_id))
        errors = dispatcher.errors[errors_before:]
        self._totals.rollout_s += now.seconds
        self._totals.ended_by[ended_by] += 1
        self._totals.errors += errors
        row = now.metrics() | {"rollout/skipped_states": self._sampler.skipped, "rollout/errors": len(errors)}
        self.log({"update": step + 1} | row)
        goal = self._config.train.stop_at
        return goal is not None and row["rollout/success_low"] >= goal

    def _take(self, outcome: Outcome, now: _Collection) -> None:
        """Hand a finished rollout to the pool; note its group's verdict if it was the last one."""
        episode, report = outcome.episode, outcome.report
        assert report is not None
        self._note(report)
        if episode.tag not in now.groups:
            self._totals.surplus += 1
            return
        now.rewards[episode.tag].append(float(report.success))
        verdict = self._ask(self._pool.add.remote(episode.tag, report, [outcome.reference]))
        if verdict is None:
            return
        self._sampler.record(now.groups.pop(episode.tag), np.array(now.rewards[episode.tag]))
        if verdict:
            now.accepted += 1
        elif report.success:
            now.all_succeeded += 1
        else:
            now.all_failed += 1

    def _give_up(self, outcome: Outcome, groups: dict[int, Group], dispatcher: Dispatcher) -> int:
        """Set an environment aside that fails again and again, and discard its open groups; how many there were."""
        self._set_aside(outcome, dispatcher)
        gone = [group_id for group_id, group in groups.items() if self._sampler.is_aside(group.contexts[0])]
        for group_id in gone:
            del groups[group_id]
            self._ask(self._pool.discard.remote(group_id))
        return len(gone)

    def _set_aside(self, outcome: Outcome, dispatcher: Dispatcher) -> None:
        context = outcome.episode.context
        self._sampler.set_aside(context, outcome.reason)
        dispatcher.drop(lambda episode: self._sampler.is_aside(episode.context))

    def _wait_for_weights(self, version: int) -> None:
        limit = self._config.scaling.wait_timeout_s
        if not self._ask(self._store.wait_for.remote(version, limit)):
            raise TimeoutError(
                f"Coordinator waited {limit:.0f} s for weights version {version} from the learner; see the learner's "
                "log, or raise scaling.wait_timeout_s"
            )

    def _ask(self, reference: Any) -> Any:
        return ray.get(reference, timeout=self._config.scaling.wait_timeout_s + 10.0)

    def _enter(self, stage: str, expected: int) -> None:
        with self._lock:
            if self._stage in self._finished:
                self._finished[self._stage] = 1.0
            self._stage, self._done, self._expected = stage, 0, expected

    def _note(self, report: EpisodeReport) -> None:
        totals = self._totals
        if self._episodes_dir is not None:
            save_episode(self._episodes_dir / f"{totals.episodes:06d}.safetensors", report.record)
        totals.episodes += 1
        totals.frames += report.frames
        totals.eager_frames += report.eager_frames
        totals.env_steps += report.length
        totals.weights_wait_s.append(report.weights_wait_s)
        for name, value in report.seconds.items():
            totals.seconds[name] += value
        with self._lock:
            self._done += 1
            if self._stage in self._finished:
                self._finished[self._stage] = min(1.0, self._done / max(1, self._expected))


def _planned_work(config: Config, training: bool) -> dict[str, float]:
    """Share of each stage in the whole job, by a rough estimate of its duration in episodes.

    About half of the spare groups are needed, and on two cores a pass over an episode takes 0.008 of playing it.
    """
    evaluation = max(1, config.eval.episodes + config.eval.random_placement + config.eval.shifted)
    if not training:
        return {"evaluating": 1.0}
    sampling = config.sampling
    episodes = (sampling.groups + sampling.max_groups) / 2 * sampling.group_size
    trained = sampling.groups * sampling.group_size
    work: dict[str, float] = {"evaluating before": evaluation, "evaluating after": evaluation}
    for step in range(config.train.updates):
        work[f"update {step + 1}: rollouts"] = episodes
        work[f"update {step + 1}: learning"] = trained * 0.008 * config.train.epochs * (step + 1)
    return {stage: amount / sum(work.values()) for stage, amount in work.items()}
