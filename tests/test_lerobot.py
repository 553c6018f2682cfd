"""LeRobot datasets and HDF5 demonstrations: what is written is checked, and made, with plain pyarrow and Pillow."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_trajectory
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import launch
from ript_ray.config import DataConfig
from ript_ray.data.demonstrations import read_demonstrations
from ript_ray.data.hdf5 import read_hdf5
from ript_ray.data.lerobot.decode import fit
from ript_ray.data.lerobot.layout import LEROBOT_KEYS, Keys, describe_dataset
from ript_ray.data.lerobot.read import read_dataset
from ript_ray.data.lerobot.write import write_dataset
from ript_ray.envs import find_task
from ript_ray.errors import UserError
from ript_ray.types import Trajectory

VERSIONS = ("v3.0", "v2.1")
ALL_COLUMNS = ("success", "policy_version", "executed_actions", "init_hash", "action_is_pad")


def complete(length: int, seed: int, success: bool = True, size: tuple[int, int] = (8, 12)) -> Trajectory:
    """A trajectory with frames at all steps."""
    trajectory = make_trajectory(length, success, version=seed, seed=seed)
    rng = np.random.default_rng(seed)
    trajectory.frames = rng.integers(0, 256, (length, 2, *size, 3), dtype=np.uint8)
    trajectory.frame_steps = np.arange(length, dtype=np.int32)
    trajectory.state_hashes = rng.integers(2**63, 2**64, length + 1, dtype=np.uint64)
    trajectory.instruction = f"push the “plate” №{seed % 2}"
    return trajectory


def three() -> list[Trajectory]:
    made = [complete(12, 0), complete(60, 1, success=False), complete(9, 2)]
    made[1].labels = made[1].actions * 2
    return made


def files_of(root: Path) -> list[str]:
    return sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file())


def read_all(root: Path, **options: Any) -> list[Trajectory]:
    return list(read_dataset(root, env_id="libero_object/0", **options))


def assert_same(ours: list[Trajectory], theirs: list[Trajectory]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        for name in ("context", "success", "policy_version", "instruction"):
            assert getattr(a, name) == getattr(b, name), name
        for name in ("actions", "labels", "states", "frames", "frame_steps", "state_hashes"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


# Writing and reading again


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_written_can_be_read_again(tmp_path: Path, version: Any) -> None:
    made = three()
    # 3 KiB, so that files roll over.
    write_dataset(tmp_path / "d", made, version=version, columns=ALL_COLUMNS, data_files_size_in_mb=0.003)
    read = read_all(tmp_path / "d")
    for i, (before, after) in enumerate(zip(made, read, strict=True)):
        assert (after.context.env_id, after.context.init_state, after.context.seed) == ("libero_object/0", None, i)
        for name in ("success", "policy_version", "instruction"):
            assert getattr(before, name) == getattr(after, name)
        for name in ("actions", "states", "frames", "frame_steps"):
            np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
            assert getattr(before, name).dtype == getattr(after, name).dtype
        np.testing.assert_array_equal(after.labels, before.actions if before.labels is None else before.labels)
        np.testing.assert_array_equal(after.state_hashes, np.zeros(len(before) + 1, dtype=np.uint64))
        assert (after.tickets, after.scene) == ({}, {})
    assert len([name for name in files_of(tmp_path / "d") if name.startswith("data/")]) == 3


@pytest.mark.parametrize("version", VERSIONS)
def test_a_part_of_a_dataset(tmp_path: Path, version: Any) -> None:
    made = three()
    write_dataset(tmp_path / "d", made, version=version)
    last, sparse = read_all(tmp_path / "d", out=[0], every=7)[::-1]
    np.testing.assert_array_equal(last.states, made[2].states)
    np.testing.assert_array_equal(last.frame_steps, [0, 7])
    np.testing.assert_array_equal(sparse.frames, made[1].frames[::7])
    assert sparse.labels is None
    np.testing.assert_array_equal(sparse.actions, made[1].labels)
    (square,) = read_all(tmp_path / "d", out=[2, 1], image_size=6)
    assert square.frames.shape == (12, 2, 6, 6, 3)
    assert not square.frames[:, :, [0, -1]].any(), "8 × 12 pixels leave black bars above and below"
    assert square.frames[:, :, 1:-1].any(axis=(2, 3)).all()


def test_a_dataset_without_our_columns_is_of_demonstrations(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", [complete(5, 1, success=False)], columns=(), keys=LEROBOT_KEYS)
    (read,) = read_all(tmp_path / "d")
    assert (read.success, read.policy_version, read.labels) == (True, -1, None)
    info = describe_dataset(tmp_path / "d")
    assert (info.version, info.episodes, info.frames, info.fps, info.robot_type) == ("v3.0", 1, 5, 20, "panda")
    assert info.pictures == LEROBOT_KEYS.cameras
    assert info.features["observation.state"].shape == (8,)


def test_features_may_be_named_and_cameras_ordered(tmp_path: Path) -> None:
    wrist_first = Keys(("observation.images.wrist", "observation.images.front"), "joints", "command")
    made = complete(6, 1)
    write_dataset(tmp_path / "d", [made], columns=(), keys=wrist_first)
    assert launch.main(["stats", str(tmp_path / "d"), str(tmp_path / "stats.json")]) == 2
    names = ["data.state=joints", "data.actions=command"]
    assert launch.main(["stats", str(tmp_path / "d"), str(tmp_path / "stats.json"), *names]) == 0
    data = DataConfig(state="joints", actions="command", cameras=tuple(reversed(wrist_first.cameras)))
    (read,) = read_demonstrations(tmp_path / "d", "x", data)
    np.testing.assert_array_equal(read.states, made.states)
    np.testing.assert_array_equal(read.frames, made.frames[:, ::-1])


def test_one_trajectory_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[np.ndarray]] = []

    def made() -> Iterator[Trajectory]:
        for seed in range(5):
            trajectory = complete(10, seed)
            alive.append(weakref.ref(trajectory.frames))
            yield trajectory
            del trajectory
            # The writer's loop still names the one that it has written.
            assert sum(frames() is not None for frames in alive) <= 1

    write_dataset(tmp_path / "d", made())
    read = read_dataset(tmp_path / "d", env_id="x")
    first = weakref.ref(next(read).frames)
    next(read)
    assert first() is None


# What is on disk


@pytest.mark.parametrize("version", VERSIONS)
def test_columns_are_what_lerobot_expects(tmp_path: Path, version: Any) -> None:
    made, root = three(), tmp_path / "d"
    write_dataset(root, made, version=version, columns=ALL_COLUMNS, advantages=lambda i, t: i - len(t) / 2, fps=10)
    info = json.loads((root / "meta/info.json").read_text())
    assert info["codebase_version"] == version
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"], info["fps"]) == (3, 81, 2, 10)
    assert info["splits"] == {"train": "0:3"}
    assert info["features"]["image"] == {"dtype": "image", "shape": [8, 12, 3], "names": ["height", "width", "channel"]}
    assert info["features"]["actions"]["shape"] == [7]
    assert info["features"]["action_is_pad"] == {"dtype": "bool", "shape": [50], "names": ["action_is_pad"]}
    assert info["features"]["init_hash"]["dtype"] == "int64"

    if version == "v3.0":
        paths = [root / "data/chunk-000/file-000.parquet"]
    else:
        paths = [root / f"data/chunk-000/episode_{i:06d}.parquet" for i in range(3)]
    tables = [pq.read_table(path) for path in paths]
    schema = tables[0].schema
    assert set(schema.names) == set(info["features"])
    assert schema.field("actions").type == pa.list_(pa.float32(), 7)
    assert schema.field("success").type == pa.bool_()
    assert schema.field("image").type == pa.struct({"bytes": pa.binary(), "path": pa.string()})
    hints = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert hints["wrist_image"] == {"_type": "Image"}
    assert hints["state"] == {"feature": {"dtype": "float32", "_type": "Value"}, "length": 8, "_type": "Sequence"}
    assert hints["task_index"] == {"dtype": "int64", "_type": "Value"}

    table = pa.concat_tables(tables)
    rows = {name: table.column(name).to_pylist() for name in table.column_names}
    lengths = [12, 60, 9]
    assert rows["index"] == list(range(81))
    assert rows["episode_index"] == [i for i, n in enumerate(lengths) for _ in range(n)]
    assert rows["frame_index"] == [step for n in lengths for step in range(n)]
    assert rows["task_index"] == [0] * 12 + [1] * 60 + [0] * 9
    np.testing.assert_allclose(rows["timestamp"], np.array(rows["frame_index"]) / 10, rtol=1e-6)
    assert rows["success"] == [True] * 12 + [False] * 60 + [True] * 9
    assert rows["policy_version"] == [0] * 12 + [1] * 60 + [2] * 9
    assert rows["advantages"] == [-6.0] * 12 + [-29.0] * 60 + [-2.5] * 9
    hashes = np.array(rows["init_hash"], dtype=np.int64).view(np.uint64)
    np.testing.assert_array_equal(hashes, [t.state_hashes[0] for t in made for _ in range(len(t))])
    np.testing.assert_array_equal(rows["actions"][12:72], made[1].labels)
    np.testing.assert_array_equal(rows["executed_actions"][12:72], made[1].actions)
    assert not any(rows["action_is_pad"][12 + 10])
    assert rows["action_is_pad"][12 + 11] == [False] * 49 + [True]
    png = rows["wrist_image"][12 + 5]["bytes"]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), made[1].frames[5, 1])


def assert_close(stats: Any, values: np.ndarray, exact_quantiles: bool) -> None:
    truth = {name: getattr(values, name)(axis=0) for name in ("min", "max", "mean", "std")}
    if exact_quantiles:
        truth |= {f"q{q:02d}": np.quantile(values, q / 100, axis=0) for q in (1, 10, 50, 90, 99)}
    for name, value in truth.items():
        np.testing.assert_allclose(np.ravel(stats[name]), value, atol=3e-3 if name[0] == "q" else 1e-6, err_msg=name)
    assert stats["count"] == [stats["count"][0]]


def test_metadata_of_v3(tmp_path: Path) -> None:
    made, root = three(), tmp_path / "d"
    write_dataset(root, made, data_files_size_in_mb=0.064)
    assert files_of(root) == [
        "data/chunk-000/file-000.parquet",
        "data/chunk-000/file-001.parquet",
        "meta/episodes/chunk-000/file-000.parquet",
        "meta/info.json",
        "meta/stats.json",
        "meta/tasks.parquet",
    ]
    episodes = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [e["episode_index"] for e in episodes] == [0, 1, 2]
    assert [e["tasks"] for e in episodes] == [[t.instruction] for t in made]
    assert [e["length"] for e in episodes] == [12, 60, 9]
    assert [(e["dataset_from_index"], e["dataset_to_index"]) for e in episodes] == [(0, 12), (12, 72), (72, 81)]
    assert [(e["data/chunk_index"], e["data/file_index"]) for e in episodes] == [(0, 0), (0, 0), (0, 1)]
    assert all(e["meta/episodes/chunk_index"] == e["meta/episodes/file_index"] == 0 for e in episodes)
    for e, t in zip(episodes, made, strict=True):
        assert_close({name: e[f"stats/state/{name}"] for name in _STATS}, t.states.astype(float), True)
        pixels = t.frames[:, 1].reshape(-1, 3) / 255
        assert np.shape(e["stats/wrist_image/mean"]) == (3, 1, 1)
        assert_close({name: e[f"stats/wrist_image/{name}"] for name in _STATS}, pixels, True)
    stats = json.loads((root / "meta/stats.json").read_text())
    assert_close(stats["state"], np.concatenate([t.states for t in made]).astype(float), False)
    assert_close(stats["image"], np.concatenate([t.frames[:, 0] for t in made]).reshape(-1, 3) / 255, False)
    assert stats["image"]["count"] == [81]
    tasks = pq.read_table(root / "meta/tasks.parquet")
    pytest.importorskip("pandas")
    frame = tasks.to_pandas()
    assert [frame.iloc[i].name for i in range(2)] == [made[0].instruction, made[1].instruction]
    assert list(frame["task_index"]) == [0, 1]


_STATS = ("min", "max", "mean", "std", "q01", "q10", "q50", "q90", "q99", "count")


def test_metadata_of_v2(tmp_path: Path) -> None:
    made, root = three(), tmp_path / "d"
    write_dataset(root, made, version="v2.1")
    info = json.loads((root / "meta/info.json").read_text())
    assert (info["total_videos"], info["total_chunks"]) == (0, 1)
    lines = {
        name: [json.loads(line) for line in (root / f"meta/{name}.jsonl").read_text().splitlines()]
        for name in ("tasks", "episodes", "episodes_stats")
    }
    assert lines["tasks"] == [{"task_index": i, "task": made[i].instruction} for i in range(2)]
    assert lines["episodes"][1] == {"episode_index": 1, "tasks": [made[1].instruction], "length": 60}
    assert [record["episode_index"] for record in lines["episodes_stats"]] == [0, 1, 2]
    assert_close(lines["episodes_stats"][2]["stats"]["state"], made[2].states.astype(float), True)


# What cannot be written


def test_missing_frames_are_asked_for(tmp_path: Path) -> None:
    sparse = make_trajectory(25)
    with pytest.raises(UserError, match=r"frames at 3 of its 25 steps.*frames_of"):
        write_dataset(tmp_path / "d", [sparse])
    rendered = np.random.default_rng(0).integers(0, 256, (25, 2, 4, 4, 3), dtype=np.uint8)
    write_dataset(tmp_path / "d", [sparse], frames_of=lambda trajectory: rendered)
    np.testing.assert_array_equal(read_all(tmp_path / "d")[0].frames, rendered)
    with pytest.raises(UserError, match=r"are uint8\[3, 2, 4, 4, 3\], expected uint8\[25, 2, H, W, 3\]"):
        write_dataset(tmp_path / "e", [sparse], frames_of=lambda trajectory: rendered[:3])


def changed(name: str, value: Any, seed: int = 1) -> Trajectory:
    trajectory = complete(10, seed)
    setattr(trajectory, name, value)
    return trajectory


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (changed("states", np.full((10, 8), np.nan, dtype=np.float32)), "'state' of trajectory 1 at step 0 is .*nan"),
        (changed("states", np.zeros((10, 6), dtype=np.float32)), r"float32\[6\] a step, but float32\[8\] in the first"),
        (changed("actions", np.zeros((9, 7), dtype=np.float32)), "trajectory 1"),
        (changed("frames", np.zeros((10, 1, 8, 12, 3), dtype=np.uint8)), "expected uint8.*image, wrist_image"),
        (changed("frames", np.zeros((10, 2, 8, 12, 3), dtype=np.float32)), "are float32"),
        (changed("frames", np.zeros((10, 2, 8, 8, 3), dtype=np.uint8)), r"image\[8, 8, 3\]"),
    ],
)
def test_what_does_not_fit_leaves_nothing_behind(tmp_path: Path, second: Trajectory, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_dataset(tmp_path / "d", [complete(10, 0), second])
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    def broken() -> Iterator[Trajectory]:
        yield complete(10, 0)
        assert not (tmp_path / "d").exists()
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_dataset(tmp_path / "d", broken())
    with pytest.raises(UserError, match="no trajectories"):
        write_dataset(tmp_path / "d", [])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".d.partial").mkdir()  # left by a process that was killed
    (tmp_path / ".d.partial/rest").touch()
    (tmp_path / "d").mkdir()
    write_dataset(tmp_path / "d", [complete(3, 0)])
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    assert "rest" not in files_of(tmp_path / "d")
    with pytest.raises(UserError, match="exists and is not empty"):
        write_dataset(tmp_path / "d", [complete(3, 0)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "v1.6"}, "version is 'v1.6', expected one of v3.0, v2.1"),
        ({"columns": ("sucess",)}, "did you mean 'success'"),
        ({"fps": 0}, "fps is 0"),
        ({"keys": Keys(("image", "image"))}, "keys has 'image'"),
        ({"keys": Keys(state="index")}, "keys has 'index'"),
        ({"keys": Keys(actions="a/b")}, "keys has 'a/b'"),
        ({"advantages": lambda i, t: float("nan")}, "'advantages' of trajectory 0 at step 0 is nan"),
    ],
)
def test_wrong_arguments(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_dataset(tmp_path / "d", [complete(3, 0)], **options)


# Datasets that others wrote


def test_files_and_rows_that_the_list_of_episodes_has_wrong_are_found_all_the_same(tmp_path: Path) -> None:
    """As LeRobot's converter wrote them; neither are tasks in every list, nor integers that pandas had with gaps."""
    made = [complete(12, 0), complete(60, 1), complete(9, 2), complete(30, 3)]
    write_dataset(tmp_path / "it", iter(made), data_files_size_in_mb=0.02)
    assert len(list((tmp_path / "it/data").glob("*/*.parquet"))) >= 3
    (file,) = (tmp_path / "it/meta/episodes").glob("*/*.parquet")
    table = pq.read_table(file)
    files = table["data/file_index"].to_pylist()
    wrong = {
        "data/file_index": [max(0, file - (i and file != files[i - 1])) for i, file in enumerate(files)],
        "dataset_from_index": [0] * len(made),
    }
    assert wrong["data/file_index"] != files
    for name, values in wrong.items():
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values))
    pq.write_table(table.drop_columns(["tasks"]), file)
    data = min((tmp_path / "it/data").glob("*/*.parquet"))
    rows = pq.read_table(data)
    pq.write_table(rows.append_column("__index_level_0__", pa.array(range(rows.num_rows))), data)
    read = list(read_dataset(tmp_path / "it", env_id="libero_object/0"))
    assert [t.instruction for t in read] == [t.instruction for t in made]
    for mine, theirs in zip(made, read, strict=True):
        np.testing.assert_array_equal(theirs.states, mine.states)


