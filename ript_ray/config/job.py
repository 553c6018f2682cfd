"""Where a job runs, what it acts in, and how it acts and is evaluated."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ript_ray.config.section import Section

INIT_STATES = 50
"""Official initial states of each LIBERO task; other environments number as many."""
PLACEMENTS = range(500_000, 1_000_000)
"""Seeds of random placements for training and, after them, of those by which policies and settings are chosen. Noise
has seeds of its own, 2,000,000 and more in rollouts."""
MAX_SEED = 2**32 - 1 - 1_000_000
"""Episodes have this seed and the ones after it; simulators take 32 bits."""


class RunConfig(Section):
    """Where a run leaves its files and how it is named."""

    dir: str | None = None
    """Where the run leaves its files; ``runs/<command>-<date>`` by default."""
    name: str = "train"
    """Name of the MLflow experiment; in it a run is called after its folder."""
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
    """Newest checkpoints to keep, at least two, since the newest may be damaged, beside those that did best in rollouts
    (one, or as many as ``train.candidates`` needs); all by default."""
    report_port: int | None = Field(default=0, ge=0, le=65535)
    """Where the job serves its report page; 0: at any free port, null: nowhere."""
    report_host: str = "127.0.0.1"
    """Address that it listens at: this machine alone by default, 0.0.0.0 for everyone who can reach it."""


class EnvConfig(Section):
    """The task, its frames and its initial states."""

    id: str = "libero_object/0"
    """Task: ``suite/index`` or ``suite/name``, ``robosuite/Task`` or ``gymnasium/Id``; several with commas between."""
    image_size: int = Field(default=64, ge=16, le=1024)
    """Height and width of camera frames, in pixels."""
    max_steps: int | None = Field(default=None, ge=1)
    """Step limit of an episode; the suite's official limit by default."""
    train_init_states: tuple[int, int] = (0, 25)
    """Initial states to learn on: first, and one past the last."""
    train_placements: int = Field(default=0, ge=0, le=300_000)
    """Learn on so many random placements (objects and arm) instead, too many to be learned by heart; 0 for none."""
    eval_init_states: tuple[int, int] = (25, 50)
    """Held-out initial states for evaluation: first, and one past the last."""

    @property
    def ids(self) -> tuple[str, ...]:
        """The tasks, each once."""
        return tuple(dict.fromkeys(name.strip() for name in self.id.split(",")))


class PolicyConfig(Section):
    """The starting policy and how it acts in rollouts."""

    checkpoint: str = "checkpoints/libero_object_0"
    """Folder of the starting policy."""
    execute: int = Field(default=10, ge=1, le=50)
    """Actions executed of each predicted chunk, of which most policies have 50."""
    precision: Literal["float32", "bfloat16", "int8"] = "float32"
    """Precision of a π0's weights in rollout actors; norms and small projections stay in float32, and so does what is
    trained. ``int8`` has a factor for each row of a linear layer; what is in no layer has bfloat16."""
    compiled: bool = False
    """Let ``torch.compile`` fuse the Euler step in rollout actors. The first look then takes about a minute; on CPUs a
    C++ compiler is required."""
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
    """Number of leading action dimensions that it is added to; an arm's first three move the hand."""


class EvalConfig(Section):
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
    """Episodes of each scale in the first round of ``guidance``, and of each update that ``train.candidates`` compares;
    the better half goes on to twice as many."""
    seed: int = Field(default=1_000_000, ge=0)
    """First noise seed of evaluation; the same for all runs, so that runs can be compared."""


class ScalingConfig(Section):
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
    actor_labels: dict[str, str] = Field(default={})
    """Labels of the nodes that actors run on, as ``ray start --labels`` gives them; any node by default."""
    learner_labels: dict[str, str] = Field(default={})
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
