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

import contextlib
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.collection import Collection
from actors.dispatcher import Dispatcher, Episode, Outcome
from actors.episode_files import EpisodeFiles
from actors.journal import Journal
from actors.metric_rows import MetricRows
from actors.progress import Progress
from actors.totals import Totals
from ript_ray.algos.advantages import is_kept
from ript_ray.algos.sampling import ContextSampler, Group, training_starts
from ript_ray.choosing import best_in_rollouts, candidates
from ript_ray.config import Config
from ript_ray.errors import UserError
from ript_ray.evaluation import evaluation_contexts, summary_by_start
from ript_ray.types import Context, EpisodeReport, Start

log = logging.getLogger("ript_ray")

_LEARNERS_LOST = "the learner group was lost"


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
        self._dispatcher = Dispatcher(actors, config.scaling, self._journal, absent, self._newest_version)
        busy = -(-(len(actors) + len(absent)) // config.sampling.group_size)
        self._busy_groups: int = self._journal.settle("busy_groups", busy)
        """Groups that keep every actor busy. Which groups come depends on it; a wider session does not change it."""
        self._sampler = ContextSampler(training_starts(config.env), config.sampling, config.run.seed)
        self._asynchronous = config.train.mode == "async"
        self._version = 0
        """Of weights that are published; there may be newer ones."""
        self._files = EpisodeFiles(self._journal, config.train.max_staleness)
        self._open: dict[int, Group] = {}
        self._rollouts: dict[int, list[Outcome]] = {}
        """Groups that are still rolled out when an update has enough, and their rollouts: the next update's, in
        ``async`` mode."""
        for fault in survived:
            self._journal.fault(fault)
        self._totals = Totals(errors=[*self._journal.faults, *survived])
        self._rows = MetricRows(None if run_dir is None else run_dir / "metrics.jsonl")
        self._newest: dict[bool, tuple[int, Any]] = {}
        """By success, the step that the newest rollout is of, and its reference."""
        self._diagnosis: str | None = None
        self._by_version: defaultdict[int, list[tuple[bool, Start]]] = defaultdict(list)
        """Success and start of the rollouts that were judged, by the weights that played them."""
        self._learner_starts = 0
        self._learnt_at = time.monotonic()
        self._lock = threading.Lock()
        self._progress = Progress(config, training=pool is not None)

    def __repr__(self) -> str:
        return "Coordinator"

    def run(self) -> None:
        """Collect samples for every update, in step with the learner (``sync``) or ahead of it (``async``)."""
        config = self._config
        dispatcher = self._next_dispatcher()
        self._version = learnt = self._newest_version()
        for step in range(config.train.updates):
            if not self._asynchronous:
                self._progress.enter("waiting for weights", 0)
                self._wait_for_weights(step)
                self._version = max(self._version, step)
            if self._collect(step, dispatcher):
                self._ask(self._pool.finish.remote(step))
                break
            jobs = self._ask(self._pool.seal.remote(step))
            if step < learnt:  # in an earlier session
                self._ask(self._pool.skip.remote(step))
                self._progress.learnt_before(step)
            elif jobs:
                # The learner may start: frames come in the order in which it needs them.
                references = dispatcher.render(jobs)
                self._ask(self._pool.rendering.remote(jobs, references))
        self._progress.enter("learning", 0)

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
        self._progress.enter(stage, len(contexts))
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
                with contextlib.suppress(UserError):  # its file is damaged; another will do for a video
                    kept[report.success][i] = self._files.reference(outcome, self._version)
            else:
                self._files.forget(outcome.episode.number)
        self._totals.errors += dispatcher.errors
        return results, kept

    def log(self, row: dict[str, Any]) -> None:
        """Add a row of metrics (learners call this), unless an earlier session had it."""
        self._rows.add(row)

    def progress(self, seen: int) -> dict[str, Any]:
        """What happens now, and the rows of metrics after the first ``seen``."""
        return self._progress.now() | {"rows": self._rows.after(seen)}

    def newest(self) -> dict[bool, tuple[int, list[Any]]]:
        """The newest rollout for training that failed, and that succeeded: its update, and its reference in a list."""
        with self._lock:
            return {success: (step + 1, [reference]) for success, (step, reference) in self._newest.items()}

    def present(self) -> list[Any]:
        """Handles of the rollout actors that are there now."""
        return self._dispatcher.there

    def rollout_actors(self) -> list[Any]:
        """Handles of all, also of those that are not there, or seem not to be."""
        return [*self._dispatcher.there, *self._dispatcher.absent]

    def totals(self) -> dict[str, Any]:
        """Sums over the whole run, for the summary."""
        totals = self._totals.summary()
        totals["seconds"]["earlier"] = self._journal.seconds_before
        return totals | {
            "sessions": self._journal.sessions,
            "played_again": self._journal.played_again,
            "best": self._best(),
            "skipped_states": self._sampler.skipped,
            "set_aside": [asdict(entry) for entry in self._sampler.aside],
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
            return best_in_rollouts(self._by_version)

    def candidates(self, last: int) -> list[int]:
        """Updates whose policies are compared at the end, ``last`` among them; after a resume the same.

        Raises:
            UserError: when one that has played cannot be read any more: whose outcomes are whose would be lost.
        """
        if self._journal.run_dir is None:
            return [last]
        folder = self._journal.run_dir / "checkpoints"
        found = candidates(last, self.best_updates(), self._config.train.candidates, folder)
        settled: list[int] = self._journal.settle("candidates", found)
        whole = found if settled == found else candidates(last, settled, len(settled), folder)
        if lost := sorted({*settled} - {*whole}):
            if self._journal.replaying:
                raise UserError(
                    f"{folder}: the policies of the updates {lost} were being compared with others and cannot be read "
                    f"any more; put them back, or take {folder / f'{last:04d}'} as the result"
                )
            self._journal.discard_unnoted()  # what the lost one may have played
            self._journal.settle("candidates", whole, anew=True)
        return whole

    def learning(self, step: int, done: int, expected: int) -> None:
        """Progress of the learner, which calls this."""
        self._learnt_at = time.monotonic()
        self._progress.learning(step, done, expected)

    def close(self) -> None:
        """The session ends: nothing more is noted, hence done. That processes go one before the other is no fault."""
        self._journal.close()

    def _best(self) -> dict[str, Any] | None:
        """The update whose weights did best in rollouts, and how well, as far as there were rollouts."""
        folder = None if self._journal.run_dir is None else self._journal.run_dir / "checkpoints"
        kept = (update for update in self.best_updates() if folder is None or (folder / f"{update:04d}").exists())
        best = next(kept, None)
        return None if best is None else {"update": best} | summary_by_start(self._by_version[best])

    def _next_dispatcher(self) -> Dispatcher:
        """For the next stage, with the actors that are there now."""
        last = self._dispatcher
        scaling, newest = self._config.scaling, self._newest_version
        self._dispatcher = Dispatcher(last.there, scaling, self._journal, last.absent, newest)
        return self._dispatcher

    def _collect(self, step: int, dispatcher: Dispatcher) -> bool:
        """Roll groups out until enough were accepted or a budget is spent; cancel the surplus.

        Returns:
            Whether the goal ``train.stop_at`` is reached.
        """
        config = self._config.sampling
        self._progress.enter(f"update {step + 1}: rollouts", config.groups * config.group_size)
        now = Collection(config, step, in_order=not self._asynchronous)
        if self._asynchronous:
            now.groups, now.finished, now.opened = self._open, self._rollouts, len(self._open)
            self._judge_complete(now, dispatcher)
        before, errors_before = self._totals.copy(), len(dispatcher.errors)
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
        metrics, goal = now.metrics(seconds), self._config.train.stop_at
        reached = goal is not None and metrics["rollout/success_low"] >= goal
        if not self._asynchronous or reached or step + 1 == self._config.train.updates:
            dispatcher.cancel(set(now.groups))
            for outcomes in now.finished.values():
                self._drop(outcomes)
        errors = dispatcher.errors[errors_before:]
        self._totals.rollout_s += seconds
        self._totals.ended_by[ended_by] += 1
        self._totals.errors += errors
        learners_lost = sum(_LEARNERS_LOST in error for error in self._totals.errors)
        row = metrics | self._totals.since(before)
        row |= {
            "rollout/skipped_states": self._sampler.skipped,
            "rollout/errors": len(errors),
            "rollout/restarts": self._journal.sessions - 1 + learners_lost,
        }
        self.log({"update": step + 1} | row)
        return reached

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
            self._version = self._newest_version()
        return self._version >= oldest

    def _take(self, outcome: Outcome, now: Collection, dispatcher: Dispatcher) -> None:
        """Note a finished rollout, and judge the groups that are complete now."""
        assert outcome.report is not None
        self._note(outcome.report)
        self._files.forget_stale(self._version)
        if outcome.episode.tag not in now.groups:
            self._drop([outcome])
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
        successes = [member.report.success for member in members if member.report is not None]
        versions = [member.report.policy_version for member in members if member.report is not None]
        start, rewards = group.contexts[0].start, np.array(successes, dtype=float)
        now.judged(start, successes, versions)
        with self._lock:
            for version, success in zip(versions, successes, strict=True):
                self._by_version[version].append((success, start))
        self._sampler.record(group, rewards)
        references = []
        try:
            if is_kept(rewards, self._config.objective):
                references = [self._files.reference(outcome, self._version) for outcome in members]
        except UserError as error:  # `run.storage` may have an episode as it became after the journal was copied
            fault = f"group {group.id} is not trained on: {error}"
            if fault not in self._totals.errors:  # of an earlier session
                self._totals.errors.append(fault)
                self._journal.fault(fault)
            now.accepted += 1  # as it did then: which groups come next depends on it
            return
        accepted = self._ask(self._pool.add.remote(group.id, [outcome.report for outcome in members], references))
        if accepted:
            now.accepted += 1
            self._files.accept(members)
            return
        if rewards.all():
            now.all_succeeded += 1
        else:
            now.all_failed += 1
        for outcome in members:
            self._files.forget(outcome.episode.number)

    def _give_up(self, outcome: Outcome, now: Collection, dispatcher: Dispatcher) -> int:
        """Set an environment aside that fails again and again, and discard its open groups; how many there were."""
        self._set_aside(outcome, dispatcher)
        gone = {group_id for group_id, group in now.groups.items() if self._sampler.is_aside(group.contexts[0])}
        for group_id in gone:
            del now.groups[group_id]
            self._drop(now.finished.pop(group_id))
        return len(gone)

    def _drop(self, outcomes: Sequence[Outcome]) -> None:
        """Of groups that are no longer wanted."""
        self._totals.surplus += len(outcomes)
        for outcome in outcomes:
            self._files.forget(outcome.episode.number)

    def _set_aside(self, outcome: Outcome, dispatcher: Dispatcher) -> None:
        context = outcome.episode.context
        self._sampler.set_aside(context, outcome.reason)
        if not outcome.recalled:  # what ends the run is not noted: once it is mended, a resumed one tries again
            self._journal.given_up(outcome.episode.number, outcome.reason)
        dispatcher.drop(lambda episode: self._sampler.is_aside(episode.context))

    def _wait_for_weights(self, version: int) -> None:
        limit = self._config.scaling.wait_timeout_s
        while not self._ask(self._store.wait_for.remote(version, limit)):
            if time.monotonic() - self._learnt_at > limit:  # an update of a large policy may take longer
                raise TimeoutError(
                    f"Coordinator waited {limit:.0f} s for weights version {version}, and the learner did nothing; see "
                    "its log, or raise scaling.wait_timeout_s"
                )

    def _newest_version(self) -> int:
        """Of the weights that are published."""
        version, _ = self._ask(self._store.newest_version.remote())
        return int(version)

    def _ask(self, reference: Any) -> Any:
        return ray.get(reference, timeout=self._config.scaling.wait_timeout_s + 10.0)

    def _note(self, report: EpisodeReport) -> None:
        self._totals.note(report)
        self._progress.one_more(earlier=self._journal.replaying)
