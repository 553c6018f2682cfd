"""From a shard to the optimiser steps of an update. No Ray here."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

import numpy as np

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
