"""Objectives: from a micro-batch with advantages to a loss. Each has its equation and source in a file of its own."""

from __future__ import annotations

from ript_ray.algos.objectives.advantage_weighted import advantage_weighted
from ript_ray.algos.objectives.cfg import cfg
from ript_ray.algos.objectives.draw import Draw, Loss, Objective
from ript_ray.algos.objectives.flow_sde import flow_sde
from ript_ray.algos.objectives.fpo import fpo
from ript_ray.algos.objectives.imitation import imitation
from ript_ray.algos.objectives.label_dropout import label_dropout
from ript_ray.algos.objectives.nft import nft
from ript_ray.config import ObjectiveConfig

__all__ = ["OBJECTIVES", "Draw", "Loss", "Objective", "compares_with_reference"]

OBJECTIVES: dict[str, Objective] = {
    "advantage_weighted": advantage_weighted,
    "cfg": cfg,
    "flow_sde": flow_sde,
    "fpo": fpo,
    "imitation": imitation,
    "label_dropout": label_dropout,
    "nft": nft,
}


def compares_with_reference(settings: ObjectiveConfig) -> bool:
    """Does the objective ask for the policy before the update?"""
    hinged = settings.name == "advantage_weighted" and settings.negatives == "hinge"
    return hinged or settings.name in ("nft", "fpo")
