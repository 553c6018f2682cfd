"""The coordinator: sends contexts to rollout actors, collects what comes back, refills what was rejected.

    sampler ──group of K contexts──▶ queue ──one episode per free actor──▶ RolloutActor.collect
       ▲                                                                        │ (report, reference)
       └── refill while the quota of accepted groups is not met ◀── SamplePool.add ┘
                                                                      │ quota met or budget spent
                                                                      ▼
                                                            SamplePool.seal(step) ──▶ learners

Loop        consumes              produces            waits for                          unblocked by
run         finished episodes     sealed steps        weights version ≥ step − lead      WeightStore.publish
            (lead = 0 in sync mode)
evaluate    held-out contexts     success counts      its episodes                       –

It is the caller of `collect`, hence the owner of every trajectory: an actor that dies loses only the episode it runs,
which is played again. Every wait is bounded.

In ``async`` mode groups that are unfinished when an update has enough go on and count for the next one, so nobody waits
for the slowest episode; new ones are opened once version step − lead is there. In ``sync`` mode groups are judged in
the order in which they were opened, whichever finishes first: then nothing depends on timing, and a run that was
resumed (`actors.journal`) ends as if it had never stopped.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.collection import Collection
from actors.dispatcher import Dispatcher, Episode, Outcome
from actors.journal import Journal
from ript_ray.algos.advantages import is_kept
from ript_ray.algos.sampling import ContextSampler, Group, training_starts
from ript_ray.config import Config
from ript_ray.data.lines import append_json_line, read_json_lines
from ript_ray.data.storage import forget_trajectory, load_trajectory
from ript_ray.errors import UserError
from ript_ray.evaluation import evaluation_contexts, success_summary
from ript_ray.types import Context, EpisodeReport

log = logging.getLogger("ript_ray")

_LEARNERS_LOST = "the learner group was lost"
_SPARE_VERSIONS = 2
"""Episodes stay whole a little longer: should the newest checkpoints be damaged, they are trained on again."""


@dataclass(slots=True)
class _Totals:
    episodes: int = 0
    env_steps: int = 0
    surplus: int = 0
    """Played, but of groups that were no longer wanted."""
    frames: int = 0
    """Rendered because a policy looked."""
    eager_frames: int = 0
    """That rendering every step would have taken."""
    errors: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("physics", "render", "inference"), 0.0))
    weights_wait_s: float = 0.0
    """That episodes waited for weights, all together."""
    longest_weights_wait_s: float = 0.0
    rollout_s: float = 0.0
    ended_by: Counter[str] = field(default_factory=Counter)
    """How often each quota or budget ended the rollouts of an update."""


@ray.remote(num_cpus=0, max_concurrency=4)
class Coordinator:
    """Drives rollouts for training and evaluation.

    Args:
        config: the whole configuration.
        actors: handles of `RolloutActor`.
        pool: handle of `SamplePool`.
        store: handle of `WeightStore`.
        run_dir: holds the journal, which is lived through first if there is one, the recorded episodes and
            ``metrics.jsonl``; None records nothing.
        survived: failures that ended earlier sessions, to be noted.
        absent: more actors, which wait for a node with room for them and play as soon as there is one.
    """

    def __init__(
        self,
        config: Config,
        actors: list[Any],
        pool: Any,
        store: Any,
        run_dir: Path | None = None,
        survived: Sequence[str] = (),
        absent: Sequence[Any] = (),
    ) -> None:
        self._config = config
        self._pool = pool
        self._store = store
        self._journal = Journal(run_dir)
        self._dispatcher = Dispatcher(actors, config.scaling, self._journal, absent)
        busy = -(-(len(actors) + len(absent)) // config.sampling.group_size)
        self._busy_groups: int = self._journal.settle("busy_groups", busy)
        """That keep every actor busy. Which groups there are depends on it, so a wider session does not change it."""
        self._metrics = run_dir / "metrics.jsonl" if run_dir is not None else None
        self._sampler = ContextSampler(training_starts(config.env), config.sampling, config.run.seed)
        self._asynchronous = config.train.mode == "async"
        self._version = 0
        """Of weights that are published; there may be newer ones."""
        self._accepted: deque[tuple[int, int]] = deque()
        """Version and number of the episodes that are whole on disk, to be trained on."""
        self._open: dict[int, Group] = {}
        self._rollouts: dict[int, list[Outcome]] = {}
        """Groups that are still rolled out when an update has enough, and their rollouts: the next update's, in
        ``async`` mode."""
        for fault in survived:
            self._journal.fault(fault)
        self._totals = _Totals(errors=[*self._journal.faults, *survived])
        self._rows = [] if self._metrics is None else read_json_lines(self._metrics, repair=True)
        self._logged = {_row_key(row) for row in self._rows}
        self._newest: dict[bool, tuple[int, Any]] = {}
        """By success, the step that the newest rollout is of, and its reference."""
        self._diagnosis: str | None = None
        self._by_version: defaultdict[int, list[bool]] = defaultdict(list)
        """Results of the rollouts that were judged, by the weights that played them."""
        self._learner_starts = 0
        self._learnt_at = time.monotonic()
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
        dispatcher = self._next_dispatcher()
        self._version, _ = self._ask(self._store.newest_version.remote())
        for step in range(config.train.updates):
            if not self._asynchronous:
                self._enter("waiting for weights", 0)
                self._wait_for_weights(step)
                self._version = max(self._version, step)
            if self._collect(step, dispatcher):
                self._ask(self._pool.finish.remote(step))
                break
            jobs = self._ask(self._pool.seal.remote(step))
            if self._ask(self._store.newest.remote(step)) is not None:  # learnt in an earlier session
                self._ask(self._pool.skip.remote(step))
            elif jobs:
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
        dispatcher = self._next_dispatcher()
        position = {context: i for i, context in enumerate(contexts)}
        self._enter(stage, len(contexts))
        for context in contexts:
            dispatcher.submit(Episode(-1, context, guidance))
        results: list[bool | None] = [None] * len(contexts)
        kept: dict[bool, dict[int, Any]] = {True: {}, False: {}}
        while (outcome := dispatcher.next()) is not None:
            report, i = outcome.report, position[outcome.episode.context]
            if report is None:
                self._set_aside(outcome, dispatcher)
                continue
            results[i] = report.success
            self._note(report)
            if len(kept[report.success]) < keep:
                kept[report.success][i] = self._reference(outcome)
            else:
                self._forget(outcome.episode.number)
        self._totals.errors += dispatcher.errors
        return results, kept

    def log(self, row: dict[str, Any]) -> None:
        """Add a row of metrics (learners call this), unless an earlier session had it."""
        with self._lock:
            if _row_key(row) in self._logged:
                return
            timed = {"time": time.time()} | row
            if self._metrics is not None:
                append_json_line(self._metrics, timed)
            self._logged.add(_row_key(row))
            self._rows.append(timed)

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

    def newest(self) -> dict[bool, tuple[int, list[Any]]]:
        """The newest rollout for training that failed, and that succeeded: its update, and its reference in a list."""
        with self._lock:
            return {success: (step + 1, [reference]) for success, (step, reference) in self._newest.items()}

    def present(self) -> list[Any]:
        """Handles of the rollout actors that are there now."""
        return self._dispatcher.there

    def totals(self) -> dict[str, Any]:
        """Sums over the whole run, for the summary."""
        totals = self._totals
        return {
            "episodes": totals.episodes,
            "env_steps": totals.env_steps,
            "surplus": totals.surplus,
            "errors": totals.errors,
            "sessions": self._journal.sessions,
            "best": self._best(),
            "skipped_states": self._sampler.skipped,
            "collections_ended_by": dict(totals.ended_by),
            "set_aside": [asdict(entry) for entry in self._sampler.aside],
            "frames": {"looked": totals.frames, "eager": totals.eager_frames},
            "seconds": {"rollout": totals.rollout_s, "earlier": self._journal.seconds_before} | totals.seconds,
            "weights_wait_s": {
                "mean": totals.weights_wait_s / max(1, totals.episodes),
                "max": totals.longest_weights_wait_s,
            },
        }

    def learners_started(self, step: int) -> None:
        """The learner group begins at update ``step`` (it calls this); more than once means that it had been lost."""
        with self._lock:
            self._learner_starts += 1
            if self._learner_starts > 1:
                fault = f"{_LEARNERS_LOST} and started again at update {step + 1}"
                self._totals.errors.append(fault)
                self._journal.fault(fault)

    def diagnose(self, reason: str) -> None:
        """Note why the learner failed (it calls this) when it would do so again."""
        with self._lock:
            self._diagnosis = reason

    def diagnosis(self) -> str | None:
        """What the learner noted."""
        with self._lock:
            return self._diagnosis

    def best_updates(self) -> list[int]:
        """Updates whose weights rollouts have played with, the best first: by the lower bound of their success."""
        with self._lock:
            low = {version: success_summary(results)["ci95"][0] for version, results in self._by_version.items()}
        return sorted((version for version in low if version > 0), key=lambda version: (-low[version], -version))

    def learning(self, step: int, done: int, expected: int) -> None:
        """Progress of the learner, which calls this; rollouts that run meanwhile are shown rather."""
        stage = f"update {step + 1}: learning"
        self._learnt_at = time.monotonic()
        with self._lock:
            self._finished[stage] = done / expected
            if not self._stage.endswith("rollouts"):
                self._stage, self._done, self._expected = stage, done, expected

    def _best(self) -> dict[str, Any] | None:
        """The update whose weights did best in rollouts, and how well, as far as there were rollouts."""
        folder = None if self._journal.run_dir is None else self._journal.run_dir / "checkpoints"
        kept = (update for update in self.best_updates() if folder is None or (folder / f"{update:04d}").exists())
        best = next(kept, None)
        return None if best is None else {"update": best} | success_summary(self._by_version[best])

    def _next_dispatcher(self) -> Dispatcher:
        """For the next stage, with the actors that are there now."""
        last = self._dispatcher
        self._dispatcher = Dispatcher(last.there, self._config.scaling, self._journal, last.absent)
        return self._dispatcher

    def _collect(self, step: int, dispatcher: Dispatcher) -> bool:
        """Roll groups out until enough were accepted or a budget is spent; cancel the surplus.

        Returns:
            Whether the goal ``train.stop_at`` is reached.
        """
        config = self._config.sampling
        self._enter(f"update {step + 1}: rollouts", config.groups * config.group_size)
        now = Collection(config, step, in_order=not self._asynchronous)
        if self._asynchronous:
            now.groups, now.finished, now.opened = self._open, self._rollouts, len(self._open)
            self._judge_complete(now, dispatcher)
        errors_before = len(dispatcher.errors)
        worked_before = dict(self._totals.seconds)
        waited_before, episodes_before = self._totals.weights_wait_s, self._totals.episodes
        while (ended := self._ended(now)) is None:
            self._refill(now, dispatcher)
            outcome = dispatcher.next()
            if outcome is None:  # only weights can be missing
                self._wait_for_weights(step - self._config.train.lead)
            elif outcome.report is None:
                now.opened -= self._give_up(outcome, now, dispatcher)
            else:
                self._take(outcome, now, dispatcher)
        ended_by, seconds = ended
        last = step + 1 == self._config.train.updates
        if not self._asynchronous or last:
            dispatcher.cancel(set(now.groups))
            for outcomes in now.finished.values():
                self._totals.surplus += len(outcomes)
                for outcome in outcomes:
                    self._forget(outcome.episode.number)
        errors = dispatcher.errors[errors_before:]
        self._totals.rollout_s += seconds
        self._totals.ended_by[ended_by] += 1
        self._totals.errors += errors
        row = now.metrics(seconds) | {"rollout/skipped_states": self._sampler.skipped, "rollout/errors": len(errors)}
        row |= {f"rollout/{part}_s": s - worked_before[part] for part, s in self._totals.seconds.items()}
        episodes = self._totals.episodes - episodes_before
        learners_lost = sum(_LEARNERS_LOST in error for error in self._totals.errors)
        row["rollout/restarts"] = self._journal.sessions - 1 + learners_lost
        row["rollout/weights_wait_s"] = (self._totals.weights_wait_s - waited_before) / max(1, episodes)
        self.log({"update": step + 1} | row)
        goal = self._config.train.stop_at
        return goal is not None and row["rollout/success_low"] >= goal

    def _ended(self, now: Collection) -> tuple[str, float] | None:
        """What ended a collection, and after how many seconds; as the journal has it, if it does."""
        entry = self._journal.take("collected")
        if entry is not None:
            return entry["ended_by"], entry["seconds"]
        ended_by = None if self._journal.replaying else now.ended_by()
        if ended_by is None:
            return None
        self._journal.collected(now.step, ended_by, now.seconds)
        return ended_by, now.seconds

    def _refill(self, now: Collection, dispatcher: Dispatcher) -> None:
        """Open as many groups as are still wanted, and as keep every actor busy.

        In ``async`` mode that is whenever an actor has nothing to do, which the journal has to tell a resumed run.
        """
        config = self._config.sampling
        while now.opened < config.max_groups:
            wanted = len(now.groups) < config.groups - now.accepted
            if self._journal.replaying and self._asynchronous:
                if self._journal.take("opened") is None:
                    break
            elif self._asynchronous:
                if not (wanted or dispatcher.starving) or not self._may_open(now.step):
                    break
                self._journal.opened()
            elif not wanted and len(now.groups) >= self._busy_groups:
                break
            group = self._sampler.next_group()
            now.open(group)
            acting = self._config.policy
            for context in group.contexts:
                dispatcher.submit(Episode(group.id, context, acting.guidance, exploring=True))

    def _may_open(self, step: int) -> bool:
        """Are the weights there that no rollout for this step may be older than?"""
        oldest = step - self._config.train.lead
        if self._version < oldest:
            self._version, _ = self._ask(self._store.newest_version.remote())
        return self._version >= oldest

    def _take(self, outcome: Outcome, now: Collection, dispatcher: Dispatcher) -> None:
        """Note a finished rollout, and judge the groups that are complete now."""
        assert outcome.report is not None
        self._note(outcome.report)
        self._forget_stale()
        if outcome.episode.tag not in now.groups:
            self._totals.surplus += 1
            self._forget(outcome.episode.number)
            return
        if outcome.reference is not None:
            with self._lock:
                self._newest[outcome.report.success] = now.step, outcome.reference
        now.finished[outcome.episode.tag].append(outcome)
        self._judge_complete(now, dispatcher)

    def _judge_complete(self, now: Collection, dispatcher: Dispatcher) -> None:
        while not now.has_enough and (group := now.next_complete()) is not None:
            self._judge(group, now)
            if not now.has_enough:  # at once, so that the next group depends on the judged ones alone
                self._refill(now, dispatcher)

    def _judge(self, group: Group, now: Collection) -> None:
        """Hand a complete group to the pool, which accepts or rejects it."""
        del now.groups[group.id]
        members = sorted(now.finished.pop(group.id), key=lambda outcome: outcome.episode.context.seed)
        rewards = np.array([float(member.report.success) for member in members if member.report is not None])
        versions = [member.report.policy_version for member in members if member.report is not None]
        now.judged(group.contexts[0].env_id, rewards.tolist(), versions)
        with self._lock:
            for version, reward in zip(versions, rewards, strict=True):
                self._by_version[version].append(bool(reward))
        self._sampler.record(group, rewards)
        references = []
        try:
            if is_kept(rewards, self._config.objective):
                references = [self._reference(outcome) for outcome in members]
        except UserError as error:  # `run.storage` may have an episode as it became after the journal was copied
            fault = f"group {group.id} is not trained on: {error}"
            self._totals.errors.append(fault)
            self._journal.fault(fault)
            return
        accepted = self._ask(self._pool.add.remote(group.id, [outcome.report for outcome in members], references))
        if accepted:
            now.accepted += 1
            self._accepted.extend((o.report.policy_version, o.episode.number) for o in members if o.report is not None)
            return
        if rewards.all():
            now.all_succeeded += 1
        else:
            now.all_failed += 1
        for outcome in members:
            self._forget(outcome.episode.number)

    def _reference(self, outcome: Outcome) -> Any:
        """Of the trajectory; one that was played in an earlier session is read from its file, if an update needs it."""
        file = self._journal.episode_file(outcome.episode.number)
        if outcome.reference is not None or file is None:
            return outcome.reference
        assert outcome.report is not None
        if outcome.report.policy_version < self._version - self._config.train.max_staleness:
            return None
        return ray.put(load_trajectory(file))

    def _forget(self, number: int) -> None:
        """Leave only the record of an episode that nothing will be learnt from."""
        file = self._journal.episode_file(number)
        # Actors that are only simulated write none (benchmarks/control.py).
        if file is not None and file.exists() and not self._journal.replaying:
            try:
                forget_trajectory(file)
            except (OSError, UserError):  # nobody needs it, whole or damaged
                log.exception("%s was left as it is", file)

    def _forget_stale(self) -> None:
        """Forget two accepted episodes, if there are, that are too old to be trained on again: more go than come.

        Those of earlier sessions were forgotten then.
        """
        oldest = self._version - self._config.train.max_staleness - _SPARE_VERSIONS
        for _ in range(2):
            if self._accepted and self._accepted[0][0] < oldest:
                self._forget(self._accepted.popleft()[1])

    def _give_up(self, outcome: Outcome, now: Collection, dispatcher: Dispatcher) -> int:
        """Set an environment aside that fails again and again, and discard its open groups; how many there were."""
        self._set_aside(outcome, dispatcher)
        gone = [group_id for group_id, group in now.groups.items() if self._sampler.is_aside(group.contexts[0])]
        for group_id in gone:
            del now.groups[group_id], now.finished[group_id]
        return len(gone)

    def _set_aside(self, outcome: Outcome, dispatcher: Dispatcher) -> None:
        context = outcome.episode.context
        self._sampler.set_aside(context, outcome.reason)
        dispatcher.drop(lambda episode: self._sampler.is_aside(episode.context))

    def _wait_for_weights(self, version: int) -> None:
        limit = self._config.scaling.wait_timeout_s
        while not self._ask(self._store.wait_for.remote(version, limit)):
            if time.monotonic() - self._learnt_at > limit:  # an update of a large policy may take longer
                raise TimeoutError(
                    f"Coordinator waited {limit:.0f} s for weights version {version}, and the learner did nothing; see "
                    "its log, or raise scaling.wait_timeout_s"
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
        totals.frames += report.frames
        totals.eager_frames += report.eager_frames
        totals.env_steps += report.length
        totals.weights_wait_s += report.weights_wait_s
        totals.longest_weights_wait_s = max(totals.longest_weights_wait_s, report.weights_wait_s)
        for name, value in report.seconds.items():
            totals.seconds[name] += value
        with self._lock:
            self._done += 1
            if self._stage in self._finished:
                self._finished[self._stage] = min(1.0, self._done / max(1, self._expected))


def _row_key(row: dict[str, Any]) -> tuple[Any, ...]:
    """The update and the sections of a row: there is one row of each."""
    return row["update"], *sorted({name.partition("/")[0] for name in row if "/" in name})


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