def so100(root: Path, films: bool, change: Callable[[dict[str, Any]], None] = lambda columns: None) -> dict[str, Any]:
    """A dataset of an SO100 arm with two episodes, 12 and 8 steps, as LeRobot lays it out; what is in it.

    Lists without a fixed size, one row group over both episodes and, with films, both in one file.
    """
    rng = np.random.default_rng(0)
    truth: dict[str, Any] = {
        "state": rng.uniform(-90, 90, (20, 6)).astype(np.float32),
        "action": rng.uniform(-90, 90, (20, 6)).astype(np.float32),
        "front": np.repeat(np.arange(20, dtype=np.uint8) * 12, 16 * 32 * 3).reshape(20, 16, 32, 3),
    }
    motors = [
        f"{name}.pos" for name in ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
    ]
    camera = "observation.images.front"
    vector = {"dtype": "float32", "shape": [6], "names": motors}
    info = {
        "codebase_version": "v3.0",
        "robot_type": "so100_follower",
        "total_episodes": 2,
        "total_frames": 20,
        "total_tasks": 1,
        "chunks_size": 1000,
        "fps": 30,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": {
            "action": vector,
            "observation.state": vector,
            camera: {"dtype": "video" if films else "image", "shape": [16, 32, 3], "names": None},
            **{n: {"dtype": "int64", "shape": [1]} for n in ("frame_index", "episode_index", "index", "task_index")},
        },
    }
    columns: dict[str, Any] = {
        "action": truth["action"].tolist(),
        "observation.state": truth["state"].tolist(),
        "frame_index": [*range(12), *range(8)],
        "episode_index": [0] * 12 + [1] * 8,
        "index": list(range(20)),
        "task_index": [0] * 20,
    }
    for folder in ("data/chunk-000", "meta/episodes/chunk-000", f"videos/{camera}/chunk-000"):
        (root / folder).mkdir(parents=True)
    if films:
        film = root / f"videos/{camera}/chunk-000/file-000.mp4"
        iio.imwrite(film, truth["front"], fps=30, macro_block_size=16, plugin="FFMPEG")
    else:
        columns[camera] = [{"bytes": png(frame), "path": None} for frame in truth["front"]]
    change(columns | {"info": info})
    pq.write_table(pa.table(columns), root / "data/chunk-000/file-000.parquet")
    (root / "meta/info.json").write_text(json.dumps(info))
    # The name that pandas gives to an index without one.
    tasks = pa.table({"task_index": [0], "__index_level_0__": ["pick the cube"]})
    pq.write_table(tasks, root / "meta/tasks.parquet")
    episodes = {
        "episode_index": [0, 1],
        "tasks": [["pick the cube"]] * 2,
        "length": [12, 8],
        "data/chunk_index": [0, 0],
        "data/file_index": [0, 0],
        "dataset_from_index": [0, 12],
        "dataset_to_index": [12, 20],
        f"videos/{camera}/chunk_index": [0, 0],
        f"videos/{camera}/file_index": [0, 0],
        f"videos/{camera}/from_timestamp": [0.0, 12 / 30],
    }
    pq.write_table(pa.table(episodes), root / "meta/episodes/chunk-000/file-000.parquet")
    return truth


