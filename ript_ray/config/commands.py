"""Settings of single commands other than ``train`` and ``eval``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from ript_ray.config.section import Section


class DemosConfig(Section):
    """The scripted demonstrator."""

    episodes: int = Field(default=80, ge=1)
    """How many demonstrations to make."""
    noise: float = Field(default=0.1, ge=0.0)
    """Deviation of the noise added to the executed x, y, z actions; the label stays the clean action."""
    clumsy: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of demonstrations by a clumsy demonstrator, who grasps beside the object."""
    grasp_error: float = Field(default=0.05, ge=0.0)
    """How far beside the object a clumsy demonstrator grasps, in m; the direction is random."""
    frame_every: int = Field(default=5, ge=1)
    """Render every so many steps."""


class SftConfig(Section):
    """Supervised training on demonstrations."""

    steps: int = Field(default=1500, ge=1)
    """Optimiser steps."""
    init: str | None = None
    """Folder of a policy to continue from; a new one by default."""
    policy: str = "flow"
    """Architecture of a new one; or ``module:class``, one of yours (docs/extending.md)."""
    own: dict[str, Any] = Field(default={})
    """Further arguments for a new one by ``module:class``."""
    relative: int = Field(default=0, ge=0)
    """Number of leading action dimensions of a new one that are relative to the state: of an SO100 arm, whose actions
    are joint angles, 6, or 5 if its gripper stays absolute. LIBERO's actions are changes already."""
    output: str = "checkpoints/imitation"
    """Where to write the trained policy."""

    @field_validator("policy")
    @classmethod
    def _known(cls, name: str) -> str:
        if name != "flow" and not all(name.partition(":")):
            raise ValueError("expected flow or module:class")
        return name


class ConvertConfig(Section):
    """What a checkpoint does not say of itself, for ``convert``."""

    to: Literal["own", "openpi"] = "own"
    """Write this project's layout, or that of openpi's PyTorch code."""
    tokenizer: str | None = None
    """``tokenizer.model`` (PaliGemma's, as openpi uses it) or ``tokenizer.json``; in the source's folder by default."""
    stats: str | None = None
    """``norm_stats.json`` to use instead of the source's."""
    asset: str | None = None
    """Which of several statistics in a checkpoint; and openpi's name of those that are written."""
    normalise: Literal["z_score", "quantile"] | None = None
    """By mean and deviation (π0) or by quantiles (π0.5); by default as a LeRobot checkpoint says, or as is usual."""
    relative: int = Field(default=0, ge=0)
    """Number of leading action dimensions that are relative to the state: 6 for openpi's ``pi0_libero``."""
    horizon: int | None = Field(default=None, ge=1, le=50)
    """Actions in a chunk, where ``config.json`` does not say: 50 for π0, 10 for ``pi05_libero``."""
    state_in_prompt: bool | None = None
    """π0.5: is the state written into the prompt? Yes by default; not so for ``pi05_libero``."""
    prompt_states: int | None = Field(default=None, ge=1, le=32)
    """π0.5: so many numbers of the state are in the prompt: the robot's own by default, as openpi writes them; 32 where
    LeRobot trained it with the state padded before it was written (versions from 2025-09 on; see its
    ``processor_pi05.py``)."""
    condition: Literal["none", "embedding", "text"] = "embedding"
    """How the policy will be told "good" or not in reinforcement learning: a learnt embedding, words, or not at all."""


class PlanConfig(Section):
    """What ``plan`` takes as given instead of measuring it."""

    cpus: float | None = Field(default=None, gt=0.0)
    """CPUs of the machine; this one's by default."""
    memory_gb: float | None = Field(default=None, gt=0.0)
    """Its free memory; this one's by default."""
    gpus: int | None = Field(default=None, ge=0)
    """Its GPUs; this one's by default."""
    gpu_gb: float | None = Field(default=None, gt=0.0)
    """Memory of each of them; that of the first one here by default."""
    actor_gb: float | None = Field(default=None, gt=0.0)
    """Memory of one rollout actor; measured by default."""
    actor_gpu_gb: float | None = Field(default=None, gt=0.0)
    """GPU memory of one rollout actor; its weights and a gigabyte by default."""
    learner_gpu_gb: float | None = Field(default=None, gt=0.0)
    """GPU memory of one learner; computed from the policy and the settings of the update by default."""


class TuneConfig(Section):
    """A search over settings, for ``tune``."""

    search: dict[str, Any] = Field(default={})
    """What is searched, by key: a list of choices, or {low, high} of a range, with log: true on a logarithmic scale."""
    trials: int = Field(default=8, ge=1)
    """Training jobs, where there is a range; lists alone are a grid, of which every combination is tried once."""
    parallel: int = Field(default=1, ge=1)
    """How many of them at a time."""


class BenchConfig(Section):
    """What the benchmarks compare, disturb, watch and measure."""

    objectives: tuple[str, ...] = ()
    """Names in ``benchmarks/objectives.py``, all by default; and ``module:function``, yours."""
    seeds: int = Field(default=3, ge=1)
    """Runs of each, with seeds from ``run.seed`` on."""
    rounds: int = Field(default=1, ge=1)
    """Rollouts and updates in each run."""
    injections: int = Field(default=100, ge=1)
    """Faults that ``bench faults`` injects."""
    job_timeout_s: float = Field(default=7200.0, gt=0.0)
    """Longest time of a job in ``bench async``, ``bench faults`` and ``bench soak``."""
    soak_updates: int = Field(default=240, ge=1)
    """Updates of the job that ``bench soak`` watches; the default job would make so many in a day."""
    simulated: int = Field(default=1000, ge=1)
    """Rollout actors that ``bench control`` simulates."""
    sizes: tuple[int, ...] = (1, 10, 100, 1000)
    """Numbers of simulated rollout actors that ``bench scaling`` runs, from few to many, three at least."""
    preset: Literal["pi0", "pi05", "pi0_tiny", "pi05_tiny"] = "pi0_tiny"
    """Sizes of the policy that ``bench policy`` measures."""
    compiled: bool = False
    """Let ``torch.compile`` fuse the Euler step in ``bench policy``."""

    @field_validator("sizes")
    @classmethod
    def _enough(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(sizes)) < 3 or min(sizes) < 1:
            raise ValueError(
                "expected three different numbers of actors, or more: the largest checks a line through the others"
            )
        return tuple(sorted(set(sizes)))
