"""What settings must hold together. Each rule raises a ValueError that names keys, values and a way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ript_ray.config.job import INIT_STATES, MAX_SEED, PLACEMENTS
from ript_ray.config.learning import OWN, TRAITS, ObjectiveConfig, Traits

if TYPE_CHECKING:
    from ript_ray.config import Config

_USED: dict[str, Callable[[ObjectiveConfig], bool]] = {
    "alpha": lambda o: o.name in ("cfg", "imitation", "advantage_weighted"),
    "dropout": lambda o: o.name == "label_dropout",
    "beta": lambda o: o.name == "nft",
    "ratio_clip": lambda o: o.name in ("fpo", "flow_sde"),
    "ratio_scale": lambda o: o.name == "fpo",
    "margin": lambda o: o.negatives == "hinge",
    "temperature": lambda o: o.negatives in ("softplus", "exp"),
    "weight_limit": lambda o: o.negatives == "exp",
    "floor": lambda o: o.negatives == "clamp",
    "clip_low": lambda o: o.clip == "asymmetric",
    "clip_high": lambda o: o.clip in ("symmetric", "asymmetric"),
    "clip_quantile": lambda o: o.clip == "quantile",
}
"""When a setting of the objective has a say."""


def check(config: Config) -> None:
    """Apply all rules.

    Raises:
        ValueError: for the first that does not hold.
    """
    for rule in (_states, _budget, _goal, _asynchrony, _actors, _learners, _demonstrations):
        rule(config)
    check_objective(config, TRAITS.get(config.objective.name, OWN))


def check_objective(config: Config, traits: Traits) -> None:
    """Apply the rules that go by what the objective does.

    Raises:
        ValueError: for the first that does not hold.
    """
    for rule in (_samples, _weights, _versions, _guidance):
        rule(config, traits)


def _states(config: Config) -> None:
    train, held_out = config.env.train_init_states, config.env.eval_init_states
    for name, (first, end) in (("train", train), ("eval", held_out)):
        if not 0 <= first < end <= INIT_STATES:
            raise ValueError(
                f"env.{name}_init_states=[{first}, {end}]: expected 0 <= first < end <= {INIT_STATES}, the number "
                "of initial states of each task"
            )
    if not config.env.train_placements and max(train[0], held_out[0]) < min(train[1], held_out[1]):
        raise ValueError(
            f"env.train_init_states={list(train)} and env.eval_init_states={list(held_out)} overlap; "
            "a policy must not be trained on the states it is evaluated on; set env.train_placements=400, and it is "
            "trained on none of them"
        )
    for key, seed in (("eval.seed", config.eval.seed), ("run.seed", config.run.seed)):
        if seed > MAX_SEED:
            raise ValueError(f"{key}={seed}: simulators take seeds below 2^32; expected at most {MAX_SEED}")
    seeds = range(config.eval.seed, config.eval.seed + config.eval.random_placement)
    if seeds and (seeds.start < INIT_STATES or (seeds.start < PLACEMENTS.stop and PLACEMENTS.start < seeds.stop)):
        raise ValueError(
            f"eval.seed={config.eval.seed} with eval.random_placement={config.eval.random_placement}: these seeds are "
            f"initial states (0 to {INIT_STATES - 1}) or placements of training and of what is chosen by "
            f"({PLACEMENTS.start} to {PLACEMENTS.stop - 1}); set eval.seed={PLACEMENTS.stop}"
        )


def _budget(config: Config) -> None:
    sampling = config.sampling
    if sampling.max_groups < sampling.groups:
        raise ValueError(f"sampling.max_groups={sampling.max_groups} is less than sampling.groups={sampling.groups}")


def _goal(config: Config) -> None:
    goal, target = config.train.stop_at, config.sampling.target_success
    if goal is not None and target is not None and target <= goal:
        raise ValueError(
            f"train.stop_at={goal:g} with sampling.target_success={target:g}: initial states are chosen so that "
            "about so many rollouts succeed, so the goal would not be reached; set one of them alone"
        )


def _asynchrony(config: Config) -> None:
    train = config.train
    if train.mode == "async" and train.lead > train.max_staleness:
        raise ValueError(
            f"train.lead={train.lead} is more than train.max_staleness={train.max_staleness}; "
            "what is collected so far ahead would never be trained on"
        )
    if train.mode == "async" and not config.scaling.ray:
        raise ValueError("scaling.ray=false with train.mode=async: one process can only collect and learn in turn")


def _actors(config: Config) -> None:
    scaling = config.scaling
    if config.policy.compiled and not scaling.ray:
        raise ValueError("policy.compiled=true with scaling.ray=false: only rollout actors compile; set one of them")
    if scaling.min_actors is not None and scaling.min_actors > scaling.actors:
        raise ValueError(f"scaling.min_actors={scaling.min_actors} is more than scaling.actors={scaling.actors}")
    if scaling.min_actors is not None and not (scaling.actor_labels and scaling.learner_labels):
        raise ValueError(
            f"scaling.min_actors={scaling.min_actors} without scaling.actor_labels and scaling.learner_labels: "
            "actors that wait for room could take the learners'; say which nodes are whose"
        )
    if config.run.storage and not scaling.ray:
        raise ValueError(f"run.storage={config.run.storage!r} with scaling.ray=false: such a run is not resumed")


def _learners(config: Config) -> None:
    train, scaling = config.train, config.scaling
    if train.batch_size % max(1, scaling.learners):
        raise ValueError(
            f"train.batch_size={train.batch_size} is not divisible by scaling.learners={scaling.learners}; every "
            "learner needs the same share"
        )
    if train.shard and (scaling.learners < 2 or not scaling.ray):
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


def _samples(config: Config, traits: Traits) -> None:
    """Are they such that the objective can learn from them?"""
    name, data, policy = config.objective.name, config.data, config.policy
    if traits.compares_with_recording and policy.explore == 0.0:
        raise ValueError(
            f"objective.name={name} with policy.explore={policy.explore:g}: expected more than 0, for "
            "example 0.5; it learns from the stochastic steps of rollouts"
        )
    if traits.compares_with_recording and {policy.precision, config.train.precision} != {"float32"}:
        raise ValueError(
            f"objective.name={name} with policy.precision={policy.precision}, train.precision="
            f"{config.train.precision}: it compares densities of what actors did with what the learner would, and "
            "rounding alone would clip them; set both to float32"
        )
    compares = traits.on_policy or traits.compares_with_recording
    if compares and data.windows != "seen":
        raise ValueError(
            f"objective.name={name} with data.windows={data.windows}: it compares with what the policy answered to "
            "what it saw; set data.windows=seen"
        )
    if compares and policy.action_noise > 0:
        raise ValueError(
            f"policy.action_noise={policy.action_noise:g} with objective.name={name}: it compares with what the "
            "policy answered, which is not what was executed then; set policy.action_noise=0"
        )
    if compares and data.demo_share > 0:
        raise ValueError(
            f"data.demo_share={data.demo_share:g} with objective.name={name}: it compares with what the policy "
            "answered, and demonstrations have no such answer; set data.demo_share=0"
        )


def _demonstrations(config: Config) -> None:
    data = config.data
    shown = round(data.demo_share * config.train.batch_size)
    if data.demo_share > 0 and not 0 < shown < config.train.batch_size:
        raise ValueError(
            f"data.demo_share={data.demo_share:g} of train.batch_size={config.train.batch_size} are {shown} windows "
            "of demonstrations; expected some of both kinds in each batch"
        )


def notes(config: Config) -> list[str]:
    """What a user may not have meant, to be said when a run begins."""
    objective = config.objective
    found = []
    if objective.own and objective.name in TRAITS:
        found.append(f"objective.own has no say with objective.name={objective.name}: it is for module:function")
    for key, used in _USED.items():
        value = getattr(objective, key)
        if objective.name in TRAITS and value != ObjectiveConfig.model_fields[key].default and not used(objective):
            found.append(
                f"objective.{key}={value:g} has no say with objective.name={objective.name}, negatives="
                f"{objective.negatives}, clip={objective.clip}"
            )
    if objective.normalise == "robust" and objective.baseline == "task":
        found.append(
            "objective.normalise=robust with objective.baseline=task: all successes have the same advantage, and once "
            "most rollouts succeed it is the median, from which nothing is learnt; standard would do"
        )
    return found


def _weights(config: Config, traits: Traits) -> None:
    """Does how advantages become weights suit the objective?"""
    objective = config.objective
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
    if objective.fastest < 1.0 and objective.negatives in soft:
        raise ValueError(
            f"objective.fastest={objective.fastest:g} with objective.negatives={objective.negatives}: a slow "
            "success would have no weight, and a failure some; set objective.fastest=1, or "
            "objective.negatives=relu or hinge"
        )
    if (traits.on_policy or traits.compares_with_recording) and (
        objective.negatives == "abs" or objective.normalise == "min_max"
    ):
        how = "negatives=abs" if objective.negatives == "abs" else "normalise=min_max"
        raise ValueError(
            f"objective.{how} with objective.name={objective.name}: it would make failures likelier, as "
            "successes; set objective.negatives=keep objective.normalise=none (or standard)"
        )
    if objective.normalise == "min_max" and objective.negatives in ("relu", "hinge"):
        raise ValueError(
            f"objective.normalise=min_max with objective.negatives={objective.negatives}: no advantage is negative "
            "then, so failures would be imitated; set objective.normalise=none (or standard)"
        )
    if not traits.weighs:
        for key in ("normalise", "clip", "negatives"):
            if getattr(objective, key) != ObjectiveConfig.model_fields[key].default:
                raise ValueError(
                    f"objective.{key}={getattr(objective, key)} with objective.name={objective.name}: it asks only "
                    "whether an advantage is positive; choose advantage_weighted, nft, fpo or flow_sde"
                )


def _versions(config: Config, traits: Traits) -> None:
    """Were samples made by the policies that the objective compares with? In a single update they are."""
    name, train = config.objective.name, config.train
    if train.updates == 1:
        return
    if traits.on_policy and (train.restart or train.max_staleness > 0):
        raise ValueError(
            f"objective.name={name} with train.restart={str(train.restart).lower()} and "
            f"train.max_staleness={train.max_staleness}: it compares with the policy before the update, which "
            "must have made the samples; set train.restart=false train.max_staleness=0"
        )
    if traits.compares_with_recording and train.restart:
        raise ValueError(
            f"objective.name={name} with train.restart=true: to the starting policy, what later ones did is so "
            "unlikely that its ratio is clipped and teaches nothing; set train.restart=false"
        )
    if traits.on_policy and train.ema > 0 and train.act_with_ema:
        raise ValueError(
            f"objective.name={name} with train.ema={train.ema:g} and train.act_with_ema=true: it compares with the "
            "weights before the update, and their average made the samples; set train.act_with_ema=false"
        )


def _guidance(config: Config, traits: Traits) -> None:
    """Are both branches trained, if there is to be guidance?"""
    objective = config.objective
    branches = objective.name in ("cfg", "imitation", "advantage_weighted")
    if not traits.trains_one_branch and not (branches and objective.alpha == 0.0):
        return
    for key, scale in (("policy.guidance", config.policy.guidance), ("eval.guidance", config.eval.guidance)):
        if scale != 1.0:
            raise ValueError(
                f"{key}={scale:g} with objective.name={objective.name}, objective.alpha={objective.alpha:g}: "
                f"only one of the two branches is trained, there is nothing to guide by; set {key}=1"
            )