def png(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("films", [False, True])
def test_a_dataset_of_an_so100(tmp_path: Path, films: bool) -> None:
    truth = so100(tmp_path, films)
    first, second = read_all(tmp_path)
    np.testing.assert_array_equal(np.concatenate([first.states, second.states]), truth["state"])
    np.testing.assert_array_equal(second.actions, truth["action"][12:])
    assert second.frames.shape == (8, 1, 16, 32, 3)
    # A step is 12 levels; compression costs some.
    tolerance = 4 if films else 0
    np.testing.assert_allclose(second.frames[:, 0].astype(int), truth["front"][12:], atol=tolerance)
    assert (first.instruction, first.success, second.context.seed) == ("pick the cube", True, 1)
    (sparse,) = read_all(tmp_path, out=[0], every=3)
    np.testing.assert_allclose(sparse.frames[:, 0].astype(int), truth["front"][12::3], atol=tolerance)


def test_v2_0_is_read_as_v2_1(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", three(), version="v2.1")
    replaced(tmp_path / "d/meta/info.json", '"v2.1"', '"v2.0"')
    (tmp_path / "d/meta/episodes_stats.jsonl").unlink()
    assert len(read_all(tmp_path / "d")) == 3


def test_a_film_that_cannot_be_decoded(tmp_path: Path) -> None:
    so100(tmp_path, films=True)
    (film,) = tmp_path.rglob("*.mp4")
    whole = film.read_bytes()
    film.write_bytes(whole[:100])
    with pytest.raises(UserError, match=r"file-000\.mp4 cannot be read"):
        read_all(tmp_path)
    iio.imwrite(film, np.zeros((15, 16, 32, 3), dtype=np.uint8), fps=30, plugin="FFMPEG")
    with pytest.raises(UserError, match="has 15 frames, but an episode needs frame 15"):
        read_all(tmp_path)
    film.unlink()
    with pytest.raises(UserError, match=r"file-000\.mp4 is missing"):
        read_all(tmp_path)


def set_cell(name: str, row: int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(columns: dict[str, Any]) -> None:
        columns[name][row] = value

    return change


def set_feature(name: str, **entries: Any) -> Callable[[dict[str, Any]], None]:
    return lambda columns: columns["info"]["features"][name].update(entries)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_cell("action", 13, [0.0] * 5 + [float("inf")]), r"episode 1: action\[5\] at step 1 is inf"),
        (set_cell("action", 13, [0.0] * 5 + [1e300]), "expected a finite float32"),
        (set_cell("action", 13, [0.0] * 5), "says 6 numbers in each row"),
        (set_cell("action", 13, None), "with 1 empty rows"),
        (set_cell("action", 13, [None] * 6), "says 6 numbers"),
        (set_cell("task_index", 13, 7), r"has tasks \[0, 7\]"),
        (set_cell("frame_index", 13, 5), "should have frames 0 to 7 in rows 12 to 19"),
        (set_cell("episode_index", 13, 0), "should have frames 0 to 7"),
        (set_cell("episode_index", 13, None), "expected a whole number in each row"),
        (set_cell("observation.images.front", 13, {"bytes": b"PNG", "path": None}), "no image that can be decoded"),
        (set_cell("observation.images.front", 13, {"bytes": None, "path": "x.png"}), "holds no bytes of an image"),
        (
            set_cell("observation.images.front", 13, {"bytes": png(np.zeros((4, 4, 3), np.uint8)), "path": None}),
            r"\(4, 4\)",
        ),
        (set_feature("action", shape=[7]), "says 7 numbers in each row"),
        (set_feature("action", shape=[0]), "expected whole numbers above 0"),
        (set_feature("action", shape=[2, 3]), "expected a vector"),
        (set_feature("observation.images.front", shape=[32, 16, 3]), "is .16, 32. pixels, but .* says .32, 16."),
        (set_feature("observation.images.front", shape=[32, 16]), "expected .height, width, 3."),
        (lambda columns: columns["info"].update(codebase_version="v3.7"), "codebase_version is 'v3.7'"),
        (lambda columns: columns["info"].update(data_path="../{chunk_index}{file_index}"), "leads out of the dataset"),
        (lambda columns: columns["info"].update(data_path="data/{episode}"), "does not fit"),
        (lambda columns: columns["info"].update(fps=0), "fps is 0"),
        (lambda columns: columns["info"].update(total_frames=21), "21 frames, the list of episodes 20"),
        (lambda columns: columns["info"].update(total_episodes=3), "3 episodes, the list of episodes has 2"),
        (lambda columns: columns["info"]["features"].pop("action"), "neither openpi's names .* set data.actions"),
        (
            lambda columns: columns["info"]["features"].update(success={"dtype": "bool", "shape": [1]}),
            "no column 'success'",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    so100(tmp_path, films=False, change=change)
    with pytest.raises(UserError, match=message):
        read_all(tmp_path)


def test_wrong_choices_are_named(tmp_path: Path) -> None:
    so100(tmp_path, films=False)
    for options, message in (
        ({"out": [0, 2]}, "has no episode 2, only 0 to 1"),
        ({"every": 0}, "every is 0"),
        ({"image_size": 0}, "image_size is 0"),
        ({"names": {"cameras": ("front",)}}, "has no feature 'front'"),
        ({"names": {"cameras": ("action",)}}, "expected image or video"),
    ):
        with pytest.raises(UserError, match=message):
            read_dataset(tmp_path, env_id="x", **options)
    with pytest.raises(UserError, match="no LeRobot dataset at"):
        read_dataset(tmp_path / "meta", env_id="x")


def test_cameras_of_different_sizes(tmp_path: Path) -> None:
    """They become squares of the longest side, which leaves a camera that has it as it is but for bars."""
    made = complete(4, 0, size=(8, 12))
    write_dataset(tmp_path / "d", [made])
    other = np.random.default_rng(1).integers(0, 256, (4, 6, 8, 3), dtype=np.uint8)
    (file,) = (tmp_path / "d/data").rglob("*.parquet")
    table = pq.read_table(file)
    name = "wrist_image"
    cells = pa.array([{"bytes": png(frame), "path": None} for frame in other], table.schema.field(name).type)
    pq.write_table(table.set_column(table.column_names.index(name), table.schema.field(name), cells), file)
    info = json.loads((tmp_path / "d/meta/info.json").read_text())
    info["features"][name]["shape"] = [6, 8, 3]
    (tmp_path / "d/meta/info.json").write_text(json.dumps(info))
    (read,) = read_all(tmp_path / "d")
    assert read.frames.shape == (4, 2, 12, 12, 3)
    np.testing.assert_array_equal(read.frames[:, 0, 2:10], made.frames[:, 0])
    assert not read.frames[:, 0, [0, 1, 10, 11]].any()
    scaled = [np.asarray(Image.fromarray(frame).resize((12, 9), Image.Resampling.BILINEAR)) for frame in other]
    np.testing.assert_array_equal(read.frames[:, 1, 1:10], scaled)


def test_frames_that_nobody_needs_are_not_read(tmp_path: Path) -> None:
    made = complete(5, 0)
    write_dataset(tmp_path / "d", [made])
    (file,) = (tmp_path / "d/data").rglob("*.parquet")
    columns = pq.read_table(file).to_pydict()
    columns["image"][0] = {"bytes": b"PNG", "path": None}
    pq.write_table(pa.table(columns, pq.read_schema(file)), file)
    (read,) = read_all(tmp_path / "d", frames=False)
    assert (read.frames.size, read.frame_steps.size) == (0, 0)
    np.testing.assert_array_equal(read.states, made.states)
    assert launch.main(["stats", str(tmp_path / "d"), str(tmp_path / "stats.json")]) == 0
    found = json.loads((tmp_path / "stats.json").read_text())["norm_stats"]
    np.testing.assert_allclose(found["state"]["mean"], made.states.mean(0), rtol=1e-5)


# Damage


def replaced(file: Path, old: str, new: str, count: int = -1) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, count))


@pytest.fixture(scope="module", params=VERSIONS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Trajectory]]:
    """A dataset, which tests leave as it is, and what is in it."""
    root = tmp_path_factory.mktemp("written") / "d"
    made = [complete(9, 0, size=(4, 4)), complete(12, 1, success=False, size=(4, 4))]
    made[0].labels = made[0].actions / 2
    columns = ("success", "policy_version", "executed_actions")
    write_dataset(root, made, version=request.param, columns=columns, data_files_size_in_mb=0.001)
    return root, read_all(root)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damage_is_an_error_or_changes_nothing(written: tuple[Path, list[Trajectory]], data: st.DataObject) -> None:
    root, truth = written
    file = root / data.draw(st.sampled_from(files_of(root)))
    whole = file.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        damaged = whole[:at]
    else:
        damaged = bytes([*whole[:at], whole[at] ^ data.draw(st.integers(1, 255)), *whole[at + 1 :]])
    file.write_bytes(damaged)
    try:
        with contextlib.suppress(UserError):
            assert_same(read_all(root), truth)
    finally:
        file.write_bytes(whole)


