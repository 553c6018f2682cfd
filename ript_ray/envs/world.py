"""What every environment offers: gymnasium's interface, plus frames that can be made later, elsewhere, or never."""

from __future__ import annotations

import abc
from collections.abc import Callable, ItemsView, ValuesView
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from ript_ray.errors import UserError

Ticket = dict[str, np.ndarray]
"""All that a frame depends on, by name. Equal tickets give equal bytes, in any process with the same task."""


class LazyObservation(dict[str, Any]):
    """An observation dictionary whose camera frames are rendered at first reading and then kept.

    Pickling renders, so that what arrives elsewhere is complete.

    Args:
        values: everything but the frames.
        cameras: keys of the frames.
        ticket: what the frames depend on.
        render: makes the frame of a ticket and a camera.
    """

    def __init__(
        self,
        values: dict[str, Any],
        cameras: tuple[str, ...],
        ticket: Ticket,
        render: Callable[[Ticket, str], np.ndarray],
    ) -> None:
        super().__init__({key: None for key in cameras} | values)
        self.cameras = cameras
        self.ticket = ticket
        self._render = render

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if value is None and key in self.cameras:
            value = self._render(self.ticket, key)
            self[key] = value
        return value

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401  (dict.get would not render)

    def rendered(self) -> dict[str, Any]:
        """A plain dictionary with all frames."""
        return {key: self[key] for key in self}

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        return self.rendered().values()

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        return self.rendered().items()

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self.rendered(),)


class World(gym.Env[LazyObservation, np.ndarray], abc.ABC):
    """One task. Observations are dictionaries with a frame for each of `cameras`, ``state`` and ``instruction``.

    `reset` takes ``options={"init_state": i}``. Success ends an episode with reward 1 and ``info["success"]``.
    """

    id: str
    """Name for `ript_ray.envs.make`, for example ``libero_object/0``."""
    instruction: str
    max_steps: int
    """Step limit of an episode."""
    cameras: tuple[str, ...]
    """Observation keys of the frames; the first is the one that people want to see."""
    frames_are_mirrored: bool = False
    """Do frames have to be turned left to right to look right?"""
    state_dim: int
    action_dim: int
    num_init_states: int
    """How many initial states `reset` knows by number."""
    physics_seconds: float = 0.0
    """Seconds spent in `reset` and `step` since construction."""
    elapsed_steps: int = 0
    """Steps since the last reset."""
    guard: Callable[[str], AbstractContextManager[None]] = staticmethod(lambda operation: nullcontext())
    """Entered with the name of each operation of the simulator, so that somebody outside can watch it."""

    @abc.abstractmethod
    def scene(self) -> Ticket:
        """The part of every ticket that is constant over an episode."""

    @abc.abstractmethod
    def render_ticket(self, ticket: Ticket, camera: str, size: int | None = None) -> np.ndarray:
        """The frame of a ticket of this task: uint8[size, size, 3], of the observations' size by default."""

    @abc.abstractmethod
    def state_hash(self) -> int:
        """64-bit fingerprint of the simulator's state."""

    @property
    def expert(self) -> Callable[[], np.ndarray] | None:
        """What an expert would do now, in the environment's own units: it makes demonstrations. None: nobody knows."""
        return None

    def to_policy_units(self, action: np.ndarray) -> np.ndarray:
        """An action in the environment's own units as one that `step` takes: float32[action_dim]."""
        return action.astype(np.float32)

    @property
    def render_seconds(self) -> float:
        """Seconds spent rendering since construction, where rendering is put off."""
        return 0.0

    @property
    def frames_rendered(self) -> int:
        """Frames rendered since construction."""
        return 0


class ResetOptions(NamedTuple):
    """What `reset` may be asked for."""

    init_state: int | None = None
    """Start from this known initial state."""
    disturb_arm: bool = False
    """Without one: vary the arm's joints as the benchmark's initial states do, where the world's own reset does not."""


def check_options(options: dict[str, Any] | None, world: World) -> ResetOptions:
    """What the reset options ask for.

    Raises:
        UserError: for an unknown option or a state that does not exist.
    """
    for name in options or {}:
        if name not in ResetOptions._fields:
            raise UserError(f"reset option {name!r} is unknown; valid: {', '.join(ResetOptions._fields)}")
    wanted = ResetOptions(**(options or {}))
    init_state = wanted.init_state
    if init_state is not None and not 0 <= init_state < world.num_init_states:
        raise UserError(
            f"init_state={init_state}: {world.id} has states 0 to {world.num_init_states - 1}; set "
            "env.train_init_states and env.eval_init_states within them"
        )
    return wanted


def check_action(action: np.ndarray, size: int) -> np.ndarray:
    """``action`` as float64[size].

    Raises:
        ValueError: when it has another shape or is not finite.
    """
    action = np.asarray(action, dtype=np.float64)
    if action.shape != (size,) or not np.isfinite(action).all():
        raise ValueError(f"action must be {size} finite numbers, got shape {action.shape}: {action}")
    return action
