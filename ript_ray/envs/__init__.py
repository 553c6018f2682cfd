"""Environments by name: ``make("libero_object/0")``, ``make("robosuite/Lift")``, ``make("gymnasium/…")``."""

from __future__ import annotations

from ript_ray.envs.tasks import MAX_STEPS, SHIFTED, all_task_ids, find_task
from ript_ray.envs.world import World
from ript_ray.errors import UserError, nearest
from ript_ray.plugins import find_named

__all__ = ["World", "all_task_ids", "canonical_name", "find_task", "make"]

_FAMILIES = (*MAX_STEPS, *SHIFTED, "robosuite", "gymnasium")


def make(env_id: str, image_size: int = 128, max_steps: int | None = None) -> World:
    """Make an environment.

    Args:
        env_id: ``suite/index`` or ``suite/name`` of a LIBERO suite (see `all_task_ids`) or of a variant of LIBERO-PRO
            (``libero_object_swap/0``), ``robosuite/Task``, ``gymnasium/Id`` for anything registered with gymnasium, or
            ``module:Class/name`` for a `World` of one's own.
        image_size: height and width of the camera frames in pixels.
        max_steps: step limit; the task's own by default.

    Raises:
        UserError: for an unknown name, with the nearest valid one.
    """
    env_id = canonical_name(env_id)
    family, _, name = env_id.partition("/")
    # Imported late: the simulator takes seconds to import, and most users of this package do not need it.
    if family == "gymnasium":
        from ript_ray.envs.gymnasium_world import GymnasiumWorld

        return GymnasiumWorld(name, image_size, max_steps)
    if family == "robosuite":
        from ript_ray.envs.robosuite_tasks import RobosuiteEnv

        return RobosuiteEnv(name, image_size, max_steps)
    if ":" in family:
        own: World = find_named(family, "env.id")(name, image_size, max_steps)
        return own
    from ript_ray.envs.libero import LiberoEnv

    return LiberoEnv(find_task(env_id), image_size, max_steps)


def canonical_name(env_id: str) -> str:
    """The one name of an environment: ``libero_object/0`` for ``libero_object/pick_up_the_alphabet_soup_…``.

    Raises:
        UserError: for a name that `make` cannot know; gymnasium's and one's own are checked when they are made.
    """
    family, _, name = env_id.partition("/")
    if ":" in family:  # one's own
        return env_id
    if family not in _FAMILIES:
        raise UserError(f"env.id={env_id!r}: unknown suite {family!r}; {nearest(family, _FAMILIES)}")
    if family == "robosuite":
        from ript_ray.envs.tasks import ROBOSUITE_TASKS

        if name not in ROBOSUITE_TASKS:
            raise UserError(f"env.id={env_id!r}: unknown task {name!r}; {nearest(name, ROBOSUITE_TASKS)}")
    elif family != "gymnasium":
        return find_task(env_id).id
    return env_id
