"""One episode, look by look: what the policy saw, what it thought and what it did, as images and as numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ript_ray.data.storage import load_episode
from ript_ray.envs import make
from ript_ray.policies.acting import Acting
from ript_ray.policies.compare import Stages, save_stages
from ript_ray.policies.policy import Policy
from ript_ray.policies.stages import recording
from ript_ray.reporting import write_json
from ript_ray.rollout import play
from ript_ray.types import Trajectory

_FIRST_STAGE = "frames"
_EULER = ("noisy chunk", "time", "velocity")
_ROUNDING = 1e-3
"""Of actions in [−1, 1]. Sums are rounded by where numbers lie in memory; contacts then make much of it."""
_PLOTTED = 7
"""Action dimensions, at most: an arm's."""


@dataclass(frozen=True, slots=True)
class Dissection:
    """One episode that was played again, with all stages of each look."""

    trajectory: Trajectory
    looks: list[Stages]
    """Stages in the order in which they were computed, as `ript_ray.policies.stages.note` names them."""
    mirrored: bool
    """Are frames mirrored left to right, as LIBERO's are?"""
    first_difference: int | None
    """First step whose action is not the recorded one, rounding aside; None when all are."""

    def estimates(self, look: int) -> np.ndarray:
        """The chunk that the policy expected at each Euler step, x_t − t·v, in its own units: float32[steps, T, D]."""
        named = {base: [v for k, v in self.looks[look].items() if _base(k) == base] for base in _EULER}
        x, t, v = (np.concatenate(named[base]) for base in _EULER)
        return x - t[:, None, None] * v

    def describe(self) -> str:
        """A line for people."""
        outcome = "a success" if self.trajectory.success else "a failure"
        head = f"{len(self.looks)} looks, {len(self.trajectory)} steps, {outcome}: "
        if self.first_difference is None:
            return head + "all actions as recorded"
        if self.first_difference > 0:
            return (
                head + f"actions as recorded until step {self.first_difference}, where rounding had become a difference"
            )
        return head + (
            "another first action than the recorded one; it was another policy (policy.checkpoint), or "
            "policy.guidance, denoise_steps, execute, explore or action_noise were others, or it acted on a GPU or "
            "with less policy.precision"
        )


def dissect(file: Path, policy: Policy, acting: Acting) -> Dissection:
    """Play a recorded episode's context again with a policy, and keep all that it computes.

    Args:
        file: of the recorded episode.
        policy: that acts; the one that was recorded, if its actions are to be explained.
        acting: how it acts.

    Raises:
        UserError: when the file is not a recorded episode.
    """
    record, _ = load_episode(file)
    env = make(record.context.env_id, image_size=record.image_size, max_steps=record.max_steps)
    with recording() as stages:
        trajectory = play(env, policy, record.context, acting, policy_version=record.policy_version)
    mirrored = env.frames_are_mirrored
    env.close()
    looks: list[Stages] = []
    for name, value in stages.items():
        if _base(name) == _FIRST_STAGE:
            looks.append({})
        times = sum(_base(known) == _base(name) for known in looks[-1])
        looks[-1][f"{_base(name)} {times}" if times else _base(name)] = value.float().cpu().numpy()
    return Dissection(trajectory, looks, mirrored, _first_difference(trajectory.actions, record.actions))


def write_dissection(folder: Path, dissection: Dissection) -> None:
    """Leave a folder with ``look_000.png``, ``look_000.safetensors`` and so on, and ``looks.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    trajectory = dissection.trajectory
    ends = [*trajectory.frame_steps[1:].tolist(), len(trajectory)]
    rows: list[dict[str, Any]] = []
    for i, (first, end) in enumerate(zip(trajectory.frame_steps.tolist(), ends, strict=True)):
        save_stages(folder / f"look_{i:03d}.safetensors", dissection.looks[i])
        _draw(folder / f"look_{i:03d}.png", dissection, i, first, end)
        rows.append(
            {
                "step": first,
                "state": trajectory.states[first].tolist(),
                "executed": trajectory.actions[first:end].tolist(),
                "stages": {name: list(value.shape) for name, value in dissection.looks[i].items()},
            }
        )
    about = {"instruction": trajectory.instruction, "success": trajectory.success, "looks": rows}
    write_json(folder / "looks.json", about)


def _draw(file: Path, dissection: Dissection, look: int, first: int, end: int) -> None:
    """What each camera saw, and below it, by action, the chunk as it took shape and what was done of it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    frames = dissection.trajectory.frames[look]
    estimates = dissection.estimates(look)
    done = dissection.trajectory.actions[first:end]
    curves = min(done.shape[1], _PLOTTED)
    figure = plt.figure(figsize=(9, 3.4 + 0.9 * curves), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(3, 0.9 * curves))
    above.suptitle(f"step {first}: {dissection.trajectory.instruction}")
    for axes, frame in zip(np.atleast_1d(above.subplots(1, len(frames))), frames, strict=True):
        axes.imshow(frame[:, ::-1] if dissection.mirrored else frame)
        axes.axis("off")
    grid = below.subplots(curves, 2, sharex="col", squeeze=False)
    grid[0, 0].set_title("expected chunk, from the first Euler step (pale) to the last", fontsize=9)
    grid[0, 1].set_title("executed", fontsize=9)
    for i, (thought, acted) in enumerate(grid):
        for k, estimate in enumerate(estimates):
            thought.plot(estimate[:, i], color="tab:blue", alpha=(k + 1) / len(estimates), linewidth=1)
        thought.axvspan(0, end - first - 1, color="tab:orange", alpha=0.15)
        thought.set_ylabel(f"a{i}", rotation=0)
        acted.plot(range(first, end), done[:, i], "o-", color="tab:orange", markersize=2)
        acted.set_ylim(-1.1, 1.1)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def _base(stage: str) -> str:
    return stage.rstrip("0123456789 ")


def _first_difference(actions: np.ndarray, recorded: np.ndarray) -> int | None:
    for step, (here, there) in enumerate(zip(actions, recorded, strict=False)):
        if not np.allclose(here, there, rtol=0.0, atol=_ROUNDING):
            return step
    return None if len(actions) == len(recorded) else min(len(actions), len(recorded))
