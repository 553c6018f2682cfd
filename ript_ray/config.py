"""The typed configuration: YAML files plus ``key=value`` overrides. Every key is checked before anything starts."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ript_ray.errors import UserError, nearest

INIT_STATES = 50
"""Official initial states of each LIBERO task; other environments number as many."""

OBJECTIVE_NAMES = ("advantage_weighted", "cfg", "flow_sde", "fpo", "imitation", "label_dropout", "nft")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class RunConfig(_Section):
    """Where a run leaves its files and how it is named."""

    dir: str | None = None
    """Where the run leaves its files; ``runs/<command>-<date>`` by default."""
    name: str = "train"
    """Shown in MLflow."""
    seed: int = Field(default=0, ge=0)
    """Seeds context sampling, policy noise and training."""
    mlflow_uri: str | None = None
    """MLflow tracking server or store; a local SQLite file in the run directory's parent by default."""
    resume: bool = False
    """Go on with the run in ``run.dir`` if there is one, so that the same command can be sent again."""
    storage: str | None = None
    """A second place for the run's files, kept up to date after each update: a path, or a URL that ``pyarrow.fs`` knows
    (``s3://``, ``gs://``, ``hdfs://``). With ``resume`` a run whose ``dir`` is gone goes on from there."""
    keep_checkpoints: int | None = Field(default=None, ge=2)
    """Newest checkpoints to keep, at least two, since the newest may be damaged, beside the best; all by default."""
    report_port: int | None = Field(default=0, ge=0, le=65535)
    """Where the job serves its report page; 0: at any free port, null: nowhere."""
    report_host: str = "127.0.0.1"
    """Address that it listens at: this machine alone by default, 0.0.0.0 for everyone who can reach it."""


class EnvConfig(_Section):
    """The task, its frames and its initial states."""

    id: str = "libero_object/0"
    """Task: ``suite/index`` or ``suite/name``, ``robosuite/Task`` or ``gymnasium/Id``; several with commas between."""
    image_size: int = Field(default=64, ge=16, le=1024)
    """Height and width of camera frames, in pixels."""
    max_steps: int | None = Field(default=None, ge=1)
    """Step limit of an episode; the suite's official limit by default."""
    train_init_states: tuple[int, int] = (0, 25)
    """Initial states to learn on: first, and one past the last."""
    train_placements: int = Field(default=0, ge=0)
    """Learn on so many random placements (objects and arm) instead, too many to be learned by heart; 0 for none."""
    eval_init_states: tuple[int, int] = (25, 50)
    """Held-out initial states for evaluation: first, and one past the last."""

    @property
    def ids(self) -> tuple[str, ...]:
        """The tasks, each once."""
        return tuple(dict.fromkeys(name.strip() for name in self.id.split(",")))


class PolicyConfig(_Section):
    """The starting policy and how it acts in rollouts."""

    checkpoint: str = "checkpoints/libero_object_0"
    """Folder of the starting policy."""
    execute: int = Field(default=10, ge=1, le=50)
    """Actions executed of each predicted chunk, of which most policies have 50."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of a π0's weights in rollout actors; norms and small projections stay in float32, and so does what is
    trained."""
    compiled: bool = False
    """Let ``torch.compile`` fuse the Euler step in rollout actors; the first look then takes a minute, and a C++
    compiler where they run on CPUs."""
    denoise_steps: int = Field(default=10, ge=1)
    """Euler steps from noise to actions."""
    guidance: float = Field(default=1.0, ge=0.0)
    """Guidance scale w of rollouts: v = v₀ + w(v₁ − v₀)."""
    explore: float = Field(default=0.0, ge=0.0)
    """Noise level of one stochastic Euler step in each chunk of a rollout, never of evaluation; 0 for none."""
    action_noise: float = Field(default=0.0, ge=0.0)
    """Deviation of noise that is added to the actions of rollouts, never of evaluation, in the environment's units;
    what was executed is what is learnt from. 0 for none."""
    noise_exponent: float = Field(default=1.0, ge=0.0)
    """β of its power spectrum 1/f^β: 0 is white, 1 pink, which leads to other places rather than trembling, 2 brown."""
    noise_dimensions: int = Field(default=3, ge=1)
    """So many first action dimensions have it; an arm's first three move the hand."""


