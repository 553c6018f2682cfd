"""LeRobot datasets, v2.0, v2.1 and v3.0, as trajectories: one episode and one row group in memory at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa

from ript_ray.data.lerobot.decode import Film, Rows, decode_image, decode_integers, decode_vectors, fit
from ript_ray.data.lerobot.episodes import Place, find_episodes, load_instructions
from ript_ray.data.lerobot.layout import COPY_AGAIN, OPENPI_KEYS, PICTURES, DatasetInfo, Keys, describe_dataset
from ript_ray.errors import UserError, nearest
from ript_ray.types import Context, Trajectory

_EXECUTED = "executed_actions"
_OUTCOMES = ("success", "next.success")
_OPTIONAL = (_EXECUTED, "policy_version", *_OUTCOMES)


def read_dataset(
    root: Path,
    *,
    env_id: str,
    names: Mapping[str, Any] = MappingProxyType({}),
    every: int = 1,
    out: Collection[int] = (),
    image_size: int | None = None,
    frames: bool = True,
) -> Iterator[Trajectory]:
    """The episodes of a LeRobot dataset, in order.

    What the dataset does not know is empty: trajectories have no tickets, no scene and hashes of zeros, so no frames
    but theirs can be had. Without a column ``success`` every episode is one; without ``policy_version`` it is −1.
    Where there is a column ``executed_actions``, those are the actions and the others, which are to be imitated, the
    labels.

    Args:
        root: the folder that contains meta/ and data/.
        env_id: task that the contexts name; their seed is the episode's index.
        names: of the features, as the fields of `Keys`; where one is None or missing, openpi's (``image``,
            ``wrist_image``, ``state``, ``actions``) or LeRobot's (``observation.images.*`` in their order,
            ``observation.state``, ``action``) are recognised.
        every: keep only the frames of every so-many-th step.
        out: indices of episodes that are left out.
        image_size: scale frames to this height and width, with black bars if they are not square; by default they stay
            as they are, or, where the cameras differ in size, become squares of the longest side.
        frames: False leaves the cameras unread; trajectories have no frames then.

    Raises:
        UserError: when something is missing, damaged or not as described: in the metadata at once, in an episode's
            data when its turn comes.
    """
    info = describe_dataset(root)
    for name, value in (("every", every), ("image_size", image_size)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}, expected 1 or more")
    keys = _checked(info, _recognised(info, {field: name for field, name in names.items() if name}))
    keys = keys if frames else replace(keys, cameras=())
    places = find_episodes(info, [name for name in keys.cameras if info.features[name].dtype == "video"])
    if unknown := sorted(set(out) - {place.episode for place in places}):
        raise UserError(f"data.leave_out: {root} has no episode {unknown[0]}, only 0 to {len(places) - 1}")
    read = [place for place in places if place.episode not in set(out)]
    return _Reader(info, keys, env_id, every, image_size).trajectories(read)


class _Reader:
    """Makes trajectories of places."""

    def __init__(self, info: DatasetInfo, keys: Keys, env_id: str, every: int, image_size: int | None) -> None:
        self._info, self._keys, self._env_id = info, keys, env_id
        self._every = every
        self._instructions = load_instructions(info)
        self._sizes = {camera: info.frame_size(camera) for camera in keys.cameras}
        if image_size is None and len(set(self._sizes.values())) > 1:
            image_size = max(max(size) for size in self._sizes.values())
        self._image_size = image_size
        self._films: dict[str, Film] = {}

    def trajectories(self, places: Iterable[Place]) -> Iterator[Trajectory]:
        rows: Rows | None = None
        try:
            for place in places:
                if rows is None or rows.path != place.data:
                    rows = Rows(place.data, self._columns(), self._info.features)
                yield self._trajectory(place, rows.read(place.first_row, place.length))
        finally:
            for film in self._films.values():
                film.close()

    def _columns(self) -> list[str]:
        features = self._info.features
        stored = [name for name in self._keys.cameras if features[name].dtype == "image"]
        required = ["episode_index", "frame_index", "task_index", self._keys.state, self._keys.actions]
        return [*required, *stored, *(name for name in _OPTIONAL if name in features)]

    def _trajectory(self, place: Place, table: pa.Table) -> Trajectory:
        where = f"{place.data}: episode {place.episode}"
        _check_rows(place, table, where)
        steps = np.arange(0, place.length if self._keys.cameras else 0, self._every, dtype=np.int32)
        actions = self._vectors(table, self._keys.actions, where)
        executed = self._vectors(table, _EXECUTED, where) if _EXECUTED in table.column_names else None
        outcomes = [decode_vectors(table, name, 1, where) for name in _OUTCOMES if name in table.column_names]
        versioned = "policy_version" in table.column_names
        return Trajectory(
            context=Context(self._env_id, None, seed=place.episode),
            policy_version=int(decode_integers(table, "policy_version", where)[0]) if versioned else -1,
            success=bool(outcomes[0].any()) if outcomes else True,
            actions=actions if executed is None else executed,
            labels=None if executed is None else actions,
            states=self._vectors(table, self._keys.state, where),
            frames=self._frames(place, table, steps, where),
            frame_steps=steps,
            tickets={},
            scene={},
            state_hashes=np.zeros(place.length + 1, dtype=np.uint64),
            instruction=self._instruction(place, table, where),
        )

    def _vectors(self, table: pa.Table, name: str, where: str) -> np.ndarray:
        return decode_vectors(table, name, self._info.features[name].shape[0], where)

    def _instruction(self, place: Place, table: pa.Table, where: str) -> str:
        indices = sorted(set(decode_integers(table, "task_index", where).tolist()))
        if len(indices) > 1:
            raise UserError(f"{where} has tasks {indices}, expected one an episode; leave it out: data.leave_out")
        text = self._instructions.get(indices[0])
        if text is None or (place.tasks and text not in place.tasks):
            raise UserError(
                f"{where} has task_index {indices[0]}, which is {text!r}, but the list of episodes says "
                f"{list(place.tasks)}; {COPY_AGAIN}"
            )
        return text

    def _frames(self, place: Place, table: pa.Table, steps: np.ndarray, where: str) -> np.ndarray:
        """What the cameras saw before the steps: uint8[n, C, H, W, 3]."""
        cameras = self._keys.cameras
        frames = np.empty(0, dtype=np.uint8)
        for c, camera in enumerate(cameras):
            for i, step in enumerate(steps.tolist()):
                frame = self._frame(place, table, camera, step, where)
                if not frames.size:  # now that there is a frame as large as the metadata says
                    frames = np.empty((len(steps), len(cameras), *frame.shape), dtype=np.uint8)
                frames[i, c] = frame
        return frames

    def _frame(self, place: Place, table: pa.Table, camera: str, step: int, where: str) -> np.ndarray:
        if self._info.features[camera].dtype == "video":
            path, first = place.films[camera]
            where, frame = str(path), self._film(camera, path, first + step).frame(first + step)
        else:
            where = f"{where}, {camera!r} at step {step}"
            frame = decode_image(table.column(camera)[step].as_py(), where)
        size = self._sizes[camera]
        if frame.shape[:2] != size:
            raise UserError(f"{where} is {frame.shape[:2]} pixels, but meta/info.json says {size}; {COPY_AGAIN}")
        return frame if self._image_size is None else fit(frame, self._image_size)

    def _film(self, camera: str, path: Path, index: int) -> Film:
        """The film, wound to the frame of an index or before it."""
        film = self._films.get(camera)
        if film is None or film.path != path or film.position > index:
            if film is not None:
                film.close()
            film = self._films[camera] = Film(path)
        return film


def _recognised(info: DatasetInfo, known: Mapping[str, Any]) -> Keys:
    if {"state", "actions"} <= set(info.features):
        keys = Keys(tuple(name for name in OPENPI_KEYS.cameras if name in info.features))
    else:
        cameras = tuple(name for name in info.features if name.startswith("observation.image"))
        keys = Keys(cameras, "observation.state", "action")
    keys = replace(keys, **known)
    found = {"cameras": keys.cameras, "state": keys.state in info.features, "actions": keys.actions in info.features}
    unknown = [f"data.{field}" for field in found if not found[field] and field not in known]
    if unknown:
        raise UserError(
            f"{info.root}: its features have neither openpi's names nor LeRobot's: {', '.join(info.features)}; say "
            f"which is what: set {', '.join(unknown)}"
        )
    return keys


def _checked(info: DatasetInfo, keys: Keys) -> Keys:
    for name in (*keys.cameras, keys.state, keys.actions):
        if name not in info.features:
            raise UserError(f"{info.root} has no feature {name!r}; {nearest(name, info.features)}")
    for name in (keys.state, keys.actions, *({_EXECUTED} & set(info.features))):
        if len(info.features[name].shape) != 1 or name in info.pictures:
            raise UserError(f"{info.root}: {name!r} is {info.features[name]}, expected a vector")
    for name in keys.cameras:
        if name not in info.pictures:
            raise UserError(f"{info.root}: {name!r} is {info.features[name]}, expected {' or '.join(PICTURES)}")
    return keys


def _check_rows(place: Place, table: pa.Table, where: str) -> None:
    """Whether these rows are this episode's."""
    of, steps = decode_integers(table, "episode_index", where), decode_integers(table, "frame_index", where)
    if (of != place.episode).any() or (steps != np.arange(place.length)).any():
        raise UserError(
            f"{where} should have frames 0 to {place.length - 1} in rows {place.first_row} to "
            f"{place.first_row + place.length - 1}; these go from frame {steps[0]} of episode {of[0]} to frame "
            f"{steps[-1]} of episode {of[-1]}; {COPY_AGAIN}"
        )
