"""What is tried, which of it is learnt from, and how."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator

from ript_ray.config.section import Section
from ript_ray.errors import nearest


@dataclass(frozen=True, slots=True)
class Traits:
    """What an objective does that other settings must go by."""

    weighs: bool = False
    """It matters to it how good a sample is, not only whether it is."""
    compares_with_reference: bool = False
    """It asks for the policy before the update."""
    compares_with_recording: bool = False
    """It asks for what rollouts recorded, of frames as they were."""
    on_policy: bool = False
    """Its samples must be of the policy before the update."""
    trains_one_branch: bool = False
    """It trains c = 1 alone, so there is nothing to guide by."""


_RATIO = Traits(weighs=True, compares_with_reference=True, on_policy=True, trains_one_branch=True)
TRAITS = {
    "advantage_weighted": Traits(weighs=True),
    "cfg": Traits(),
    "flow_sde": Traits(weighs=True, compares_with_recording=True, trains_one_branch=True),
    "fpo": _RATIO,
    "imitation": Traits(),
    "label_dropout": Traits(),
    "nft": _RATIO,
}
OWN = Traits(weighs=True)
"""Of an objective by ``module:function``, as long as nobody has looked at it."""
OBJECTIVE_NAMES = tuple(TRAITS)


class SamplingConfig(Section):
    """Groups of rollouts and their budget."""

    group_size: int = Field(default=8, ge=2)
    """Rollouts K of one context, whose results are compared with each other."""
    groups: int = Field(default=8, ge=1)
    """Groups wanted for one update, not counting those that ``objective.baseline=group`` rejects."""
    max_groups: int = Field(default=12, ge=1)
    """Budget of groups for one update, ``group_size`` episodes each: rejected ones are replaced until it is spent."""
    max_seconds: float | None = Field(default=None, gt=0.0)
    """Budget of seconds for the rollouts of one update; unlimited by default."""
    enough: float = Field(default=1.0, gt=0.0, le=1.0)
    """Early stop: share of the wanted groups after which an update no longer waits for the rest."""
    target_success: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Curriculum: prefer initial states at which about this share of rollouts succeeds; all alike by default."""
    skip_after: int = Field(default=2, ge=1)
    """Skip an initial state after so many groups in a row in which every rollout succeeded."""
    remeasure_after: int = Field(default=3, ge=1)
    """Measure a skipped initial state again once it has been passed over so many times."""

    @property
    def quota(self) -> int:
        """Accepted groups after which an update no longer waits."""
        # In floating point 0.28 · 25 is a little more than 7.
        return max(1, math.ceil(round(self.enough * self.groups, 6)))