class EvalConfig(_Section):
    """Evaluation on held-out initial states."""

    episodes: int = Field(default=75, ge=0)
    """Episodes on held-out initial states, the same ones with the same noise before and after."""
    random_placement: int = Field(default=0, ge=0)
    """Episodes with randomly placed objects, in a column of their own."""
    shifted: int = Field(default=0, ge=0)
    """Episodes in LIBERO-PRO's variants of the tasks (other words, objects, positions, goals), likewise."""
    guidance: float = Field(default=1.0, ge=0.0)
    """Guidance scale w of evaluation; it need not be that of rollouts."""
    scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 5.0)
    """Guidance scales that ``guidance`` chooses from."""
    halving_episodes: int = Field(default=24, ge=2)
    """Episodes of each scale in the first round of ``guidance``; the better half goes on to twice as many."""
    seed: int = Field(default=1_000_000, ge=0)
    """First noise seed of evaluation; the same for all runs, so that runs can be compared."""


class SamplingConfig(_Section):
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


class DataConfig(_Section):
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
    frame_every: int = Field(default=1, ge=1)
    """Of LeRobot datasets and HDF5 read every so many frames; windows start there. Actions are read all."""
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


class ObjectiveConfig(_Section):
    """The loss, and how advantages enter it (`ript_ray.algos.objectives`, `ript_ray.algos.advantages`)."""

    name: str = "cfg"
    """Which objective: advantage_weighted, cfg, flow_sde, fpo, imitation, label_dropout or nft, each with its equation
    and source in a file of its own; or ``module:function``, one of yours (docs/extending.md)."""
    alpha: float = Field(default=0.1, ge=0.0)
    """Weight of the unconditional branch (``cfg``, ``imitation``, ``advantage_weighted``)."""
    dropout: float = Field(default=0.1, ge=0.0, le=1.0)
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

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in OBJECTIVE_NAMES and not all(name.partition(":")):
            raise ValueError(
                f"expected {', '.join(OBJECTIVE_NAMES)} or module:function; {nearest(name, OBJECTIVE_NAMES)}"
            )
        return name