def test_every_file_and_every_key_that_is_read_is_needed(written: tuple[Path, list[Trajectory]]) -> None:
    root, truth = written
    unread = ("meta/stats.json", "meta/episodes_stats.jsonl")
    for name in files_of(root):
        (root / name).rename(root / "away")
        if name in unread:
            assert_same(read_all(root), truth)
        else:
            with pytest.raises(UserError, match=str(root)):
                read_all(root)
        (root / "away").rename(root / name)
    file = root / "meta/info.json"
    whole = file.read_text()
    info = json.loads(whole)
    unread = ("robot_type", "total_tasks", "splits", "total_videos", "total_chunks", "data_files_size_in_mb")
    for name in set(info) - {*unread, "video_files_size_in_mb", "video_path"}:
        file.write_text(json.dumps({key: value for key, value in info.items() if key != name}))
        with pytest.raises(UserError, match=name):
            read_all(root)
    file.write_text(whole)


@pytest.mark.parametrize("name", ["success", "state", "frame_index"])
def test_a_column_that_only_one_side_knows(written: tuple[Path, list[Trajectory]], name: str) -> None:
    root, _ = written
    file = next((root / "data").rglob("*.parquet"))
    whole = file.read_bytes()
    table = pq.read_table(file)
    pq.write_table(table.drop_columns([name]), file)
    with pytest.raises(UserError, match=f"no column '{name}'"):
        read_all(root)
    file.write_bytes(whole)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [('"wrist_image":', '"wrisu_image":', "a column 'wrist_image'"), ('"dtype": "image"', '"dtype": "imbge"', "imbge")],
)
def test_a_camera_that_is_misspelt(written: tuple[Path, list[Trajectory]], old: str, new: str, message: str) -> None:
    root, _ = written
    file = root / "meta/info.json"
    whole = file.read_text()
    replaced(file, old, new, count=1)
    with pytest.raises(UserError, match=message):
        read_all(root)
    file.write_text(whole)


