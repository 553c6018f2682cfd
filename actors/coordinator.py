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

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayTaskError

from actors.rollout import EpisodeReport
from ript_ray.algos.sampling import ContextSampler, Group
from ript_ray.config import Config, ScalingConfig
from ript_ray.types import Context

_MAX_ATTEMPTS = 3
"""An episode that fails so often ends the run: the fault is not the actor's."""


@dataclass(slots=True)
class Episode:
    """One episode to be played, and how often that was tried."""

    tag: int
    """Group that asked for the episode, or −1 for evaluation."""
    context: Context
    guidance: float
    attempts: int = 0
    deadline: float = 0.0


@dataclass(slots=True)
class _Totals:
    episodes: int = 0
    env_steps: int = 0
    surplus: int = 0
    errors: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("physics", "render", "inference"), 0.0))
    weights_wait_s: list[float] = field(default_factory=list)
    rollout_s: float = 0.0


class Dispatcher:
    """Keeps one episode in flight per actor and survives the loss of actors.

    Args:
        actors: handles of `RolloutActor`.
        scaling: its ``episode_timeout_s`` limits one episode, its ``wait_timeout_s`` the wait for lost actors when none
            is left.
    """

    def __init__(self, actors: list[Any], scaling: ScalingConfig) -> None:
        self._idle = deque(actors)
        self._lost: dict[Any, Any] = {}
        """Actors that died, by the reference of a call that returns when Ray has started them again."""
        self._alive_at = time.monotonic()
        self._timeout_s = scaling.episode_timeout_s
        self._restart_timeout_s = scaling.wait_timeout_s
        self._queue: deque[Episode] = deque()
        self._running: dict[Any, tuple[Any, Any, Episode]] = {}
        self.errors: list[str] = []
        """Faults that were survived."""

    def submit(self, episode: Episode) -> None:
        """Queue an episode and start it if an actor is free."""
        self._queue.append(episode)
        self._start()

    def cancel(self, tags: set[int]) -> int:
        """Drop queued episodes of these groups; those that run are left to finish. Returns how many were dropped."""
        kept = [episode for episode in self._queue if episode.tag not in tags]
        dropped = len(self._queue) - len(kept)
        self._queue = deque(kept)
        return dropped

    @property
    def outstanding(self) -> int:
        """Episodes queued or running."""
        return len(self._queue) + len(self._running)

    def wait(self) -> list[tuple[Episode, EpisodeReport, Any]]:
        """Finished episodes, at least one unless none is outstanding; handles failures on the way.

        Raises:
            RuntimeError: when one episode has failed three times, or no actor is left.
        """
        finished: list[tuple[Episode, EpisodeReport, Any]] = []
        while not finished and self.outstanding:
            self._check_that_somebody_plays()
            done, _ = ray.wait([*self._running, *self._lost], timeout=1.0)
            for reference in done:
                if reference in self._lost:
                    self._welcome_back(reference)
                    continue
                actor, trajectory_ref, episode = self._running.pop(reference)
                try:
                    finished.append((episode, ray.get(reference, timeout=self._timeout_s), trajectory_ref))
                    self._idle.append(actor)
                except RayActorError as error:
                    # Ray starts it again; until then each call would fail at once. This one is repeated till it is up.
                    self._lost[actor.renderer.options(max_task_retries=-1).remote()] = actor
                    self._retry(episode, error)
                except RayTaskError as error:
                    self._idle.append(actor)
                    self._retry(episode, error)
            self._end_overdue()
            self._start()
        return finished

    def _welcome_back(self, reference: Any) -> None:
        actor = self._lost.pop(reference)
        try:
            ray.get(reference, timeout=self._timeout_s)
            self._idle.append(actor)
        except RayActorError as error:  # it cannot be started again; the others go on
            self.errors.append(f"a rollout actor is gone for good: {error}")

    def _check_that_somebody_plays(self) -> None:
        if self._running:
            self._alive_at = time.monotonic()
        elif not self._lost or time.monotonic() > self._alive_at + self._restart_timeout_s:
            last = self.errors[-1] if self.errors else "none"
            raise RuntimeError(f"no rollout actor is left to play {self.outstanding} episodes; last error: {last}")

    def _start(self) -> None:
        while self._queue and self._idle:
            actor, episode = self._idle.popleft(), self._queue.popleft()
            episode.attempts += 1
            episode.deadline = time.monotonic() + self._timeout_s
            report, trajectory = actor.collect.options(num_returns=2).remote(episode.context, episode.guidance)
            self._running[report] = (actor, trajectory, episode)

    def _end_overdue(self) -> None:
        """A hung simulator cannot rescue itself: its process is killed, Ray starts it anew, the episode is retried."""
        for _, (actor, _, episode) in list(self._running.items()):
            if time.monotonic() > episode.deadline:
                episode.deadline = float("inf")  # its reference fails shortly and is then retried by `wait`
                self.errors.append(f"{episode.context}: no result after {self._timeout_s:.0f} s, actor killed")
                ray.kill(actor, no_restart=False)

    def _retry(self, episode: Episode, error: Exception) -> None:
        reason = f"{episode.context}: {type(error).__name__}: {str(error).strip().splitlines()[-1]}"
        if episode.attempts >= _MAX_ATTEMPTS:
            raise RuntimeError(f"an episode failed {_MAX_ATTEMPTS} times, last with {reason}") from error
        self.errors.append(reason)
        self._queue.appendleft(episode)


