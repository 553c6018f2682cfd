"""Which update's policy a run ends with."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import ray

from actors.progress import CHOOSING
from actors.weights import publish
from ript_ray.algos.sampling import contexts_to_choose_by
from ript_ray.choosing import candidates, choose_update
from ript_ray.config import Config
from ript_ray.errors import UserError
from ript_ray.policies.checkpoints import load_policy, save_policy, to_publish

log = logging.getLogger("ript_ray")


def choose_policy(config: Config, coordinator: Any, store: Any, run_dir: Path) -> dict[str, Any]:
    """Let the policies of ``train.candidates`` updates play; the best is the newest in the store afterwards.

    Args:
        config: the whole configuration.
        coordinator: handle of the `Coordinator`, which plays.
        store: handle of the `WeightStore`, with the last update as its newest version.
        run_dir: has the policies in ``start`` and ``checkpoints``, and gets the one that was chosen in ``final``.

    Returns:
        ``updates``, how many there were; ``weights_sha256`` of the policy that was chosen; and ``chosen``, what
        `choose_update` found.
    """
    limit = config.scaling.wait_timeout_s
    last, sha256 = ray.get(store.newest_version.remote(), timeout=limit)
    acting, version = last, last

    def folder(update: int) -> Path:
        return run_dir / "checkpoints" / f"{update:04d}" if update else run_dir / "start"

    def act_as(update: int) -> None:
        nonlocal acting, version, sha256
        if update != acting:
            arrays, sha256 = to_publish(load_policy(folder(update)), config.policy.precision)
            acting, version = update, version + 1
            publish(store, version, arrays, sha256, limit)

    def play(update: int, episodes: range) -> list[bool | None]:
        try:
            act_as(update)
        except UserError as error:
            log.warning("the policy of update %d is not compared: %s", update, error)
            return [None] * len(episodes)
        contexts = contexts_to_choose_by(config.env, config.eval.seed, episodes)
        played: list[bool | None] = ray.get(coordinator.play.remote(CHOOSING, contexts, config.eval.guidance))
        return played

    best = [update for update in ray.get(coordinator.best_updates.remote(), timeout=limit) if folder(update).exists()]
    chosen = choose_update(candidates(last, best, config.train.candidates), play, config.eval.halving_episodes)
    act_as(chosen["update"])
    save_policy(run_dir / "final", load_policy(folder(acting)), about={"update": acting})
    return {"updates": last, "weights_sha256": sha256, "chosen": chosen}