# LIBERO's HDF5 files


def test_hdf5_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match="pip install h5py"):
        read_hdf5(tmp_path / "x.hdf5", env_id="x")


def libero_file(path: Path, convention: str | None = "opengl") -> list[dict[str, np.ndarray]]:
    """Three demonstrations as LIBERO's create_dataset.py writes them: row i is what action i led to."""
    h5py = pytest.importorskip("h5py", reason="h5py, which reads HDF5, is not installed")
    rng = np.random.default_rng(0)
    demos = []
    with h5py.File(path, "w") as file:
        group = file.create_group("data")
        group.attrs["problem_info"] = json.dumps({"language_instruction": "open the drawer"})
        if convention is not None:
            group.attrs["macros_image_convention"] = convention
        for i in (0, 10, 2):  # h5py lists demo_10 before demo_2
            demo = {
                "actions": rng.uniform(-1, 1, (6 + i, 7)),
                "obs/ee_states": rng.normal(size=(6 + i, 6)),
                "obs/gripper_states": rng.normal(size=(6 + i, 2)),
                "obs/agentview_rgb": rng.integers(0, 256, (6 + i, 8, 8, 3), dtype=np.uint8),
                "obs/eye_in_hand_rgb": rng.integers(0, 256, (6 + i, 8, 8, 3), dtype=np.uint8),
            }
            for name, value in demo.items():
                group[f"demo_{i}/{name}"] = value
            demos.append(demo)
    return [demos[0], demos[2], demos[1]]


