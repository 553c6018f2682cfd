"""Which update's policy a run ends with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray

from actors.progress import CHOOSING
from actors.weights import publish
from ript_ray.algos.sampling import contexts_to_choose_by
from ript_ray.choosing import choose_update
from ript_ray.config import Config
from ript_ray.policies.checkpoints import copy_policy, load_policy, to_publish
from ript_ray.runs import policy_folder


def choose_policy(config: Config, coordinator: Any, store: Any, run_dir: Path) -> dict[str, Any]:
    """Let the policies of ``train.candidates`` updates play; the best is the newest in the store afterwards.

    Args:
        config: the whole configuration.
        coordinator: handle of the `Coordinator`, which says which they are, and plays.
        store: handle of the `WeightStore`, with the last update as its newest version.
        run_dir: has the policies in ``start`` and ``checkpoints``, and gets the one that was chosen in ``final``.

    Returns:
        ``updates``, how many there were; ``weights_sha256`` of the policy that was chosen; ``chosen``, what
        `choose_update` found; and ``policy_versions``, the updates behind those versions by which episodes name
        weights that were published again for this.
    """
    limit = config.scaling.wait_timeout_s
    last, sha256 = ray.get(store.newest_version.remote(), timeout=limit)
    acting, versions = last, {last: last}

    def act_as(update: int) -> None:
        nonlocal acting, sha256
        if update != acting:
            arrays, sha256 = to_publish(load_policy(policy_folder(run_dir, update)), config.policy.precision)
            publish(store, max(versions) + 1, arrays, sha256, limit)
            acting = versions[max(versions) + 1] = update

    def play(update: int, episodes: range) -> list[bool | None]:
        act_as(update)
        contexts = contexts_to_choose_by(config.env, config.eval.seed, episodes)
        played: list[bool | None] = ray.get(coordinator.play.remote(CHOOSING, contexts, config.eval.guidance))
        return played

    compared = ray.get(coordinator.candidates.remote(last), timeout=limit)
    chosen = choose_update(compared, play, config.eval.halving_episodes)
    act_as(chosen["update"])
    copy_policy(policy_folder(run_dir, acting), run_dir / "final")
    names = {str(version): update for version, update in versions.items() if version > last}
    return {"updates": last, "weights_sha256": sha256, "chosen": chosen, "policy_versions": names}