@ray.remote(num_cpus=0, max_concurrency=4)
class Coordinator:
    """Drives rollouts for training and evaluation.

    Args:
        config: the whole configuration.
        actors: handles of `RolloutActor`.
        pool: handle of `SamplePool`.
        store: handle of `WeightStore`.
    """

    def __init__(self, config: Config, actors: list[Any], pool: Any, store: Any) -> None:
        self._config = config
        self._actors = actors
        self._pool = pool
        self._store = store
        self._sampler = ContextSampler(config.env.id, config.env.train_init_states, config.sampling, config.run.seed)
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
            self._collect(step, dispatcher)
            self._ask(self._pool.seal.remote(step))
        self._enter("learning", 0)

    def evaluate(self, stage: str, keep: int = 0) -> dict[str, Any]:
        """Play the held-out contexts with the newest weights.

        Args:
            stage: shown as progress.
            keep: how many trajectories of each result to keep for videos.

        Returns:
            ``results`` (list of successes in the order of the contexts), ``lengths``, and ``kept``: references of
            failures and successes by context index.
        """
        contexts = evaluation_contexts(self._config)
        dispatcher = Dispatcher(self._actors, self._config.scaling)
        position = {context: i for i, context in enumerate(contexts)}
        self._enter(stage, len(contexts))
        for context in contexts:
            dispatcher.submit(Episode(-1, context, self._config.eval.guidance))
        results, lengths = [False] * len(contexts), [0] * len(contexts)
        kept: dict[bool, dict[int, Any]] = {True: {}, False: {}}
        while dispatcher.outstanding:
            for episode, report, reference in dispatcher.wait():
                i = position[episode.context]
                results[i], lengths[i] = report.success, report.length
                if len(kept[report.success]) < keep:
                    kept[report.success][i] = reference
                self._note(report)
        self._totals.errors += dispatcher.errors
        return {"results": results, "lengths": lengths, "kept": kept}

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

    def _collect(self, step: int, dispatcher: Dispatcher) -> None:
        """Roll groups out until enough mixed ones were accepted or the budget is spent; cancel the surplus."""
        config = self._config.sampling
        started = time.perf_counter()
        self._enter(f"update {step + 1}: rollouts", config.groups * config.group_size)
        groups: dict[int, Group] = {}
        rewards: dict[int, list[float]] = {}
        accepted: list[int] = []
        good = rejected = opened = 0
        # Enough open groups to keep every actor busy, even when fewer are still wanted.
        busy = -(-len(self._actors) // config.group_size)
        errors_before = len(dispatcher.errors)
        while good < config.groups and (groups or opened < config.max_groups):
            while opened < config.max_groups and len(groups) < max(config.groups - good, busy):
                group = self._sampler.next_group()
                groups[group.id], rewards[group.id] = group, []
                opened += 1
                for context in group.contexts:
                    dispatcher.submit(Episode(group.id, context, self._config.policy.guidance))
            for episode, report, reference in dispatcher.wait():
                self._note(report)
                if episode.tag not in groups:
                    self._totals.surplus += 1
                    continue
                rewards[episode.tag].append(float(report.success))
                verdict = self._ask(self._pool.add.remote(episode.tag, report, [reference]))
                if verdict is not None:
                    self._sampler.record(groups.pop(episode.tag), np.array(rewards[episode.tag]))
                    good += bool(verdict)
                    rejected += not verdict
                    accepted += verdict
        self._totals.surplus += dispatcher.cancel(set(groups))
        for group_id in groups:
            self._ask(self._pool.discard.remote(group_id))
        if self._config.data.windows == "all":
            self._complete_frames(step, accepted)
        seconds = time.perf_counter() - started
        self._totals.rollout_s += seconds
        self._totals.errors += dispatcher.errors[errors_before:]
        finished = [reward for values in rewards.values() for reward in values]
        self.log(
            {
                "update": step + 1,
                "rollout/success_rate": float(np.mean(finished)),
                "rollout/episodes": len(finished),
                "rollout/groups_accepted": good,
                "rollout/groups_rejected": rejected,
                "rollout/seconds": seconds,
                "rollout/errors": len(dispatcher.errors) - errors_before,
            }
        )

    def _complete_frames(self, step: int, accepted: list[int]) -> None:
        """Have the actors render the frames of accepted trajectories that nobody has looked at yet."""
        self._enter(f"update {step + 1}: frames", len(accepted))
        references = self._ask(self._pool.references.remote(accepted))
        waiting = {}
        for turn, identifier in enumerate(accepted):
            actor = self._actors[turn % len(self._actors)]
            # Rendering again gives the same, so a lost actor's work is simply repeated.
            render = actor.render_all.options(num_returns=2, max_task_retries=-1)
            report, trajectory = render.remote(references[identifier][0])
            waiting[report] = (identifier, trajectory)
        for report_ref, (identifier, trajectory) in waiting.items():
            report = self._ask(report_ref)
            self._totals.seconds["render"] += report.seconds["render"]
            self._ask(self._pool.replace.remote(identifier, report, [trajectory]))
            self._done += 1

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
        totals.episodes += 1
        totals.env_steps += report.length
        totals.weights_wait_s.append(report.weights_wait_s)
        for name, value in report.seconds.items():
            totals.seconds[name] += value
        with self._lock:
            self._done += 1
            if self._stage in self._finished:
                self._finished[self._stage] = min(1.0, self._done / max(1, self._expected))


def evaluation_contexts(config: Config) -> list[Context]:
    """Held-out initial states in turn, each time with another noise seed; the same list before and after training."""
    first, end = config.env.eval_init_states
    return [
        Context(config.env.id, first + i % (end - first), config.eval.seed + i) for i in range(config.eval.episodes)
    ]


def _planned_work(config: Config, training: bool) -> dict[str, float]:
    """Share of each stage in the whole job, by a rough estimate of its duration in episodes.

    About half of the spare groups are needed, and on two cores a pass over an episode takes 0.008 of playing it.
    """
    evaluation = max(1, config.eval.episodes)
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
