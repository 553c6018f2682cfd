"""What one learner has and does, in a worker of the group or in the one process that there is. No Ray here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from learner.update import Step, update
from ript_ray.config import Config
from ript_ray.policies.checkpoints import Weights, build_policy

_CPU = torch.device("cpu")


class Learner:
    """The policy in training, what it began as, and what acts.

    Args:
        config: the whole configuration.
        description: of the policy, see `build_policy`.
        start: weights of the starting policy.
        rank: in the group; every learner draws other random numbers.
        device: that the policy is on between updates.
        mesh: of the learners, where they divide the weights among them.
    """

    def __init__(
        self,
        config: Config,
        description: Mapping[str, Any],
        start: Weights,
        rank: int = 0,
        device: torch.device = _CPU,
        mesh: DeviceMesh | None = None,
    ) -> None:
        self._config, self._start, self._rank, self._mesh = config, start, rank, mesh
        self.policy = build_policy(description, start).float().to(device)
        self._anchor = None
        if config.train.anchor > 0:
            self._anchor = build_policy(description, start).float().to(device).requires_grad_(False)
        self.acting = self.policy
        """The policy itself, or the moving average of its weights."""

    def learn(
        self, step: int, steps: Sequence[Step], on_step: Callable[[int, float], None] | None = None
    ) -> dict[str, float]:
        """Update ``step``, from 0; without ``steps`` what acts goes on acting.

        Returns:
            How many ``steps`` there were, and what `update` tells.

        Raises:
            NonFinite: for a NaN or an infinity in losses, gradients or weights.
        """
        if not steps:
            return {"steps": 0.0}
        config = self._config
        if config.train.restart:
            self.policy.load_state_dict(self._start)
        self.acting = self.policy  # lets go of the average of the last update
        # The same random numbers when the update is done again.
        generator = torch.Generator().manual_seed(config.run.seed * 1_000_003 + step * 1009 + self._rank)
        self.acting, diagnostics = update(
            self.policy,
            steps,
            config.train,
            config.objective,
            generator,
            on_step,
            self._anchor,
            self._mesh,
            averaging=config.train.averages(step),
        )
        return {"steps": float(len(steps))} | diagnostics
