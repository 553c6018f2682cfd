"""The policy that a job starts with."""

from __future__ import annotations

from pathlib import Path

from ript_ray.config import Config, DataConfig, resolve
from ript_ray.data.windows import HORIZON
from ript_ray.envs.world import World
from ript_ray.errors import UserError
from ript_ray.policies.adapt import adapt
from ript_ray.policies.checkpoints import empty_policy, load_policy, save_policy
from ript_ray.policies.policy import Policy
from ript_ray.policies.transform import Normalisation


def keep_starting_policy(config: Config, run_dir: Path) -> Policy:
    """The policy that a run begins with, of which it keeps a copy: the checkpoint may be another when it goes on."""
    kept = run_dir / "start"
    if kept.exists() and (run_dir / "journal.jsonl").exists():  # else it is of a run that never began
        return load_starting_policy(config, kept)
    policy = load_policy_to_train(config)
    save_policy(kept, policy)
    return policy


def load_policy_to_train(config: Config) -> Policy:
    """`load_starting_policy`, of one that can be trained as the settings say."""
    policy = load_starting_policy(config)
    check_chunk(f"policy.checkpoint={config.policy.checkpoint!r}", policy, config.data)
    trial = empty_policy(policy.describe())
    adapt(trial, config.train)
    if config.train.checkpoint_activations:
        trial.checkpoint_activations()
    return policy


def check_chunk(what: str, policy: Policy, data: DataConfig) -> None:
    """Can the policy learn all of an episode from windows of 50 actions?

    Raises:
        UserError: when it predicts more, or so few that it would never be shown the last actions.
    """
    if policy.horizon > HORIZON:
        raise UserError(f"{what} predicts chunks of {policy.horizon}; expected at most {HORIZON}, the size of a window")
    if policy.horizon < HORIZON and data.tail == "drop":
        raise UserError(
            f"data.tail=drop: {what} predicts chunks of {policy.horizon}, and would never learn the last "
            f"{HORIZON - policy.horizon} actions of an episode; set data.tail=pad"
        )


def check_world(world: World, transform: Normalisation) -> None:
    """Can a policy with this transform act in a world?

    Raises:
        UserError: when not.
    """
    transform.check_sizes(f"env.id={world.id!r}", world.state_dim, world.action_dim)
    transform.check_reach(f"env.id={world.id!r}")


def load_starting_policy(config: Config, folder: Path | None = None) -> Policy:
    """The policy of ``policy.checkpoint``, which must have been trained on frames of ``env.image_size``.

    Args:
        config: the whole configuration.
        folder: where it is instead, if not there.
    """
    policy = load_policy(folder or resolve(config.policy.checkpoint))
    size = policy.transform.frame_size
    if size not in (None, config.env.image_size):
        raise UserError(
            f"env.image_size={config.env.image_size}: policy.checkpoint={config.policy.checkpoint!r} was trained on "
            f"{size}×{size} pixels; set env.image_size={size}"
        )
    policy.transform.check_frame_size(
        f"env.image_size={config.env.image_size}: policy.checkpoint={config.policy.checkpoint!r}", config.env.image_size
    )
    for key, scale in (("policy.guidance", config.policy.guidance), ("eval.guidance", config.eval.guidance)):
        if scale != 1 and not policy.conditional:
            raise UserError(
                f"{key}={scale:g}: policy.checkpoint={config.policy.checkpoint!r} was converted with "
                "convert.condition=none, so there is nothing to guide by; set it to 1, or convert again"
            )
    if config.policy.execute > policy.horizon:
        raise UserError(
            f"policy.execute={config.policy.execute}: policy.checkpoint={config.policy.checkpoint!r} predicts chunks "
            f"of {policy.horizon}; set policy.execute={policy.horizon} or less"
        )
    return policy