class TrainConfig(_Section):
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
    warmup: float = Field(default=0.05, ge=0.0, le=1.0)
    """Share of an update's steps with a rising learning rate; a cosine to zero follows."""
    ema: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Decay of the moving average of the weights, per optimiser step; 0 for none."""
    act_with_ema: bool = True
    """With ``ema``: rollouts act with the averaged weights; else with the last ones, and only the last of
    ``updates`` gives the average, which is evaluated and kept."""
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
    weight_decay: float = Field(default=1e-4, ge=0.0)
    """AdamW's weight decay."""
    clip_norm: float = Field(default=1.0, gt=0.0)
    """Largest norm of the gradient."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """``bfloat16`` computes in autocast; it pays on GPUs and on CPUs with bfloat16 units."""
    image_shift: int = Field(default=3, ge=0)
    """Augmentation: random shifts of frames, in pixels; none where recorded probabilities of the frames as they
    were are compared with (``flow_sde``)."""

    def averages(self, step: int) -> bool:
        """Does update ``step``, from 0, give the moving average of its weights?"""
        return self.ema > 0 and (self.act_with_ema or step + 1 == self.updates)


class ScalingConfig(_Section):
    """Processes, their resources and their time limits."""

    ray: bool = True
    """Without Ray the whole loop runs in one process, for debugging: the same results as one actor and one learner."""
    actors: int = Field(default=2, ge=0)
    """Rollout actors, each with one environment and one policy copy; 0: as many as fit on this machine."""
    min_actors: int | None = Field(default=None, ge=1)
    """Begin with so many of them; the others play as soon as nodes with room join the cluster. All by default."""
    learners: int = Field(default=1, ge=0)
    """Learner workers; 0 runs the learner in the driver process, for debugging."""
    actor_cpus: float = Field(default=0.5, gt=0.0)
    """CPUs reserved for each actor."""
    actor_gpus: float = Field(default=0.0, ge=0.0)
    """GPU share of each actor."""
    learner_cpus: float = Field(default=1.0, gt=0.0)
    """CPUs reserved for each learner."""
    learner_gpus: float = Field(default=0.0, ge=0.0)
    """GPUs of each learner; above 0 ``sft`` trains on a GPU, too."""
    learner_threads: int = Field(default=2, ge=1)
    """Threads of each learner on a CPU; in synchronous mode actors are idle while it learns."""
    actor_labels: dict[str, str] = {}
    """Labels of the nodes that actors run on, as ``ray start --labels`` gives them; any node by default."""
    learner_labels: dict[str, str] = {}
    """Labels of the nodes that learners run on, likewise."""
    address: str | None = None
    """Address of a running Ray cluster (``auto`` inside a submitted job); a local one is started by default."""
    hang_timeout_s: float = Field(default=15.0, gt=0.0)
    """An actor whose simulator takes longer for one reset, step or frame is killed and started again."""
    actor_memory_gb: float = Field(default=4.0, gt=0.0)
    """An actor whose private memory exceeds this is killed and started again."""
    episode_timeout_s: float = Field(default=300.0, gt=0.0)
    """An actor that takes longer for one episode is killed and started again."""
    max_restarts: int = Field(default=2, ge=0)
    """How often all processes start again after a failure, while nothing new is played or learnt in between."""
    heartbeat_timeout_s: float = Field(default=60.0, gt=0.0)
    """Coordinator, sample pool, weight store and learners that do not answer for so long are killed and replaced."""
    wait_timeout_s: float = Field(default=1800.0, gt=0.0)
    """Longest wait between processes (for samples, for weights), and longest time in which nothing is played or learnt,
    before all start again or the run ends with an error."""

    @property
    def needed_actors(self) -> int:
        """Rollout actors that a job cannot begin without."""
        return self.actors if self.min_actors is None else self.min_actors


class DemosConfig(_Section):
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


class SftConfig(_Section):
    """Supervised training on demonstrations."""

    steps: int = Field(default=1500, ge=1)
    """Optimiser steps."""
    init: str | None = None
    """Folder of a policy to continue from; a new one by default."""
    policy: str = "flow"
    """Architecture of a new one; or ``module:class``, one of yours (docs/extending.md)."""
    relative: int = Field(default=0, ge=0)
    """So many first action dimensions of a new one are relative to the state: of an SO100 arm, whose actions are joint
    angles, 6, or 5 if its gripper stays absolute. LIBERO's actions are changes already."""
    output: str = "checkpoints/libero_object_0"
    """Where to write the trained policy."""

    @field_validator("policy")
    @classmethod
    def _known(cls, name: str) -> str:
        if name != "flow" and not all(name.partition(":")):
            raise ValueError("expected flow or module:class")
        return name


class ConvertConfig(_Section):
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
    """So many first action dimensions are relative to the state: 6 for openpi's ``pi0_libero``."""
    horizon: int | None = Field(default=None, ge=1, le=50)
    """Actions in a chunk, where ``config.json`` does not say: 50 for π0, 10 for ``pi05_libero``."""
    state_in_prompt: bool | None = None
    """π0.5: is the state written into the prompt? Yes by default; not so for ``pi05_libero``."""
    condition: Literal["none", "embedding", "text"] = "embedding"
    """How the policy will be told "good" or not in reinforcement learning: a learnt embedding, words, or not at all."""


class PlanConfig(_Section):
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


class TuneConfig(_Section):
    """A search over settings, for ``tune``."""

    search: dict[str, Any] = {}
    """What is searched, by key: a list of choices, or {low, high} of a range, with log: true on a logarithmic scale."""
    trials: int = Field(default=8, ge=1)
    """Training jobs, where there is a range; lists alone are a grid, of which every combination is tried once."""
    parallel: int = Field(default=1, ge=1)
    """How many of them at a time."""


