"""Windows: every stretch of 50 actions of a trajectory is a sample. They are indices, never copies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch

from ript_ray.policies.integration import ChainStep
from ript_ray.types import Batch, Trajectory, Window

HORIZON = 50
"""Actions in a window, and in the chunk that a policy predicts."""

Short = Literal["pad", "drop"]
Tail = Literal["drop", "pad"]


def window_starts(length: int, horizon: int = HORIZON, short: Short = "pad", tail: Tail = "drop") -> range:
    """First steps of all windows of a trajectory of ``length`` steps.

    With ``tail="drop"`` there are length − horizon + 1 of them (80 → 31, 100 → 51), all full. With ``tail="pad"``
    every step starts a window and those near the end are padded. A trajectory shorter than ``horizon`` gives one
    padded window with ``short="pad"`` and none with ``short="drop"``.
    """
    if length < horizon:
        if short == "drop" or length == 0:
            return range(0)
        return range(length if tail == "pad" else 1)
    return range(length if tail == "pad" else length - horizon + 1)


def seen_starts(length: int, frame_steps: np.ndarray, short: Short = "pad", tail: Tail = "drop") -> list[int]:
    """Starts of those windows of a trajectory whose frame exists already, because the policy looked there."""
    starts = window_starts(length, short=short, tail=tail)
    return [int(step) for step in frame_steps if int(step) in starts]


def gather(
    windows: Sequence[Window],
    trajectories: Mapping[int, Trajectory],
    advantages: Mapping[int, float],
    rendered: Mapping[tuple[int, int], np.ndarray] = MappingProxyType({}),
    weights: Mapping[int, float] | None = None,
) -> Batch:
    """Copy the data of ``windows`` into one batch. Padded steps repeat the last action and are marked invalid.

    Args:
        windows: what to gather.
        trajectories: by identifier.
        advantages: by identifier.
        rendered: frames that were made for training, by trajectory and step: uint8[C, H, W, 3].
        weights: processed advantages, by identifier; as they are by default.

    Raises:
        KeyError: when a window's frame was never rendered.
    """
    frames = [_frame(window, trajectories[window.trajectory], rendered) for window in windows]
    states, actions, valid = gather_actions(windows, trajectories)
    return Batch(
        frames=torch.from_numpy(np.stack(frames)),
        states=states,
        actions=actions,
        valid=valid,
        advantages=torch.tensor([advantages[w.trajectory] for w in windows], dtype=torch.float32),
        weights=torch.tensor([(weights or advantages)[w.trajectory] for w in windows], dtype=torch.float32),
        versions=torch.tensor([trajectories[w.trajectory].policy_version for w in windows]),
        instructions=[trajectories[w.trajectory].instruction for w in windows],
        chain=_chain(windows, trajectories),
    )


def gather_actions(
    windows: Sequence[Window], trajectories: Mapping[int, Trajectory]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a batch only the states before the chunks, the chunks, and which of their steps are valid."""
    steps = np.arange(HORIZON)
    states, actions, valid = [], [], []
    for window in windows:
        trajectory = trajectories[window.trajectory]
        source = trajectory.actions if trajectory.labels is None else trajectory.labels
        index = window.start + steps
        states.append(trajectory.states[window.start])
        actions.append(source[np.minimum(index, len(trajectory) - 1)])
        valid.append(index < len(trajectory))
    return torch.from_numpy(np.stack(states)), torch.from_numpy(np.stack(actions)), torch.from_numpy(np.stack(valid))


def _chain(windows: Sequence[Window], trajectories: Mapping[int, Trajectory]) -> ChainStep | None:
    rows = [(trajectories[w.trajectory], _look(trajectories[w.trajectory], w.start)) for w in windows]
    if any(row is None or not trajectory.chain for trajectory, row in rows):
        return None
    return ChainStep(
        **{
            f.name: torch.from_numpy(np.stack([trajectory.chain[f.name][row] for trajectory, row in rows]))
            for f in fields(ChainStep)
        }
    )


def _look(trajectory: Trajectory, step: int) -> int | None:
    """Which of the policy's looks was at this step."""
    row = int(np.searchsorted(trajectory.frame_steps, step))
    return row if row < len(trajectory.frame_steps) and trajectory.frame_steps[row] == step else None


def _frame(window: Window, trajectory: Trajectory, rendered: Mapping[tuple[int, int], np.ndarray]) -> np.ndarray:
    row = _look(trajectory, window.start)
    if row is not None:
        return trajectory.frames[row]
    try:
        return rendered[window.trajectory, window.start]
    except KeyError as error:
        raise KeyError(f"no frame at step {window.start} of trajectory {window.trajectory}") from error


def shuffled_batches(count: int, epochs: int, batch_size: int, seed: Sequence[int], min_steps: int = 1) -> np.ndarray:
    """Rows of ``count`` windows in shuffled passes, cut into full batches: int32[steps, batch_size].

    What does not fill a last batch is left out; fewer windows than one batch are repeated to fill it, and passes are
    added until there are ``min_steps`` batches.
    """
    if count == 0:
        return np.zeros((0, batch_size), dtype=np.int32)
    rng = np.random.default_rng(seed)
    steps = max(min_steps, epochs * count // batch_size)
    passes = [rng.permutation(count) for _ in range(-(-steps * batch_size // count))]
    return np.concatenate(passes)[: steps * batch_size].reshape(steps, batch_size).astype(np.int32)


def batches_with_good(
    good: np.ndarray, share: float, epochs: int, batch_size: int, seed: Sequence[int], min_steps: int = 1
) -> np.ndarray:
    """Rows as `shuffled_batches` gives them, but at least a share of each batch is good: int32[steps, batch_size].

    Where too few rows are good, those are repeated more often than the others; where more are, each batch has as many
    as they are on average. The number of steps does not change.

    Args:
        good: which rows are, bool[N].
        share: of each batch; 0 leaves everything to chance.
        epochs: passes over all rows.
        batch_size: rows in a batch.
        seed: of the order.
        min_steps: at least so many batches.
    """
    order = shuffled_batches(len(good), epochs, batch_size, seed, min_steps)
    if share == 0 or not good.any() or good.all():
        return order
    # Rounding alone leaves no good row out, and no other.
    wanted = max(math.ceil(share * batch_size), min(round(float(good.mean()) * batch_size), batch_size - 1))
    steps = len(order)
    parts = []
    for i, (rows, count) in enumerate(((np.flatnonzero(good), wanted), (np.flatnonzero(~good), batch_size - wanted))):
        if count:
            parts.append(rows[shuffled_batches(len(rows), 0, count, [*seed, i], steps)])
    # Learners take columns, so good ones must not stand in the first.
    return np.random.default_rng([*seed, len(parts)]).permuted(np.concatenate(parts, axis=1), axis=1).astype(np.int32)
