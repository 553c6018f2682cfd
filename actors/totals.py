"""Sums over a whole run, for its summary."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ript_ray.types import EpisodeReport


@dataclass(slots=True)
class Totals:
    """What was played, rendered, waited for and survived."""

    errors: list[str]
    episodes: int = 0
    env_steps: int = 0
    surplus: int = 0
    """Played, but of groups that were no longer wanted."""
    frames: int = 0
    """Rendered because a policy looked."""
    eager_frames: int = 0
    """That rendering every step would have taken."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("physics", "render", "inference"), 0.0))
    weights_wait_s: float = 0.0
    """That episodes waited for weights, all together."""
    longest_weights_wait_s: float = 0.0
    rollout_s: float = 0.0
    ended_by: Counter[str] = field(default_factory=Counter)
    """How often each quota or budget ended the rollouts of an update."""

    def note(self, report: EpisodeReport) -> None:
        """Add an episode."""
        self.episodes += 1
        self.frames += report.frames
        self.eager_frames += report.eager_frames
        self.env_steps += report.length
        self.weights_wait_s += report.weights_wait_s
        self.longest_weights_wait_s = max(self.longest_weights_wait_s, report.weights_wait_s)
        for name, value in report.seconds.items():
            self.seconds[name] += value

    def copy(self) -> Totals:
        """As they are now."""
        return copy.deepcopy(self)

    def since(self, before: Totals) -> dict[str, float]:
        """Seconds of all actors' work, and the mean wait for weights, for a row of metrics."""
        episodes = self.episodes - before.episodes
        waited = (self.weights_wait_s - before.weights_wait_s) / max(1, episodes)
        worked = {f"rollout/{part}_s": seconds - before.seconds[part] for part, seconds in self.seconds.items()}
        return worked | {"rollout/weights_wait_s": waited}

    def summary(self) -> dict[str, Any]:
        """As ``summary.json`` has them."""
        return {
            "episodes": self.episodes,
            "env_steps": self.env_steps,
            "surplus": self.surplus,
            "errors": self.errors,
            "collections_ended_by": dict(self.ended_by),
            "frames": {"looked": self.frames, "eager": self.eager_frames},
            "seconds": {"rollout": self.rollout_s} | self.seconds,
            "weights_wait_s": {
                "mean": self.weights_wait_s / max(1, self.episodes),
                "max": self.longest_weights_wait_s,
            },
        }