class BenchConfig(_Section):
    """What the benchmarks compare, disturb, watch and measure."""

    objectives: tuple[str, ...] = ()
    """Names in ``benchmarks/objectives.py``; all by default."""
    seeds: int = Field(default=3, ge=1)
    """Runs of each, with seeds from ``run.seed`` on."""
    rounds: int = Field(default=1, ge=1)
    """Rollouts and updates in each run."""
    injections: int = Field(default=100, ge=1)
    """Faults that ``bench faults`` injects."""
    job_timeout_s: float = Field(default=7200.0, gt=0.0)
    """Longest time of a job in ``bench async`` and ``bench soak``."""
    soak_updates: int = Field(default=262, ge=1)
    """Updates of the job that ``bench soak`` watches; the default job would make so many in a day."""
    simulated: int = Field(default=1000, ge=1)
    """Rollout actors that ``bench control`` simulates."""
    sizes: tuple[int, ...] = (1, 10, 100, 1000)
    """Numbers of simulated rollout actors that ``bench scaling`` runs, from few to many."""
    preset: Literal["pi0", "pi05", "pi0_tiny", "pi05_tiny"] = "pi0_tiny"
    """Sizes of the policy that ``bench policy`` measures."""
    compiled: bool = False
    """Let ``torch.compile`` fuse the Euler step in ``bench policy``."""


