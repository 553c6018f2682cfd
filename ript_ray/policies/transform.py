"""The one transform between environments and policies: images, state, actions, instruction.

Rollout, training and evaluation use the same object, saved with the weights, so `decode(encode(actions)) == actions`
holds wherever a policy is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import torch
from torch.nn import functional as F

from ript_ray.errors import UserError

EPS = 1e-6
"""Added to deviations, as openpi does."""
_SMALLEST_STD = 0.01
"""A dimension that hardly moves would be blown up by its tiny deviation."""
_SMALLEST_ARM_STD = (0.01, 0.01, 0.01, 0.1, 0.1, 0.1, 0.01, 0.01)
"""Of an arm's state: metres for position and fingers, radians for the axis-angle. A tabletop task hardly turns the
hand: its angles are noise of a hundredth of a radian, which would otherwise be blown up to the size of everything else,
and outliers to 16 deviations."""

_REACH = 1.5
"""Means of actions in [−1, 1] are no larger than 1; statistics may be rounded, or of a robot a little larger."""


def check_relative(key: str, count: int, actions: int, states: int) -> None:
    """Can the first ``count`` action dimensions be taken relative to the state, as the setting ``key`` says?

    Raises:
        UserError: when there are not so many.
    """
    if count > min(actions, states):
        raise UserError(
            f"{key}={count}: there are {actions} action and {states} state dimensions; expected no more than either"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalisation:
    """Numbers between an environment and a network; actions may be made relative to the state first.

    With A the environment's action dimension: a' = ((a − mask·s[:A]) − mean) / (std + 1e-6); a shorter state gets zeros
    behind. A network of more dimensions, one for many robots, gets zeros behind, too.

    Raises:
        UserError: when an action dimension is relative to one that the state does not have.
    """

    state_mean: tuple[float, ...]
    state_std: tuple[float, ...]
    action_mean: tuple[float, ...]
    action_std: tuple[float, ...]
    relative: tuple[bool, ...]
    """Per action dimension: is the action expressed relative to the same dimension of the state?
    LIBERO's actions are changes already, so False there."""
    state_width: int = 0
    """Dimensions of the network's state, if they are more."""
    action_width: int = 0
    """Dimensions of the network's actions, if they are more."""

    def __post_init__(self) -> None:
        size = len(self.state_mean)
        if any(self.relative[size:]):
            raise UserError(
                f"relative={list(self.relative)}: the state has {size} dimensions; expected relative actions only in "
                f"these: lower sft.relative or convert.relative to {size}, or less"
            )

    @property
    def frame_size(self) -> int | None:
        """Height and width of the frames that it takes, in pixels; None: of any, it resizes them."""
        return None

    @property
    def smallest_frame_size(self) -> int:
        """Frames of fewer pixels would be enlarged, and blurred."""
        return self.frame_size or 1

    def check_frame_size(self, what: str, size: int) -> None:
        """Are frames of ``size`` pixels, for the policy that ``what`` names, large enough?

        Raises:
            UserError: when it would see them blurred.
        """
        least = self.smallest_frame_size
        if size < least:
            raise UserError(
                f"{what} looks at {least}×{least} pixels and would see frames of {size} blurred; make them larger: "
                f"env.image_size={least} or more (LIBERO's is 256), for demonstrations as well"
            )

    def check_sizes(self, what: str, states: int, actions: int) -> None:
        """Are the states and actions of ``what`` as many numbers as those of the statistics?

        Raises:
            UserError: when they are not.
        """
        for kind, found, expected in (("state", states, self.state_mean), ("action", actions, self.action_mean)):
            if found != len(expected):
                raise UserError(
                    f"{what} has {found} {kind} dimensions, the policy was made for {len(expected)}; expected as "
                    "many: choose another policy, make one from demonstrations of these ('python launch.py sft'), or "
                    "convert its checkpoint with statistics of these ('python launch.py stats', convert.stats)"
                )

    def check_reach(self, what: str) -> None:
        """Are the actions about as large as worlds take them, in [−1, 1]?

        Raises:
            UserError: when they lie far outside, so that all would be clipped to the same.
        """
        states = np.pad(self.state_mean, (0, max(0, len(self.action_mean) - len(self.state_mean))))
        centres = np.array(self.action_mean) + np.array(self.relative) * states[: len(self.action_mean)]
        if (furthest := np.abs(centres).max()) > _REACH:
            raise UserError(
                f"{what} takes actions in [−1, 1], and those that the policy was made from are around {furthest:.3g}: "
                "in degrees, or another number of them than convert.relative or sft.relative says is relative to the "
                "state (openpi's pi0_libero: convert.relative=6); expected actions of [−1, 1]"
            )

    def encode_state(self, state: torch.Tensor) -> torch.Tensor:
        """float32[B, S] in SI units → normalised, float32[B, max(S, state_width)]."""
        encoded = (state - state.new_tensor(self.state_mean)) / (state.new_tensor(self.state_std) + EPS)
        return _widen(encoded, self.state_width)

    def encode_actions(self, actions: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """float32[B, T, A] in the environment's units → normalised, float32[B, T, max(A, action_width)].

        ``state`` float32[B, S] is the one before the chunk.
        """
        shifted = actions - self._base(actions, state)
        return _widen((shifted - actions.new_tensor(self.action_mean)) / self._scale(actions), self.action_width)

    def decode_actions(self, encoded: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """The exact inverse of `encode_actions`."""
        encoded = encoded[..., : len(self.action_mean)]
        return encoded * self._scale(encoded) + encoded.new_tensor(self.action_mean) + self._base(encoded, state)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)

    def _scale(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_tensor(self.action_std) + EPS

    def _base(self, actions: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        mask = actions.new_tensor(self.relative)
        return (mask * _widen(state[:, : len(mask)].to(actions), len(mask))).unsqueeze(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transform(Normalisation):
    """The small policy's: mean and deviation of its demonstrations, frames as they come, words as hashes."""

    image_size: int
    """Height and width, in pixels, of the frames that the policy was trained on."""
    vocabulary: int = 512
    """Buckets that the words of an instruction are hashed into."""

    @property
    def frame_size(self) -> int | None:
        return self.image_size

    @classmethod
    def fit(
        cls,
        states: np.ndarray,
        actions: np.ndarray,
        image_size: int,
        relative: tuple[bool, ...] | None = None,
        bases: np.ndarray | None = None,
    ) -> Transform:
        """Statistics of demonstrations.

        Args:
            states: float[N, S].
            actions: float[M, A].
            image_size: of the frames that belong to them.
            relative: per action dimension, see the class; nowhere by default.
            bases: the state that each action is relative to, that before its chunk: float[M, S]; ``states`` by default.

        Raises:
            UserError: when an action dimension is relative to one that the state does not have.
        """
        relative = (False,) * actions.shape[1] if relative is None else relative
        mask = np.array(relative, dtype=actions.dtype)
        size = actions.shape[1]
        bases = states if bases is None else bases
        shifted = actions - mask * np.pad(bases, ((0, 0), (0, max(0, size - bases.shape[1]))))[:, :size]
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

    def encode_instructions(self, instructions: list[str]) -> torch.Tensor:
        """Words hashed to buckets, padded with −1: int64[B, longest]."""
        rows = [[_bucket(word, self.vocabulary) for word in text.lower().split()] for text in instructions]
        longest = max(1, *map(len, rows))  # an instruction may be empty
        return torch.tensor([row + [-1] * (longest - len(row)) for row in rows])


def _widen(values: torch.Tensor, width: int) -> torch.Tensor:
    """Zeros behind, up to ``width`` dimensions."""
    return F.pad(values, (0, max(0, width - values.shape[-1])))


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _bucket(word: str, buckets: int) -> int:
    return int.from_bytes(hashlib.blake2s(word.encode(), digest_size=4).digest(), "little") % buckets
