"""Where two policies part: the same observation through both, stage by stage.

`note` marks the stages in the code that acts, so what is compared is what is done. Another system takes part through a
file: a safetensors of the same stages (`save_stages`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ript_ray.config import DataConfig, resolve
from ript_ray.data.demonstrations import read_demonstrations
from ript_ray.errors import UserError
from ript_ray.policies.policy import Policy
from ript_ray.policies.stages import recording

Stages = dict[str, np.ndarray]

METRES = 0.05
"""What LIBERO's controller makes of an action of 1 in x, y or z (OSC_POSE, ``output_max``)."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two policies are apart at one stage."""

    stage: str
    largest: float
    """Largest absolute difference; infinite where the shapes differ, NaN where one has NaN."""
    mean: float
    """Mean absolute difference."""
    deviation: float
    """Standard deviation of the first policy's values, to compare with; 0 for whole numbers, of which none may differ.
    """


@dataclass(frozen=True, slots=True)
class Comparison:
    """All stages that both have, in the order in which they are computed."""

    differences: list[Difference]
    alone: list[str]
    """Stages that only one of them has."""
    tolerance: float
    """Differences of so many standard deviations are rounding."""

    @property
    def first(self) -> Difference | None:
        """The first stage that differs by more than rounding, or by something that is no number."""
        # Not "larger than": NaN is not larger than anything.
        return next((d for d in self.differences if not d.largest <= self.tolerance * max(d.deviation, 1e-3)), None)

    def describe(self) -> str:
        """A table, and a sentence on where they part."""
        lines = [f"{'stage':<16}{'largest':>12}{'mean':>12}{'of deviation':>14}"]
        for d in self.differences:
            share = d.mean / d.deviation if d.deviation != 0 else 0.0
            lines.append(f"{d.stage:<16}{d.largest:>12.3g}{d.mean:>12.3g}{share:>13.1%}")
        if self.alone:
            lines.append(f"only one of them has {', '.join(map(repr, self.alone))}")
        final = next((d for d in self.differences if d.stage == "position cm"), None)
        end = (
            ""
            if final is None
            else f"; positions differ by {final.mean:.3g} cm on average, at most {final.largest:.3g}"
        )
        if self.first is None:
            return "\n".join([*lines, f"no stage differs by more than {self.tolerance:g} deviations{end}"])
        return "\n".join([*lines, f"the first stage that differs is {self.first.stage!r}{end}"])

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        first = self.first
        stages = [asdict(d) for d in self.differences]
        return {"first": first.stage if first else None, "stages": stages, "alone": self.alone}


def stages_of(
    policy: Policy,
    frames: torch.Tensor,
    states: torch.Tensor,
    instructions: list[str],
    noise: torch.Tensor | None = None,
    guidance: float = 1.0,
    steps: int = 10,
) -> Stages:
    """What a policy computes on its way to a chunk.

    Args:
        policy: any.
        frames: uint8[B, C, H, W, 3].
        states: float32[B, S].
        instructions: one per row.
        noise: where the integration starts, float32[B, T, D]; drawn with seed 0 if None.
        guidance: scale.
        steps: Euler steps.
    """
    if noise is None:
        shape = (len(frames), policy.horizon, policy.action_dim)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with recording() as stages:
        chunk, _ = policy.act(frames, states, instructions, noise, guidance, steps)
    arrays = {name: np.asarray((v.float() if v.is_floating_point() else v).cpu()) for name, v in stages.items()}
    return arrays | {"action": chunk.numpy(), "position cm": 100 * METRES * chunk[..., :3].numpy()}


def observations(
    data: DataConfig, frame_size: int | None, image_size: int, state_dim: int, count: int = 4
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Frames, states and instructions to compare on.

    Args:
        data: names demonstrations, whose first looks are taken; noise if there are none.
        frame_size: that the policies take, in pixels; None: any, so that a dataset's frames stay as they are.
        image_size: of noise for policies that take any.
        state_dim: of noise.
        count: how many.
    """
    demos = resolve(data.demos)
    if not demos.exists():
        rng, size = np.random.default_rng(0), frame_size or image_size
        frames = rng.integers(0, 256, (count, 2, size, size, 3), dtype=np.uint8)
        states = rng.normal(size=(count, state_dim)).astype(np.float32)
        return torch.from_numpy(frames), torch.from_numpy(states), ["pick up the bowl"] * count
    looks = [
        (demo.frames[i], demo.states[step], demo.instruction)
        for demo in itertools.islice(read_demonstrations(demos, "libero_object/0", data, image_size=frame_size), count)
        for i, step in enumerate(demo.frame_steps[:count])
    ][:count]
    seen, felt, said = zip(*looks, strict=True)
    return torch.from_numpy(np.stack(seen)), torch.from_numpy(np.stack(felt)), list(said)


def compare(a: Stages, b: Stages, tolerance: float = 1e-3, order: Iterable[str] | None = None) -> Comparison:
    """The differences at all stages that both have.

    Args:
        a: of the one.
        b: of the other.
        tolerance: see `Comparison`.
        order: in which stages are computed; that of ``a`` by default.

    Raises:
        UserError: when they have none in common.
    """
    shared = [stage for stage in order or a if stage in a and stage in b]
    if not shared:
        raise UserError(f"no stage is in both: one has {', '.join(a)}, the other {', '.join(b)}")
    differences = [_difference(stage, a[stage], b[stage]) for stage in shared]
    return Comparison(differences, [stage for stage in {**a, **b} if stage not in shared], tolerance)


def save_stages(path: Path, stages: Mapping[str, np.ndarray]) -> None:
    """Write stages for `load_stages`; their order is kept in their names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"{i:03d} {name}": np.ascontiguousarray(value) for i, (name, value) in enumerate(stages.items())}, path)


def load_stages(path: Path) -> Stages:
    """Read stages.

    Raises:
        UserError: when the file is no such file.
    """
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); expected stages as 'compare A FILE' writes") from error
    return {name.split(" ", 1)[-1] if name[:3].isdigit() else name: found[name] for name in sorted(found)}


def _difference(stage: str, a: np.ndarray, b: np.ndarray) -> Difference:
    if a.shape != b.shape:
        return Difference(stage, float("inf"), float("inf"), float(np.std(a)))
    apart = np.abs(a.astype(np.float64) - b.astype(np.float64))
    whole = np.issubdtype(a.dtype, np.integer) or np.issubdtype(b.dtype, np.integer)
    return Difference(stage, float(apart.max(initial=0.0)), float(apart.mean()), 0.0 if whole else float(np.std(a)))