class Config(_Section):
    """All settings of a job."""

    run: RunConfig = RunConfig()
    env: EnvConfig = EnvConfig()
    policy: PolicyConfig = PolicyConfig()
    eval: EvalConfig = EvalConfig()
    sampling: SamplingConfig = SamplingConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig = TrainConfig()
    scaling: ScalingConfig = ScalingConfig()
    demos: DemosConfig = DemosConfig()
    sft: SftConfig = SftConfig()
    convert: ConvertConfig = ConvertConfig()
    plan: PlanConfig = PlanConfig()
    tune: TuneConfig = TuneConfig()
    bench: BenchConfig = BenchConfig()

    @model_validator(mode="after")
    def _check_states(self) -> Config:
        train, held_out = self.env.train_init_states, self.env.eval_init_states
        for name, (first, end) in (("train", train), ("eval", held_out)):
            if not 0 <= first < end <= INIT_STATES:
                raise ValueError(
                    f"env.{name}_init_states=[{first}, {end}]: expected 0 <= first < end <= {INIT_STATES}, the number "
                    "of initial states of each task"
                )
        if max(train[0], held_out[0]) < min(train[1], held_out[1]):
            raise ValueError(
                f"env.train_init_states={list(train)} and env.eval_init_states={list(held_out)} overlap; "
                "a policy must not be trained on the states it is evaluated on"
            )
        if self.sampling.max_groups < self.sampling.groups:
            raise ValueError(
                f"sampling.max_groups={self.sampling.max_groups} is less than sampling.groups={self.sampling.groups}"
            )
        return self

    @model_validator(mode="after")
    def _check_goal(self) -> Config:
        goal, target = self.train.stop_at, self.sampling.target_success
        if goal is not None and target is not None and target <= goal:
            raise ValueError(
                f"train.stop_at={goal:g} with sampling.target_success={target:g}: initial states are chosen so that "
                "about so many rollouts succeed, so the goal would not be reached; set one of them alone"
            )
        return self

    @model_validator(mode="after")
    def _check_processes(self) -> Config:
        if self.train.mode == "async" and self.train.lead > self.train.max_staleness:
            raise ValueError(
                f"train.lead={self.train.lead} is more than train.max_staleness={self.train.max_staleness}; "
                "what is collected so far ahead would never be trained on"
            )
        scaling = self.scaling
        if self.policy.compiled and not scaling.ray:
            raise ValueError(
                "policy.compiled=true with scaling.ray=false: only rollout actors compile; set one of them"
            )
        if scaling.min_actors is not None and scaling.min_actors > scaling.actors:
            raise ValueError(f"scaling.min_actors={scaling.min_actors} is more than scaling.actors={scaling.actors}")
        if scaling.min_actors is not None and not (scaling.actor_labels and scaling.learner_labels):
            raise ValueError(
                f"scaling.min_actors={scaling.min_actors} without scaling.actor_labels and scaling.learner_labels: "
                "actors that wait for room could take the learners'; say which nodes are whose"
            )
        if not self.scaling.ray and self.train.mode != "sync":
            raise ValueError("scaling.ray=false with train.mode=async: one process can only collect and learn in turn")
        if not self.scaling.ray and self.run.storage:
            raise ValueError(f"run.storage={self.run.storage!r} with scaling.ray=false: such a run is not resumed")
        if self.train.batch_size % max(1, self.scaling.learners):
            raise ValueError(
                f"train.batch_size={self.train.batch_size} is not divisible by "
                f"scaling.learners={self.scaling.learners}; every learner needs the same share"
            )
        if self.train.shard and (scaling.learners < 2 or not scaling.ray):
            raise ValueError(
                f"train.shard=true with scaling.learners={scaling.learners}, scaling.ray={str(scaling.ray).lower()}: "
                "expected two learners or more, which divide the weights among them, and scaling.ray=true"
            )
        if scaling.learner_gpus > 0 and (scaling.learners == 0 or not scaling.ray):
            raise ValueError(
                f"scaling.learner_gpus={scaling.learner_gpus:g} with scaling.learners={scaling.learners}, scaling.ray="
                f"{str(scaling.ray).lower()}: without learner workers an update runs on the CPU; set "
                "scaling.learner_gpus=0"
            )
        if scaling.learners > 1 and 0 < scaling.learner_gpus < 1:
            raise ValueError(
                f"scaling.learner_gpus={scaling.learner_gpus:g} with scaling.learners={scaling.learners}: Ray may give "
                "two learners shares of the same GPU, which NCCL refuses; expected whole ones, scaling.learner_gpus=1"
            )
        return self

    @model_validator(mode="after")
    def _check_objective(self) -> Config:
        objective = self.objective
        if objective.name == "flow_sde" and self.policy.explore == 0.0:
            raise ValueError(
                f"objective.name=flow_sde with policy.explore={self.policy.explore:g}: expected more than 0, for "
                "example 0.5; it learns from the stochastic steps of rollouts"
            )
        compares = objective.name in ("fpo", "nft", "flow_sde")
        if compares and self.data.windows != "seen":
            raise ValueError(
                f"objective.name={objective.name} with data.windows={self.data.windows}: it compares with what the "
                "policy answered to what it saw; set data.windows=seen"
            )
        if compares and self.policy.action_noise > 0:
            raise ValueError(
                f"policy.action_noise={self.policy.action_noise:g} with objective.name={objective.name}: it compares "
                "with what the policy answered, which is not what was executed then; set policy.action_noise=0"
            )
        if compares and self.data.demo_share > 0:
            raise ValueError(
                f"data.demo_share={self.data.demo_share:g} with objective.name={objective.name}: it compares with what "
                "the policy answered, and demonstrations have no such answer; set data.demo_share=0"
            )
        if objective.name == "advantage_weighted" and objective.negatives == "keep":
            raise ValueError(
                "objective.negatives=keep with objective.name=advantage_weighted: where advantages are negative the "
                "loss has no bound, and diverges; set objective.negatives=hinge (or relu, exp, softplus, clamp, abs)"
            )
        if objective.negatives == "hinge" and objective.name != "advantage_weighted":
            raise ValueError(
                f"objective.negatives=hinge with objective.name={objective.name}: only advantage_weighted bounds the "
                "loss of single samples; choose another of objective.negatives"
            )
        soft = ("exp", "softplus", "clamp", "abs")
        if objective.name == "advantage_weighted" and objective.fastest < 1.0 and objective.negatives in soft:
            raise ValueError(
                f"objective.fastest={objective.fastest:g} with objective.negatives={objective.negatives}: a slow "
                "success would have no weight, and a failure some; set objective.fastest=1, or "
                "objective.negatives=relu or hinge"
            )
        if compares and objective.negatives == "abs":
            raise ValueError(
                f"objective.negatives=abs with objective.name={objective.name}: it would make failures likelier, as "
                "much as successes; set objective.negatives=keep"
            )
        if objective.name in ("cfg", "label_dropout", "imitation"):
            for key in ("normalise", "clip", "negatives"):
                if getattr(objective, key) != ObjectiveConfig.model_fields[key].default:
                    raise ValueError(
                        f"objective.{key}={getattr(objective, key)} with objective.name={objective.name}: it asks only "
                        "whether an advantage is positive; choose advantage_weighted, nft, fpo or flow_sde"
                    )
        shown = round(self.data.demo_share * self.train.batch_size)
        if self.data.demo_share > 0 and not 0 < shown < self.train.batch_size:
            raise ValueError(
                f"data.demo_share={self.data.demo_share:g} of train.batch_size={self.train.batch_size} are {shown} "
                "windows of demonstrations; expected some of both kinds in each batch"
            )
        own_samples = not self.train.restart and self.train.max_staleness == 0
        if objective.name in ("fpo", "nft") and self.train.updates > 1 and not own_samples:
            raise ValueError(
                f"objective.name={objective.name} with train.restart={str(self.train.restart).lower()} and "
                f"train.max_staleness={self.train.max_staleness}: it compares with the policy before the update, which "
                "must have made the samples; set train.restart=false train.max_staleness=0"
            )
        if objective.name == "flow_sde" and self.train.updates > 1 and self.train.restart:
            raise ValueError(
                "objective.name=flow_sde with train.restart=true: to the starting policy, what later ones did is so "
                "unlikely that its ratio is clipped and teaches nothing; set train.restart=false"
            )
        averaged = self.train.ema > 0 and self.train.act_with_ema
        if objective.name in ("fpo", "nft") and self.train.updates > 1 and averaged:
            raise ValueError(
                f"objective.name={objective.name} with train.ema={self.train.ema:g} and train.act_with_ema=true: it "
                "compares with the weights before the update, and their average made the samples; set "
                "train.act_with_ema=false"
            )
        if compares or (objective.name in ("cfg", "imitation", "advantage_weighted") and objective.alpha == 0.0):
            for key, scale in (("policy.guidance", self.policy.guidance), ("eval.guidance", self.eval.guidance)):
                if scale != 1.0:
                    raise ValueError(
                        f"{key}={scale:g} with objective.name={objective.name}, objective.alpha={objective.alpha:g}: "
                        f"only one of the two branches is trained, there is nothing to guide by; set {key}=1"
                    )
        return self


