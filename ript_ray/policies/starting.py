"""The policy that a job starts with."""

from __future__ import annotations

from pathlib import Path

from ript_ray.config import Config, resolve
from ript_ray.errors import UserError
from ript_ray.policies.checkpoints import load_policy, save_policy
from ript_ray.policies.policy import Policy


def keep_starting_policy(config: Config, run_dir: Path) -> Policy:
    """The policy that a run begins with, of which it keeps a copy: the checkpoint may be another when it goes on."""
    kept = run_dir / "start"
    if kept.exists() and (run_dir / "journal.jsonl").exists():  # else it is of a run that never began
        return load_starting_policy(config, kept)
    policy = load_starting_policy(config)
    save_policy(kept, policy)
    return policy


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
