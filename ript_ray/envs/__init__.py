"""Environments by name: ``make("libero_object/0")``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ript_ray.envs.tasks import all_task_ids, find_task

if TYPE_CHECKING:
    from ript_ray.envs.libero import LiberoEnv

__all__ = ["all_task_ids", "find_task", "make"]


def make(env_id: str, image_size: int = 128, max_steps: int | None = None) -> LiberoEnv:
    """Make a LIBERO environment.

    Args:
        env_id: ``suite/index`` or ``suite/name``; see `all_task_ids`.
        image_size: height and width of the camera frames in pixels.
        max_steps: step limit; the suite's official one by default.

    Raises:
        UserError: for an unknown name, with the nearest valid one.
    """
    task = find_task(env_id)
    # Imported late: the simulator takes seconds to import, and most users of this package do not need it.
    from ript_ray.envs.libero import LiberoEnv

    return LiberoEnv(task, image_size=image_size, max_steps=max_steps)
