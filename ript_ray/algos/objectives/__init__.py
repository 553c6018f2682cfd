"""Objectives: from a micro-batch with advantages to a loss. Each has its equation and source in a file of its own."""

from __future__ import annotations

from dataclasses import fields, replace

from ript_ray.algos.objectives.advantage_weighted import advantage_weighted
from ript_ray.algos.objectives.cfg import cfg
from ript_ray.algos.objectives.draw import Draw, Loss, Objective
from ript_ray.algos.objectives.flow_sde import flow_sde
from ript_ray.algos.objectives.fpo import fpo
from ript_ray.algos.objectives.imitation import imitation
from ript_ray.algos.objectives.label_dropout import label_dropout
from ript_ray.algos.objectives.nft import nft
from ript_ray.config import Config, ObjectiveConfig, rules
from ript_ray.config.learning import OWN, TRAITS, Traits
from ript_ray.errors import UserError
from ript_ray.plugins import find_named

__all__ = [
    "OBJECTIVES",
    "Draw",
    "Loss",
    "Objective",
    "check_objective",
    "find_objective",
    "traits_of",
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


def traits_of(settings: ObjectiveConfig) -> Traits:
    """What the objective does; one's own says so by attributes of the same names.

    Raises:
        UserError: when there is no such module or function.
    """
    objective = find_objective(settings.name)
    traits = TRAITS.get(settings.name)
    if traits is None:
        said = {field.name: getattr(objective, field.name, getattr(OWN, field.name)) for field in fields(Traits)}
        return Traits(**said)
    hinged = settings.name == "advantage_weighted" and settings.negatives == "hinge"
    return replace(traits, compares_with_reference=True) if hinged else traits


def check_objective(config: Config) -> None:
    """Can it be found, and do the settings suit it? Of built-in ones the configuration has made sure.

    Raises:
        UserError: when not.
    """
    try:
        rules.check_objective(config, traits_of(config.objective))
    except ValueError as error:
        raise UserError(str(error)) from None