def test_hdf5_demonstrations(tmp_path: Path) -> None:
    path = tmp_path / "x_demo.hdf5"
    demos = libero_file(path)
    read = list(read_hdf5(path, env_id="libero_goal/0", every=3))
    assert [t.context.seed for t in read] == [0, 2, 10]
    for demo, t in zip(demos, read, strict=True):
        assert (t.instruction, t.success, t.policy_version, t.tickets) == ("open the drawer", True, -1, {})
        np.testing.assert_array_equal(t.actions, demo["actions"][1:].astype(np.float32))
        np.testing.assert_array_equal(t.states[:, :6], demo["obs/ee_states"][:-1].astype(np.float32))
        np.testing.assert_array_equal(t.states[:, 6:], demo["obs/gripper_states"][:-1].astype(np.float32))
        np.testing.assert_array_equal(t.frame_steps, np.arange(0, len(t), 3))
        np.testing.assert_array_equal(t.frames[1, 0], demo["obs/agentview_rgb"][3][::-1, ::-1])
        np.testing.assert_array_equal(t.frames[0, 1], demo["obs/eye_in_hand_rgb"][0][::-1, ::-1])
        assert t.state_hashes.shape == (len(t) + 1,)
    first = next(read_hdf5(path, env_id="x", observed="before", instruction="do it"))
    np.testing.assert_array_equal(first.actions, demos[0]["actions"].astype(np.float32))
    np.testing.assert_array_equal(first.frames[5, 0], demos[0]["obs/agentview_rgb"][5][::-1, ::-1])
    assert first.instruction == "do it"
    with importlib.import_module("h5py").File(path, "r+") as file:
        for name in list(file["data"].attrs):
            del file["data"].attrs[name]  # as in files that were made again by replaying
    with pytest.raises(UserError, match=r"set data\.observed=before or after"):
        read_hdf5(path, env_id="x", instruction="do it")
    replayed = next(read_hdf5(path, env_id="x", observed="before", instruction="do it"))
    np.testing.assert_array_equal(replayed.actions, first.actions)
    demos = libero_file(path, "opencv")
    upright = next(read_hdf5(path, env_id="x")).frames[0, 0]
    np.testing.assert_array_equal(upright, demos[0]["obs/agentview_rgb"][0][:, ::-1])


