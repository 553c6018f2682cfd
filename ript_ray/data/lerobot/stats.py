"""Statistics that LeRobot datasets carry: of each episode, and of all together as LeRobot combines them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}

Stats = dict[str, np.ndarray]
"""By name, as ``mean``: float64[D], for a camera [3, 1, 1] in [0, 1]; and ``count``, the number of steps: int64[1]."""


def vector_stats(values: np.ndarray) -> Stats:
    """Of the steps of one episode.

    Args:
        values: numbers or truth values, [L, D] or [L].
    """
    rows = values.reshape(len(values), -1).astype(np.float64)
    stats = {"min": rows.min(0), "max": rows.max(0), "mean": rows.mean(0), "std": rows.std(0)}
    quantiles = np.quantile(rows, list(QUANTILES.values()), axis=0)
    return stats | dict(zip(QUANTILES, quantiles, strict=True)) | {"count": np.array([len(rows)])}


def image_stats(frames: np.ndarray) -> Stats:
    """Of all pixels of one camera in one episode, by colour, from the counts of their 256 values.

    Args:
        frames: uint8[L, H, W, 3]
    """
    levels = np.arange(256) / 255.0
    stats: dict[str, list[float]] = {name: [] for name in ("min", "max", "mean", "std", *QUANTILES)}
    for colour in range(3):
        counts = np.sum([np.bincount(frame[..., colour].ravel(), minlength=256) for frame in frames], axis=0)
        seen, share = np.flatnonzero(counts), counts / counts.sum()
        mean = float(share @ levels)
        values = {"min": levels[seen[0]], "max": levels[seen[-1]], "mean": mean}
        values["std"] = np.sqrt(share @ (levels - mean) ** 2)
        values |= {name: levels[np.searchsorted(np.cumsum(share), q)] for name, q in QUANTILES.items()}
        for name, value in values.items():
            stats[name].append(float(value))
    shaped = {name: np.array(values).reshape(3, 1, 1) for name, values in stats.items()}
    return shaped | {"count": np.array([len(frames)])}


def combine(parts: Sequence[Mapping[str, np.ndarray]]) -> Stats:
    """The statistics of several episodes together.

    Quantiles are the episodes' own, averaged with their lengths as weights, as LeRobot does; the others are exact.
    """
    counts = np.array([part["count"][0] for part in parts])
    share = counts / counts.sum()

    def average(name: str) -> np.ndarray:
        return np.asarray(np.tensordot(share, np.stack([part[name] for part in parts]), axes=1))

    mean = average("mean")
    spread = np.stack([part["std"] ** 2 + (part["mean"] - mean) ** 2 for part in parts])
    return {
        "min": np.min([part["min"] for part in parts], axis=0),
        "max": np.max([part["max"] for part in parts], axis=0),
        "mean": mean,
        "std": np.sqrt(np.tensordot(share, spread, axes=1)),
        **{name: average(name) for name in QUANTILES},
        "count": np.array([counts.sum()]),
    }