def load_config(file: Path | None, overrides: list[str]) -> Config:
    """Read a configuration file and apply ``section.key=value`` overrides (values are YAML).

    Raises:
        UserError: for a missing file, an unknown key or a wrong value; the message names the key, the value, what was
            expected and the nearest valid key.
    """
    values: dict[str, Any] = {}
    if file is not None:
        if not file.is_file():
            shipped = sorted(str(path) for path in file.parent.glob("*.yaml"))
            raise UserError(f"--config {file}: no such file; {nearest(str(file), shipped) if shipped else ''}")
        try:
            values = yaml.safe_load(file.read_text()) or {}
        except (yaml.YAMLError, ValueError) as error:  # what is no UTF-8 is a ValueError
            raise UserError(f"--config {file}: not valid YAML: {error}") from error
        if not isinstance(values, dict):
            raise UserError(f"--config {file}: expected sections such as 'train: {{updates: 3}}', found {values!r}")
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise UserError(f"{override!r}: expected section.key=value, for example run.seed=1")
        _set(values, key, text)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(_explain(detail) for detail in error.errors())) from error


def save_config(config: Config, file: Path) -> None:
    """Write the resolved configuration, in a form that `load_config` reads."""
    file.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def resolve(path: str) -> Path:
    """A path as given, or, when it is not there, relative to the project: commands work from any folder."""
    given = Path(path)
    return given if given.exists() or given.is_absolute() else Path(__file__).parents[1] / given


def known_keys() -> list[str]:
    """All keys in dotted form."""
    return [f"{name}.{key}" for name, section in _sections().items() for key in section.model_fields]


def _sections() -> dict[str, type[BaseModel]]:
    return {name: field.annotation for name, field in Config.model_fields.items()}  # type: ignore[misc]


def _set(values: dict[str, Any], key: str, text: str) -> None:
    section, _, name = key.partition(".")
    if key not in known_keys():
        raise UserError(f"unknown key {key!r}; {nearest(key, known_keys())}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{key}={text!r}: not a valid value: {error}") from error
    # YAML 1.1 reads 1e-4 as text, since it has no decimal point; people write it all the same.
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if not isinstance(values.setdefault(section, {}), dict):
        raise UserError(f"{section}={values[section]!r}: expected keys and values, as {key} is one")
    values[section][name] = value


def _explain(detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"] if not isinstance(part, int))
    if detail["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {nearest(key, known_keys() if '.' in key else _sections())}"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{key}={detail['input']!r}: {message[0].lower()}{message[1:]}" if key else message
