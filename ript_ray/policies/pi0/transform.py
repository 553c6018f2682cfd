"""π0's images: any frames, brought to the size of its vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ript_ray.policies.transform import EPS, Normalisation


@dataclass(frozen=True, slots=True, kw_only=True)
class Pi0Transform(Normalisation):
    """π0's and π0.5's: statistics of a checkpoint, frames resized, 32 dimensions for all robots."""

    image_size: int = 224
    """Height and width of what the vision tower sees, in pixels."""

    @property
    def smallest_frame_size(self) -> int:
        return self.image_size

    def encode_images(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8[B, C, H, W, 3] → float32[B, C, 3, image_size, image_size] in [−1, 1]."""
        batch, cameras = frames.shape[:2]
        resized = resize_with_pad(frames.flatten(0, 1).movedim(-1, 1), self.image_size)
        return resized.view(batch, cameras, *resized.shape[1:]).float() / 255.0 * 2.0 - 1.0


def resize_with_pad(images: torch.Tensor, size: int) -> torch.Tensor:
    """Bilinear, smoothed when they shrink; the aspect is kept, with black bars: uint8[N, 3, H, W] → [N, 3, size, size].

    What openpi's ``resize_with_pad`` does with Pillow, which rounds to whole levels, too.
    """
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    ratio = max(height, width) / size
    new = int(height / ratio), int(width / ratio)
    resized = F.interpolate(images.float(), new, mode="bilinear", antialias=True).round().clamp(0, 255).to(torch.uint8)
    above, left = (size - new[0]) // 2, (size - new[1]) // 2
    return F.pad(resized, (left, size - new[1] - left, above, size - new[0] - above))


def z_score(stats: dict[str, list[float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of openpi's statistics."""
    return tuple(stats["mean"]), tuple(stats["std"])


def quantile(stats: dict[str, list[float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation that make of `Normalisation` openpi's (x − q01)/(q99 − q01 + 1e-6)·2 − 1 (π0.5)."""
    halves = [(high - low + EPS) / 2 for low, high in zip(stats["q01"], stats["q99"], strict=True)]
    middles = tuple(low + half for low, half in zip(stats["q01"], halves, strict=True))
    return middles, tuple(half - EPS for half in halves)


def quantiles_of(mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    """The inverse of `quantile`: q01 and q99."""
    low = [m - (s + EPS) for m, s in zip(mean, std, strict=True)]
    return low, [q + 2 * (s + EPS) - EPS for q, s in zip(low, std, strict=True)]
