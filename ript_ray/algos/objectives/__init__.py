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
from ript_ray.plugins import find_named

__all__ = [
    "OBJECTIVES",
    "Draw",
    "Loss",
    "Objective",
    "compares_with_recording",
    "compares_with_reference",
    "find_objective",
]

OBJECTIVES: dict[str, Objective] = {
    "advantage_weighted": advantage_weighted,
    "cfg": cfg,
    "flow_sde": flow_sde,
    "fpo": fpo,
    "imitation": imitation,
    "label_dropout": label_dropout,
    "nft": nft,
}


def find_objective(name: str) -> Objective:
    """One of `OBJECTIVES`, or, as ``module:function``, somebody's own.

    Raises:
        UserError: when there is no such module or function.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    found: Objective = find_named(name, "objective.name")
    return found


def compares_with_reference(settings: ObjectiveConfig) -> bool:
    """Does the objective ask for the policy before the update? One's own says so by an attribute of this name."""
    hinged = settings.name == "advantage_weighted" and settings.negatives == "hinge"
    asks = getattr(find_objective(settings.name), "compares_with_reference", False)
    return hinged or asks or settings.name in ("nft", "fpo")


def compares_with_recording(settings: ObjectiveConfig) -> bool:
    """Does the objective ask for what rollouts recorded of frames as they were? One's own says so likewise."""
    asks = getattr(find_objective(settings.name), "compares_with_recording", False)
    return asks or settings.name == "flow_sde"
