"""Supervised fine-tuning on demonstrations: the starting policy."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from learner.update import Step, update
from ript_ray.config import Config, ObjectiveConfig, SftConfig, resolve
from ript_ray.data.demonstrations import frames_on_disk, is_foreign, read_demonstrations, shrunk
from ript_ray.data.windows import gather, gather_actions, seen_starts
from ript_ray.errors import UserError
from ript_ray.policies.checkpoints import build_policy, cpu_weights, load_policy, policy_class
from ript_ray.policies.policy import Policy
from ript_ray.policies.starting import check_chunk
from ript_ray.policies.transform import Transform, check_relative
from ript_ray.types import Batch, Trajectory, Window


def train_on_demonstrations(config: Config, on_step: Callable[[int, float], None]) -> tuple[Policy, dict[str, float]]:
    """Imitate all demonstrations of ``data.demos``, good and bad alike, for ``sft.steps`` optimiser steps.

    Returns:
        The policy and the diagnostics of the update.
    """
    start = _policy_to_go_on_with(config) if config.sft.init else None
    frame_size = config.env.image_size if start is None else start.transform.frame_size
    source = resolve(config.data.demos)
    found = read_demonstrations(source, config.env.ids[0], config.data, image_size=frame_size)
    if start is not None and frame_size is None:  # it would make them smaller itself, at every step
        found = (shrunk(demo, start.transform.smallest_frame_size) for demo in found)
    demos = frames_on_disk(found) if source.is_dir() else list(found)  # a dataset may be larger than the memory
    tasks = sorted({demo.context.env_id for demo in demos})
    if not set(tasks) <= set(config.env.ids):
        raise UserError(
            f"data.demos={config.data.demos!r} is of {', '.join(tasks)}; expected demonstrations of env.id="
            f"{config.env.id!r}: name others, or set env.id={','.join(tasks)}"
        )
    pool = dict(enumerate(demos))
    windows = [
        Window(i, start)
        for i, demo in pool.items()
        for start in seen_starts(len(demo), demo.frame_steps, config.data.short, config.data.tail)
    ]
    if not windows:
        raise UserError(f"data.demos={config.data.demos!r}: no windows of 50 actions; set data.tail=pad")
    torch.manual_seed(config.run.seed)
    if start is not None:
        demo = demos[0]
        start.transform.check_sizes(f"data.demos={config.data.demos!r}", demo.states.shape[1], demo.actions.shape[1])
        if not is_foreign(source):  # others' are as large as they are, and enlarged if need be
            start.transform.check_frame_size(
                f"data.demos={config.data.demos!r}: sft.init={config.sft.init!r}", demo.frames.shape[-2]
            )
    elif config.train.anchor > 0:
        raise UserError(
            f"train.anchor={config.train.anchor:g} without sft.init: it would hold a new policy at its random weights; "
            "set train.anchor=0, or sft.init"
        )
    policy = start or new_policy(config.sft, demos, windows)
    if config.scaling.learner_gpus > 0:
        if not torch.cuda.is_available():
            raise UserError(
                f"scaling.learner_gpus={config.scaling.learner_gpus:g}: PyTorch finds no GPU here; set "
                "scaling.learner_gpus=0 to train on CPUs, or run: python launch.py doctor"
            )
        policy = policy.to("cuda")
    rng = np.random.default_rng(config.run.seed)
    no_advantages = dict.fromkeys(pool, 0.0)
    size = config.train.batch_size

    def load(rows: np.ndarray) -> Batch:
        return gather([windows[row] for row in rows], pool, no_advantages)

    order = np.concatenate([rng.permutation(len(windows)) for _ in range(-(-config.sft.steps * size // len(windows)))])
    steps = []
    for i in range(config.sft.steps):
        rows = np.array_split(order[i * size : (i + 1) * size], -(-size // config.train.micro_batch))
        steps.append(Step([partial(load, part) for part in rows], size, size))
    # The condition knows nothing yet: both branches learn the same.
    objective = ObjectiveConfig(name="imitation", alpha=1.0)
    generator = torch.Generator().manual_seed(config.run.seed)
    train = config.train.model_copy(update={"condition_lr": 1.0})  # which is for what is yet to be told apart
    return update(policy, steps, train, objective, generator, on_step)


def _policy_to_go_on_with(config: Config) -> Policy:
    """That of ``sft.init``, which says itself what it is and what its actions are relative to."""
    for key in ("policy", "own", "relative"):
        if getattr(config.sft, key) != SftConfig.model_fields[key].default:
            raise UserError(
                f"sft.{key}={getattr(config.sft, key)} with sft.init={config.sft.init!r}: it is for a new policy, and "
                "this one is what it is; leave one of them out"
            )
    policy = load_policy(resolve(config.sft.init or ""))
    check_chunk(f"sft.init={config.sft.init!r}", policy, config.data)
    return policy


def new_policy(sft: SftConfig, demos: list[Trajectory], windows: list[Window]) -> Policy:
    """A fresh policy of an architecture, with the transform and the chunk statistics of the demonstrations.

    Args:
        sft: names the architecture, and says what its actions are relative to.
        demos: the demonstrations.
        windows: those of their windows that it will be trained on.

    Raises:
        UserError: when ``sft.relative`` or ``sft.own`` do not suit it.
    """
    relative = sft.relative
    labels = [demo.actions if demo.labels is None else demo.labels for demo in demos]
    states, actions = np.concatenate([demo.states for demo in demos]), np.concatenate(labels)
    check_relative("sft.relative", relative, actions.shape[1], states.shape[1])
    mask = tuple(i < relative for i in range(actions.shape[1]))
    before, chosen, valid = gather_actions(windows, dict(enumerate(demos)))
    bases = None
    if relative:  # the last actions of a chunk are further from the state before it than the first
        bases = before[:, None].expand(-1, chosen.shape[1], -1)[valid].numpy()
        actions = chosen[valid].numpy()
    transform = Transform.fit(states, actions, demos[0].frames.shape[2], mask, bases)
    chunks = transform.encode_actions(chosen, before)
    counted = valid[..., None].float()
    mean = (chunks * counted).sum(0) / counted.sum(0).clamp_min(1.0)
    std = (((chunks - mean).square() * counted).sum(0) / counted.sum(0).clamp_min(1.0)).sqrt().clamp_min(0.05)
    kind = policy_class(sft.policy)
    try:
        inspect.signature(kind.new).bind(transform, mean, std, demos[0].frames.shape[1], **sft.own)
    except TypeError as error:
        raise UserError(f"sft.own={sft.own} with sft.policy={sft.policy}: {error}") from error
    policy = kind.new(transform, mean, std, demos[0].frames.shape[1], **sft.own)
    if ":" in sft.policy:  # somebody's own may forget something in its description; better now than when it is loaded
        build_policy(policy.describe(), cpu_weights(policy))
    return policy
