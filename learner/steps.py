"""From a shard to the optimiser steps of an update, and the random numbers of each. No Ray here."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

import numpy as np
import torch

from learner.update import Step
from ript_ray.data.windows import gather
from ript_ray.types import Batch, Shard, Trajectory, Window


def plan_steps(
    shard: Shard,
    trajectories: Mapping[int, Trajectory],
    micro_batch: int,
    rendered: Mapping[tuple[int, int], np.ndarray] = MappingProxyType({}),
) -> list[Step]:
    """The optimiser steps of a shard; each micro-batch is gathered when its turn comes."""

    def load(rows: np.ndarray) -> Batch:
        windows = [Window(int(i), int(start)) for i, start in shard.windows[rows]]
        return gather(windows, trajectories, shard.advantages, rendered, shard.weights)

    return [
        Step(
            [partial(load, rows[i : i + micro_batch]) for i in range(0, len(rows), micro_batch)],
            len(rows),
            shard.batch_size,
        )
        for rows in shard.order
    ]


def update_generator(seed: int, step: int, rank: int) -> torch.Generator:
    """The random numbers of a learner in an update: the same when the update is done again."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step * 1009 + rank)
