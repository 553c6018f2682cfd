"""The whole loop in one process, without actors: ``scaling.ray=false``, to be stepped through with a debugger.

It plays, judges, learns and evaluates what a Ray job in ``sync`` mode with one actor and one learner does, in the same
order and with the same arithmetic: the weights are equal to the bit. It cannot be resumed.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from learner.learner import Learner
from learner.steps import plan_steps
from ript_ray.algos.advantages import is_kept
from ript_ray.algos.sampling import ContextSampler, Group, contexts_to_choose_by, training_starts
from ript_ray.choosing import best_in_rollouts, candidates, choose_update
from ript_ray.config import Config
from ript_ray.data.demonstrations import demonstrations_to_show
from ript_ray.data.lines import append_json_line
from ript_ray.data.shards import drop_older_than, make_shard, number_demos, samples_of, without_frame
from ript_ray.envs import World, make
from ript_ray.envs.current import CurrentWorld
from ript_ray.envs.rendering import choose, describe_renderer
from ript_ray.evaluation import before_and_after, evaluation_contexts, success_row
from ript_ray.policies.acting import Acting
from ript_ray.policies.checkpoints import (
    build_policy,
    cpu_weights,
    from_published,
    load_policy,
    prune_checkpoints,
    save_policy,
    to_publish,
)
from ript_ray.policies.policy import Policy
from ript_ray.policies.starting import check_world
from ript_ray.reporting import progress_bar, versions
from ript_ray.rollout import play, render_steps
from ript_ray.types import Context, EpisodeReport, Sample, Start, Trajectory


def train_alone(config: Config, policy: Policy, run_dir: Path) -> dict[str, Any]:
    """Collect, learn, again and again; evaluate on held-out states before and after.

    Args:
        config: the whole configuration; ``train.mode=sync``.
        policy: the starting policy.
        run_dir: gets ``metrics.jsonl``, ``checkpoints/`` and ``final/``.

    Returns:
        What goes into ``summary.json``.
    """
    began = time.perf_counter()
    learner = Learner(config, policy.describe(), cpu_weights(policy))
    demos = number_demos([(EpisodeReport.of(demo), demo) for demo in demonstrations_to_show(config, policy)])
    player = Player(config, policy)
    base = player.evaluate()
    print(f"before: {sum(base['held_out'])}/{len(base['held_out'])}" if "held_out" in base else "before: not evaluated")
    samples: dict[int, Sample] = {}
    sampler = ContextSampler(training_starts(config.env), config.sampling, config.run.seed)
    groups = {"accepted": 0, "rejected": 0}
    played: dict[int, list[tuple[bool, Start]]] = {}
    checkpoints = run_dir / "checkpoints"
    seconds = dict.fromkeys(("rollout", "learner_busy"), 0.0)
    for step in range(config.train.updates):
        rollouts_began = time.perf_counter()
        results: list[tuple[bool, Start]] = []
        accepted: list[int] = []
        for group, rollouts in player.collect(sampler, accepted):
            outcomes = np.array([float(rollout.success) for rollout in rollouts])
            results += [(rollout.success, rollout.context.start) for rollout in rollouts]
            sampler.record(group, outcomes)
            if is_kept(outcomes, config.objective):
                samples |= samples_of(group.id, [EpisodeReport.of(rollout) for rollout in rollouts], rollouts)
                accepted.append(group.id)
            print(f"update {step + 1}, group {group.id}: {int(outcomes.sum())}/{len(outcomes)}")
        learning_began = time.perf_counter()
        played[player.version] = results
        success = success_row("rollout", results)
        seconds["rollout"] += learning_began - rollouts_began
        rejected = len(results) // config.sampling.group_size - len(accepted)
        groups["accepted"] += len(accepted)
        groups["rejected"] += rejected
        goal = config.train.stop_at
        if goal is not None and success["rollout/success_low"] >= goal:
            print(f"train.stop_at={goal:g} is reached")
            break
        drop_older_than(samples, step - config.train.max_staleness)
        shard, _ = make_shard(step, samples, config, demos)
        torch.set_num_threads(config.scaling.learner_threads)
        frames = player.render(without_frame(shard, samples), samples)
        diagnostics = learner.learn(step, plan_steps(shard, shard.trajectories, config.train.micro_batch, frames))
        save_policy(checkpoints / f"{step + 1:04d}", learner.acting, about={"update": step + 1})
        if config.run.keep_checkpoints is not None:
            best = best_in_rollouts(played)
            prune_checkpoints(checkpoints, config.run.keep_checkpoints, best, config.train.spared)
        player.adopt(learner.acting, step + 1)
        row: dict[str, float] = {"update": step + 1, **success}
        row |= {"rollout/groups_accepted": len(accepted), "rollout/groups_rejected": rejected}
        row |= {"rollout/skipped_states": float(sampler.skipped)}
        row |= {"rollout/seconds": learning_began - rollouts_began}
        row |= {"learner/busy_s": time.perf_counter() - learning_began}
        seconds["learner_busy"] += row["learner/busy_s"]
        row |= {f"learner/{name}": value for name, value in diagnostics.items()}
        append_json_line(run_dir / "metrics.jsonl", {"time": time.time()} | row)
        print(", ".join(f"{name} {value:.4g}" for name, value in row.items()))
    updates = player.version
    compared = candidates(updates, best_in_rollouts(played), config.train.candidates, checkpoints)

    def policy_after(update: int) -> Policy:
        return load_policy(checkpoints / f"{update:04d}") if update else policy

    def play_as(update: int, episodes: range) -> list[bool]:
        player.adopt(policy_after(update), update)
        return player.play(contexts_to_choose_by(config.env, config.eval.seed, episodes))

    chosen = choose_update(compared, play_as, config.eval.halving_episodes)
    ending = policy_after(chosen["update"])
    save_policy(run_dir / "final", ending, about={"update": chosen["update"]})
    player.adopt(ending, chosen["update"])
    print(f"update {chosen['update']} is kept")
    final, contexts = player.evaluate(), evaluation_contexts(config)
    # The learner has nothing to do while rollouts are played.
    seconds |= {"learner_idle": seconds["rollout"], "total": time.perf_counter() - began}
    return {
        "env": config.env.id,
        "evaluation": {name: before_and_after(contexts[name], base[name], after) for name, after in final.items()},
        "episodes": player.episodes,
        "env_steps": player.env_steps,
        "groups": groups,
        "updates": updates,
        "chosen": chosen,
        "weights_sha256": player.sha256,
        "errors": [],
        "seconds": seconds,
        "versions": versions(describe_renderer()),
    }


class Player:
    """Plays episodes, one after the other, with the newest policy.

    Args:
        config: the whole configuration.
        policy: the first one.
    """

    def __init__(self, config: Config, policy: Policy) -> None:
        choose(None)
        self._config = config
        self._current = CurrentWorld(self._make)
        self.episodes = self.env_steps = 0
        self.adopt(policy, 0)

    def adopt(self, policy: Policy, version: int) -> None:
        """Act with these weights from now on, as published."""
        arrays, self.sha256 = to_publish(policy, self._config.policy.precision)
        copies = {name: array.copy() for name, array in arrays.items()}
        self.policy = build_policy(policy.describe(), from_published(copies), share=True).requires_grad_(False)
        self.version = version

    def evaluate(self) -> dict[str, list[bool]]:
        """Successes on the contexts of each column of the evaluation."""
        return {name: self.play(contexts) for name, contexts in evaluation_contexts(self._config).items()}

    def renderer(self) -> str:
        """The OpenGL backend in use."""
        return describe_renderer()

    def play(self, contexts: Sequence[Context], guidance: float | None = None) -> list[bool]:
        """Successes in the order of the contexts, acting as evaluation does, or with another scale of guidance."""
        guidance = self._config.eval.guidance if guidance is None else guidance
        shown = progress_bar(len(contexts), "evaluation", iterable=contexts, leave=False)
        return [self._play(context, guidance, exploring=False).success for context in shown]

    def collect(self, sampler: ContextSampler, accepted: Sequence[int]) -> Iterator[tuple[Group, list[Trajectory]]]:
        """Groups with their rollouts, until enough of them are among ``accepted`` or the budget is spent."""
        sampling, acting = self._config.sampling, self._config.policy
        began, opened = time.perf_counter(), 0
        waiting: deque[Group] = deque()
        while len(accepted) < sampling.quota:
            # As many as are still wanted are drawn ahead: a draw depends on what was judged before it.
            while opened < sampling.max_groups and len(waiting) < max(1, sampling.groups - len(accepted)):
                waiting.append(sampler.next_group())
                opened += 1
            if not waiting or time.perf_counter() - began > (sampling.max_seconds or math.inf):
                return
            group = waiting.popleft()
            yield group, [self._play(context, acting.guidance, exploring=True) for context in group.contexts]

    def render(
        self, keys: Sequence[tuple[int, int]], samples: Mapping[int, Sample]
    ) -> dict[tuple[int, int], np.ndarray]:
        """Frames of trajectories before steps at which the policy did not look: uint8[C, H, W, 3] by identifier and
        step.
        """
        frames = {}
        for i, step in sorted(keys):  # one trajectory, and hence one task, after the other
            trajectory = samples[i].trajectory
            (frames[i, step],) = render_steps(self._enter(trajectory.context.env_id), trajectory, [step])
        return frames

    def _play(self, context: Context, guidance: float, exploring: bool) -> Trajectory:
        torch.set_num_threads(1)
        acting = Acting.of(self._config.policy, guidance, exploring)
        world = self._enter(context.env_id)
        trajectory = play(world, self.policy, context, acting, policy_version=self.version)
        self.episodes += 1
        self.env_steps += len(trajectory)
        return trajectory

    def _enter(self, env_id: str) -> World:
        return self._current.enter(env_id, self._config.env.image_size, self._config.env.max_steps)

    def _make(self, env_id: str, image_size: int, max_steps: int | None) -> World:
        world = make(env_id, image_size, max_steps)
        check_world(world, self.policy.transform)
        return world
