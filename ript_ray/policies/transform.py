"""The one transform between environments and policies: images, state, actions, instruction.

Rollout, training and evaluation use the same object, saved with the weights, so `decode(encode(actions)) == actions`
holds wherever a policy is used.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ript_ray.errors import UserError

_EPS = 1e-6
"""Added to deviations, as openpi does."""
_SMALLEST_STD = 0.01
"""A dimension that hardly moves would be blown up by its tiny deviation."""
_SMALLEST_ARM_STD = (0.01, 0.01, 0.01, 0.1, 0.1, 0.1, 0.01, 0.01)
"""Of an arm's state: metres for position and fingers, radians for the axis-angle. A tabletop task hardly turns the
hand: its angles are noise of a hundredth of a radian, which would otherwise be blown up to the size of everything else,
and outliers to 16 deviations."""


@dataclass(frozen=True, slots=True)
class Transform:
    """Normalisation by mean and deviation (z-score); actions may be made relative to the state first.

    With D the action dimension: a' = ((a − mask·s[:D]) − mean) / (std + 1e-6).
    """

    state_mean: tuple[float, ...]
    state_std: tuple[float, ...]
    action_mean: tuple[float, ...]
    action_std: tuple[float, ...]
    relative: tuple[bool, ...]
    """Per action dimension: is the action expressed relative to the same dimension of the state?
    LIBERO's actions are changes already, so False there."""
    image_size: int
    """Height and width, in pixels, of the frames that the policy was trained on."""
    vocabulary: int = 512
    """Buckets that the words of an instruction are hashed into."""

    @classmethod
    def fit(
        cls, states: np.ndarray, actions: np.ndarray, image_size: int, relative: tuple[bool, ...] | None = None
    ) -> Transform:
        """Statistics of demonstrations.

        Args:
            states: float[N, S].
            actions: float[N, A], the action at the same step as each state.
            image_size: of the frames that belong to them.
            relative: per action dimension, see the class; nowhere by default.
        """
        relative = (False,) * actions.shape[1] if relative is None else relative
        mask = np.array(relative, dtype=actions.dtype)
        shifted = actions - mask * states[:, : actions.shape[1]]
        floor = _SMALLEST_ARM_STD if states.shape[1] == len(_SMALLEST_ARM_STD) else _SMALLEST_STD
        return cls(
            state_mean=_floats(states.mean(0)),
            state_std=_floats(states.std(0).clip(floor)),
            action_mean=_floats(shifted.mean(0)),
            action_std=_floats(shifted.std(0).clip(_SMALLEST_STD)),
            relative=relative,
            image_size=image_size,
        )

    def encode_images(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8[B, C, H, W, 3] → float32[B, C, 3, H, W] in [−1, 1].

        Raises:
            UserError: when the frames have another size than the policy was trained on.
        """
        if frames.shape[-3:-1] != (self.image_size, self.image_size):
            raise UserError(
                f"env.image_size={frames.shape[-3]}: this policy was trained on {self.image_size}×{self.image_size} "
                f"pixels; set env.image_size={self.image_size}"
            )
        return frames.movedim(-1, -3).float() / 127.5 - 1.0

    def encode_state(self, state: torch.Tensor) -> torch.Tensor:
        """float32[B, S] in SI units → normalised."""
        return (state - state.new_tensor(self.state_mean)) / (state.new_tensor(self.state_std) + _EPS)

    def encode_actions(self, actions: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """float32[B, T, D] in the environment's units → normalised; ``state`` float32[B, S] is the chunk's first."""
        return (actions - self._base(actions, state) - actions.new_tensor(self.action_mean)) / self._scale(actions)

    def decode_actions(self, encoded: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """The exact inverse of `encode_actions`."""
        return encoded * self._scale(encoded) + encoded.new_tensor(self.action_mean) + self._base(encoded, state)

    def encode_instructions(self, instructions: list[str]) -> torch.Tensor:
        """Words hashed to buckets, padded with −1: int64[B, longest]."""
        rows = [[_bucket(word, self.vocabulary) for word in text.lower().split()] for text in instructions]
        longest = max(map(len, rows))
        return torch.tensor([row + [-1] * (longest - len(row)) for row in rows])

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Transform:
        """The inverse of `to_json`."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)

    def _scale(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_tensor(self.action_std) + _EPS

    def _base(self, actions: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        mask = actions.new_tensor(self.relative)
        return (mask * state[:, : len(self.relative)].to(actions)).unsqueeze(1)


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _bucket(word: str, buckets: int) -> int:
    return int.from_bytes(hashlib.blake2s(word.encode(), digest_size=4).digest(), "little") % buckets