@pytest.mark.parametrize("how", ["damaged", "missing"])
def test_episodes_of_a_file_that_is_not_whole_may_be_left_out(how: str, tmp_path: Path) -> None:
    made = [complete(12, 0), complete(60, 1), complete(9, 2), complete(30, 3)]
    write_dataset(tmp_path / "it", iter(made), data_files_size_in_mb=0.02)
    files = sorted((tmp_path / "it/data").glob("*/*.parquet"))
    gone = sorted(set(pq.read_table(files[1])["episode_index"].to_pylist()))
    assert len(files) >= 3
    if how == "missing":
        files[1].unlink()
    else:
        files[1].write_bytes(files[1].read_bytes()[:100])
    read = list(read_dataset(tmp_path / "it", env_id="x", out=gone))
    assert [t.context.seed for t in read] == [i for i in range(len(made)) if i not in gone]
    with pytest.raises(UserError, match=files[1].name):
        list(read_dataset(tmp_path / "it", env_id="x"))


def test_frames_of_hdf5_demonstrations_are_scaled_as_those_of_datasets(tmp_path: Path) -> None:
    path = tmp_path / "x_demo.hdf5"
    libero_file(path)
    whole = list(read_demonstrations(path, "libero_goal/0"))
    scaled = list(read_demonstrations(path, "libero_goal/0", image_size=16))
    for before, after in zip(whole, scaled, strict=True):
        assert after.frames.shape == (len(before), 2, 16, 16, 3)
        np.testing.assert_array_equal(after.frames[0, 1], fit(before.frames[0, 1], 16))
        np.testing.assert_array_equal(after.actions, before.actions)


