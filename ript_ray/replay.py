"""Playing a recorded episode again, step by step, and saying where it first goes another way."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ript_ray.data.storage import load_episode, simulator_versions
from ript_ray.envs import make

_SIZE = 256
_FILM_EVERY = 2


@dataclass(frozen=True, slots=True)
class Replay:
    """How a replay went."""

    env_id: str
    init_state: int | None
    seed: int
    steps: int
    """Steps that were recorded."""
    first_difference: int | None
    """Number of steps after which the simulator's state was first another (0: the start); None when it never was."""
    success: bool
    recorded_success: bool
    other_versions: dict[str, tuple[str, str]]
    """Packages whose version is not the recorded one: name → (recorded, here)."""

    @property
    def identical(self) -> bool:
        """Did every state and the outcome agree?"""
        return self.first_difference is None and self.success == self.recorded_success

    def describe(self) -> str:
        """Lines for people."""
        head = f"{self.env_id}, initial state {self.init_state}, seed {self.seed}, {self.steps} steps: "
        if self.identical:
            return head + f"identical at every step, {'success' if self.success else 'failure'} as recorded"
        where = "the start" if self.first_difference == 0 else f"step {self.first_difference}"
        lines = [head + (f"states differ from {where} on" if self.first_difference is not None else "states agree")]
        lines.append(f"  recorded as {_outcome(self.recorded_success)}, now {_outcome(self.success)}")
        for name, (recorded, here) in self.other_versions.items():
            lines.append(f"  {name} was {recorded}, is {here}")
        if not self.other_versions:
            lines.append("  versions are the recorded ones; another kind of processor can differ in last bits")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"identical": self.identical}


def replay_episode(file: Path) -> tuple[Replay, np.ndarray]:
    """Play the episode of a file again.

    Returns:
        The comparison, and the upright view of the first camera at every other step: uint8[n, 256, 256, 3].

    Raises:
        UserError: when the file is not a recorded episode.
    """
    record, recorded_versions = load_episode(file)
    context = record.context
    env = make(context.env_id, image_size=record.image_size, max_steps=record.max_steps)
    observation, _ = env.reset(**context.reset_arguments())
    tickets = [observation.ticket]
    hashes = [env.state_hash()]
    success = over = False
    for action in record.actions:
        if over:
            break
        observation, _, success, truncated, _ = env.step(action)
        over = success or truncated
        tickets.append(observation.ticket)
        hashes.append(env.state_hash())
    differs = [int(here) != int(there) for here, there in zip(hashes, record.state_hashes, strict=False)]
    first = differs.index(True) if True in differs else None
    if first is None and len(hashes) < len(record.state_hashes):
        first = len(hashes)
    frames = np.stack([env.render_ticket(t, env.cameras[0], _SIZE) for t in tickets[::_FILM_EVERY]])
    here = simulator_versions()
    other = {n: (v, here[n]) for n, v in recorded_versions.items() if here.get(n, v) != v}
    mirrored = env.frames_are_mirrored
    env.close()
    result = Replay(
        env_id=context.env_id,
        init_state=context.init_state,
        seed=context.seed,
        steps=len(record.actions),
        first_difference=first,
        success=success,
        recorded_success=record.success,
        other_versions=other,
    )
    return result, frames[:, :, ::-1] if mirrored else frames


def _outcome(success: bool) -> str:
    return "a success" if success else "a failure"
