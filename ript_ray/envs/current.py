"""One environment at a time, for whoever goes through several tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from ript_ray.envs import make
from ript_ray.envs.world import World


class CurrentWorld:
    """The environment of the task that was asked for last: there is one at a time, since each takes half a gigabyte.

    Args:
        make: takes the name of a task, the frames' size and the step limit, and makes its environment.
    """

    def __init__(self, make: Callable[[str, int, int | None], World] = make) -> None:
        self._make = make
        self._env_id: str | None = None
        self.world: World | None = None

    def enter(self, env_id: str, image_size: int, max_steps: int | None) -> World:
        """That of this task, which is made unless it is the one from before.

        Raises:
            UserError: when there is no such task.
        """
        if self.world is None or self._env_id != env_id:
            self.close()
            self.world, self._env_id = self._make(env_id, image_size, max_steps), env_id
        return self.world

    def close(self) -> None:
        """Close it, if there is one."""
        if self.world is not None:
            world, self.world = self.world, None  # forgotten even if it fails, or the next one does
            world.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