class DataConfig(Section):
    """Demonstrations, and how trajectories become windows."""

    demos: str = "data/demos/libero_object_0.safetensors"
    """Demonstrations, written by ``demos`` and read by ``sft``; a LeRobot dataset or LIBERO's HDF5 is read, too."""
    demo_share: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of each batch of ``train`` that are windows of successful demonstrations in ``demos``, always good (A = 1);
    0 trains on rollouts alone."""
    cameras: tuple[str, ...] | None = None
    """Of LeRobot datasets: the features that are cameras, in the order in which the policy has them (first the scene's,
    then the wrist's). By default openpi's names, or else all ``observation.image…`` in the dataset's order."""
    state: str | None = None
    """Of LeRobot datasets: the feature that is the state; ``state`` or ``observation.state`` by default."""
    actions: str | None = None
    """Of LeRobot datasets: the feature that is the action; ``actions`` or ``action`` by default."""
    observed: Literal["after", "before"] | None = None
    """Of HDF5: was an observation made after the action of its row, as in LIBERO's own files, or before it, as in files
    made again by replaying? By default as in LIBERO's own, and other files are refused."""
    leave_out: tuple[int, ...] = ()
    """Of LeRobot datasets: episodes that are not read, damaged ones for example."""
    frame_every: int = Field(default=1, ge=1)
    """Of LeRobot datasets and HDF5: read every n-th frame, where windows start, and all actions."""
    dataset_version: Literal["v3.0", "v2.1"] = "v3.0"
    """Format of LeRobot datasets that ``export`` writes."""
    windows: Literal["seen", "all"] = "seen"
    """``seen``: train on windows that start where the policy looked (no frame is rendered for training alone);
    ``all``: on any window; the missing frames of those that are drawn are rendered while the learner trains."""
    distinct: int | None = Field(default=None, ge=1)
    """Train on at most so many distinct windows in one update, drawn at random; on all of them by default."""
    good_share: float = Field(default=0.0, ge=0.0, lt=1.0)
    """At least this share of each batch has a positive advantage: successes that are rare are repeated more often than
    failures, and do not drown in them. 0 leaves it to chance."""
    tail: Literal["drop", "pad"] = "drop"
    """``drop``: a trajectory of L steps gives L − 49 full windows; ``pad``: also the 49 padded ones at its end."""
    short: Literal["pad", "drop"] = "pad"
    """What becomes of trajectories shorter than 50 steps."""


class ObjectiveConfig(Section):
    """The loss, and how advantages enter it (`ript_ray.algos.objectives`, `ript_ray.algos.advantages`)."""

    name: str = "cfg"
    """Which objective: advantage_weighted, cfg, flow_sde, fpo, imitation, label_dropout or nft, each with its equation
    and source in a file of its own; or ``module:function``, one of yours (docs/extending.md)."""
    alpha: float = Field(default=0.1, ge=0.0)
    """Weight of the unconditional branch (``cfg``, ``imitation``, ``advantage_weighted``)."""
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    """How often ``label_dropout`` leaves the condition out."""
    beta: float = Field(default=1.0, gt=0.0)
    """β of ``nft``: how far the reflected velocities lie from the old one."""
    ratio_clip: float = Field(default=0.2, gt=0.0, lt=1.0)
    """ε of ``fpo`` and ``flow_sde``: the ratio counts between 1 − ε and 1 + ε."""
    ratio_scale: float = Field(default=50.0, gt=0.0)
    """``fpo``: scale of the difference of mean losses that stands in for a log-ratio."""
    margin: float = Field(default=0.02, ge=0.0)
    """``negatives=hinge``: the loss of a bad sample counts up to its old value plus this."""
    baseline: Literal["group", "task"] = "group"
    """What a rollout is compared with: the others of its group, and groups that agree in their results are rejected; or
    all others of its task, and every group is kept."""
    fastest: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of each task's successes that count as good: the fastest. The others, which fumbled, count as neither."""
    normalise: Literal["none", "zero_mean", "standard", "robust", "min_max"] = "none"
    """Advantages of an update: subtract the mean; also divide by the deviation; median and interquartile range
    instead; or map to [0, 1]."""
    clip: Literal["none", "symmetric", "asymmetric", "quantile"] = "none"
    """Then bound them: to ±clip_high, to [−clip_low, clip_high], or to the quantiles clip_quantile and its
    complement."""
    clip_low: float = Field(default=1.0, ge=0.0)
    """Bound of negative advantages for ``clip=asymmetric``."""
    clip_high: float = Field(default=1.0, gt=0.0)
    """Bound of positive advantages, and of both for ``clip=symmetric``."""
    clip_quantile: float = Field(default=0.05, ge=0.0, lt=0.5)
    """Share cut off at each end for ``clip=quantile``."""
    negatives: Literal["keep", "softplus", "exp", "abs", "clamp", "relu", "hinge"] = "keep"
    """Then what becomes of them as weights: log(1 + exp(A/τ))·τ; exp(A/τ), at most ``weight_limit``; |A|; at least
    ``floor``; at least 0; or kept with a bounded loss (``advantage_weighted`` only)."""
    temperature: float = Field(default=0.5, gt=0.0)
    """τ of ``negatives=softplus`` and ``exp``."""
    weight_limit: float = Field(default=20.0, gt=0.0)
    """Largest weight of ``negatives=exp``."""
    floor: float = Field(default=0.05, ge=0.0)
    """Smallest weight of ``negatives=clamp``."""
    own: dict[str, Any] = Field(default={})
    """Settings of an objective by ``module:function``, which finds them in ``settings.own``."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in OBJECTIVE_NAMES and not all(name.partition(":")):
            raise ValueError(
                f"expected {', '.join(OBJECTIVE_NAMES)} or module:function; {nearest(name, OBJECTIVE_NAMES)}"
            )
        return name


class TrainConfig(Section):
    """The loop and the optimisation."""

    mode: Literal["sync", "async"] = "sync"
    """``sync``: collect, learn, collect; ``async``: collect while learning, bounded by ``max_staleness``."""
    updates: int = Field(default=3, ge=1)
    """Collect-and-learn rounds; each publishes one weights version."""
    restart: bool = True
    """Each update starts from the starting policy and trains on all samples kept, instead of from the last weights."""
    max_staleness: int = Field(default=8, ge=0)
    """Samples of weights older than so many versions are never trained on."""
    lead: int = Field(default=1, ge=0)
    """In ``async`` mode: how many updates the rollouts may run ahead of the learner."""
    epochs: int = Field(default=20, ge=1)
    """Passes over the samples in one update."""
    min_steps: int = Field(default=1, ge=1)
    """At least so many optimiser steps in an update: more passes while the samples are few."""
    batch_size: int = Field(default=64, ge=1)
    """Windows per optimiser step, over all learners."""
    micro_batch: int = Field(default=64, ge=1)
    """Windows per forward and backward pass; gradients are accumulated up to ``batch_size``."""
    lr: float = Field(default=5e-4, gt=0.0)
    """Peak learning rate of AdamW."""
    condition_lr: float = Field(default=1.0, gt=0.0)
    """Factor of the learning rate of what tells the policy its condition. In a new condition embedding of a π0 it is
    zero, and AdamW moves it by no more than the sum of the learning rates: without a factor guidance would do nothing
    for long."""
    warmup: float = Field(default=0.05, ge=0.0, le=1.0)
    """Share of an update's steps with a rising learning rate; a cosine to zero follows."""
    ema: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Decay of the moving average of the weights, per optimiser step; 0 for none."""
    act_with_ema: bool = True
    """With ``ema``: rollouts act with the averaged weights; else with the last ones, and only the last of ``updates``
    gives the average."""
    freeze: tuple[str, ...] = ()
    """Parts of the policy that are not trained, for example [vision, projector, language, words] of π0: all
    but what acts."""
    lora_rank: int = Field(default=0, ge=0)
    """Train only the condition and low-rank changes of linear layers, of this rank, merged at the end of each update;
    0: all weights."""
    lora_part: str = "all"
    """Part of the policy that gets them, for example ``expert`` of π0."""
    shard: bool = False
    """The learners divide weights, gradients and the optimiser's moments among them (FSDP2), for policies that one GPU
    cannot hold with all that; otherwise each learner has them all."""
    checkpoint_activations: bool = False
    """π0: compute layers again in the backward pass instead of keeping their activations."""
    anchor: float = Field(default=0.0, ge=0.0)
    """Weight of a penalty on the velocity's change since the starting policy, against forgetting."""
    stop_at: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Stop once the lower bound of the 95 % interval of training rollouts' success reaches this."""
    candidates: int = Field(default=1, ge=1)
    """At the end the policies of so many updates, the last and those that did best in rollouts, play from starts that
    neither training nor evaluation has (``eval.halving_episodes``); the best is evaluated and kept. 1: the last."""
    weight_decay: float = Field(default=1e-4, ge=0.0)
    """AdamW's weight decay."""
    clip_norm: float = Field(default=1.0, gt=0.0)
    """Largest norm of the gradient."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the arithmetic, in autocast; weights stay in float32. ``bfloat16`` pays on GPUs and on CPUs with bfloat16
    units; ``float16``, for which the loss is scaled as its range is small, on GPUs that have no bfloat16."""
    image_shift: int = Field(default=3, ge=0)
    """Augmentation: random shifts of frames, in pixels; none where recorded probabilities of the frames as they
    were are compared with (``flow_sde``)."""

    def averages(self, step: int) -> bool:
        """Does update ``step``, from 0, give the moving average of its weights?"""
        return self.ema > 0 and (self.act_with_ema or step + 1 == self.updates)

    @property
    def spared(self) -> int:
        """So many checkpoints, of those that did best in rollouts, are kept for the end beside the newest."""
        return max(1, self.candidates - 1)