def test_hdf5_demonstrations_say_what_rollouts_are_told(tmp_path: Path) -> None:
    task = find_task("libero_object/0")  # of which the goal file says "pick the alphabet soup and …"
    for name, said in ((task.name, task.instruction), ("mine", "open the drawer")):
        libero_file(tmp_path / f"{name}_demo.hdf5")
        read = read_demonstrations(tmp_path / f"{name}_demo.hdf5", task.id)
        assert {demo.instruction for demo in read} == {said}


def test_hdf5_files_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "x_demo.hdf5"
    libero_file(path)
    whole = path.read_bytes()
    import h5py

    def changing(change: Callable[[Any], None]) -> list[Trajectory]:
        path.write_bytes(whole)
        with h5py.File(path, "r+") as file:
            change(file["data"])
        return list(read_hdf5(path, env_id="x"))

    def swap(name: str, value: np.ndarray) -> Callable[[Any], None]:
        def change(data: Any) -> None:
            del data[name]
            data[name] = value

        return change

    for change, message in (
        (lambda data: data.pop("demo_0/actions"), "demo_0 has no dataset 'actions'"),
        (lambda data: data.pop("demo_2/obs"), "demo_2 has no dataset 'obs/"),
        (lambda data: [data.pop(name) for name in list(data)], "has no data/demo_0"),
        (lambda data: data.attrs.pop("problem_info"), "pass instruction="),
        (lambda data: data.attrs.update(macros_image_convention="x"), "expected opengl or opencv"),
        (swap("demo_0/obs/ee_states", np.zeros((6, 5))), r"expected floats\[6, 6\]"),
        (swap("demo_0/actions", np.full((6, 7), np.nan)), "demo_0/actions, row 0 is"),
        (swap("demo_0/obs/agentview_rgb", np.zeros((6, 8, 8, 3))), "is float64"),
        (lambda data: data.move("demo_0", "demo_x"), "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            changing(change)
    for end in range(0, len(whole) - 1, 997):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match=r"x_demo\.hdf5"):
            list(read_hdf5(path, env_id="x"))
    for options, message in (({"every": 0}, "every is 0"), ({"observed": "now"}, "expected 'after' or 'before'")):
        with pytest.raises(UserError, match=message):
            read_hdf5(path, env_id="x", **options)
    with pytest.raises(UserError, match="absent is missing"):
        read_hdf5(tmp_path / "absent", env_id="x")
