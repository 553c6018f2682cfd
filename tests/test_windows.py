import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_trajectory

from ript_ray.config import Config
from ript_ray.data.shards import make_shard, number_demos
from ript_ray.data.storage import load_trajectories, save_trajectories
from ript_ray.data.windows import batches_with_good, gather, seen_starts, shuffled_batches, window_starts
from ript_ray.errors import UserError
from ript_ray.types import EpisodeReport, Sample, Trajectory, Window


@pytest.mark.parametrize(("length", "count"), [(50, 1), (80, 31), (100, 51), (137, 88)])
def test_a_trajectory_of_l_steps_gives_l_minus_49_full_windows(length: int, count: int) -> None:
    starts = window_starts(length)
    assert len(starts) == count
    assert max(starts) + 50 == length


def test_short_trajectories_and_tails_follow_their_settings() -> None:
    assert list(window_starts(20, short="pad")) == [0]
    assert list(window_starts(20, short="drop")) == []
    assert list(window_starts(0, short="pad")) == []
    assert len(window_starts(80, tail="pad")) == 80
    assert len(window_starts(20, short="pad", tail="pad")) == 20


def test_gather_copies_what_a_slice_would_give_and_masks_the_rest() -> None:
    pool = {3: make_trajectory(70, seed=3), 5: make_trajectory(30, seed=5)}
    batch = gather([Window(3, 10), Window(3, 40), Window(5, 0)], pool, {3: 1.0, 5: -1.0})
    np.testing.assert_array_equal(batch.actions[0], pool[3].actions[10:60])
    np.testing.assert_array_equal(batch.actions[1, :30], pool[3].actions[40:])
    np.testing.assert_array_equal(batch.frames[1], pool[3].frames[4])
    np.testing.assert_array_equal(batch.states[2], pool[5].states[0])
    assert batch.valid.sum(1).tolist() == [50, 30, 30]
    assert (batch.actions[2, 30:] == batch.actions[2, 29]).all()
    assert batch.advantages.tolist() == [1.0, 1.0, -1.0]


def samples(members: list[Trajectory], *advantages: float) -> dict[int, Sample]:
    """Of trajectories, which are as good as each other where nothing is said."""
    told = advantages or [0.0] * len(members)
    return {i: Sample(EpisodeReport.of(t), t, told[i]) for i, t in enumerate(members)}


def test_a_window_without_its_frame_is_an_error() -> None:
    with pytest.raises(KeyError, match="no frame at step 11"):
        gather([Window(0, 11)], {0: make_trajectory(80)}, {0: 0.0})


def test_only_windows_that_were_seen_are_free() -> None:
    looks = make_trajectory(80).frame_steps
    assert seen_starts(80, looks) == [0, 10, 20, 30]
    assert seen_starts(80, looks, tail="pad") == [0, 10, 20, 30, 40, 50, 60, 70]


@pytest.mark.parametrize("rule", [{"normalise": "standard"}, {"negatives": "hinge"}])
def test_what_is_neither_good_nor_bad_has_no_weight_whatever_the_rule(rule: dict[str, str]) -> None:
    objective = {"name": "advantage_weighted", "negatives": "relu", "baseline": "task", "fastest": 0.5} | rule
    config = Config.model_validate({"objective": objective})
    members = [make_trajectory(length, success) for length, success in ((60, True), (99, True), (70, False))]
    shard, _ = make_shard(0, samples(members), config)
    assert shard.weights[1] == shard.advantages[1] == 0.0
    assert shard.weights[0] > shard.weights[2]


@pytest.mark.parametrize(("name", "baseline"), [("cfg", "task"), ("cfg", "group"), ("imitation", "task")])
def test_failures_alone_make_no_update(name: str, baseline: str) -> None:
    config = Config.model_validate({"objective": {"name": name, "baseline": baseline}, "data": {"tail": "pad"}})
    members = [make_trajectory(length, False) for length in (60, 70, 80)]
    shard, _ = make_shard(0, samples(members), config)
    assert (len(shard.order) > 0) == (name == "imitation")


def test_a_success_without_windows_makes_no_update() -> None:
    config = Config.model_validate(
        {"objective": {"name": "cfg", "baseline": "task"}, "data": {"tail": "drop", "short": "drop"}}
    )
    members = [make_trajectory(49, True), make_trajectory(70, False)]
    shard, _ = make_shard(0, samples(members), config)
    assert shard.advantages[0] > 0
    assert len(shard.order) == 0


@pytest.mark.parametrize(("normalise", "learns"), [("none", True), ("robust", False)])
def test_successes_that_lost_their_weight_make_no_update(normalise: str, learns: bool) -> None:
    objective = {"name": "advantage_weighted", "negatives": "relu", "normalise": normalise}
    config = Config.model_validate({"objective": objective, "data": {"tail": "pad"}})
    members = [make_trajectory(60, i < 6) for i in range(10)]  # the middle one succeeded
    shard, _ = make_shard(0, samples(members, *[0.4] * 6, *[-0.6] * 4), config)
    assert min(shard.advantages[i] for i in range(6)) > 0
    assert (len(shard.order) > 0) == learns


def test_demonstrations_make_up_their_share_of_every_batch() -> None:
    config = Config.model_validate(
        {"data": {"demo_share": 0.25, "tail": "pad"}, "train": {"batch_size": 16, "micro_batch": 16, "epochs": 3}}
    )
    members = [make_trajectory(length, success) for length, success in ((60, True), (99, False), (70, False))]
    shown = [make_trajectory(80, True, seed=7), make_trajectory(55, True, seed=8)]
    demos = number_demos([(EpisodeReport.of(demo), demo) for demo in shown])
    own_samples = samples(members, 1.0, -0.5, -0.5)
    shard, _ = make_shard(3, own_samples, config, demos)
    from_demos = shard.windows[shard.order][..., 0] < 0
    assert (from_demos.sum(1) == 4).all()
    assert from_demos[:, :8].any()
    assert from_demos[:, 8:].any()
    assert {int(i) for i in shard.windows[:, 0]} == {-2, -1, 0, 1, 2}
    assert (shard.advantages[-1], shard.weights[-2]) == (1.0, 1.0)
    plain, _ = make_shard(3, own_samples, config)
    own = [tuple(row) for row in shard.windows[shard.order[~from_demos]]]
    # Rollouts are gone through as often as without, in batches that are so much larger in number.
    assert len(own) == 3 * len(plain.windows) // 12 * 12
    batch = gather(
        [Window(int(i), int(s)) for i, s in shard.windows[shard.order[0]]], shard.trajectories, shard.weights
    )
    assert len(batch) == 16
    nothing, _ = make_shard(3, {}, config, demos)  # no rollouts were kept
    assert len(nothing.order) == 0
    one_camera = dataclasses.replace(shown[0], frames=shown[0].frames[:, :1])
    with pytest.raises(UserError, match="1 and 2 cameras"):
        make_shard(3, own_samples, config, number_demos([(EpisodeReport.of(one_camera), None)]))


def test_shuffled_batches_are_whole_passes() -> None:
    order = shuffled_batches(20, epochs=3, batch_size=6, seed=[1, 2])
    assert order.shape == (10, 6)
    flat = order.ravel()
    for k in range(3):
        assert sorted(flat[20 * k : 20 * (k + 1)]) == list(range(20))
    np.testing.assert_array_equal(order, shuffled_batches(20, 3, 6, [1, 2]))
    assert shuffled_batches(3, 1, 8, [0]).shape == (1, 8)
    assert shuffled_batches(0, 1, 8, [0], min_steps=5).shape == (0, 8)
    assert shuffled_batches(20, 3, 6, [1, 2], min_steps=4).shape == (10, 6)
    many = shuffled_batches(20, 3, 6, [1, 2], min_steps=15)
    assert many.shape == (15, 6)
    np.testing.assert_array_equal(many[:10], order)


def test_rare_good_rows_get_their_share_of_each_batch() -> None:
    good = np.zeros(100, dtype=bool)
    good[[3, 50, 97]] = True
    order = batches_with_good(good, 0.25, epochs=4, batch_size=16, seed=[1], min_steps=30)
    assert order.shape == (30, 16)
    assert (good[order].sum(1) == 4).all()
    counts = np.bincount(order.ravel(), minlength=100)
    assert set(counts[good]) == {40}  # 120 places for three
    assert set(counts[~good]) == {3, 4}  # 360 for 97: passes, not chance
    assert 0 < good[order[:, :8]].sum() / 120 < 1  # no learner gets all of them
    np.testing.assert_array_equal(order, batches_with_good(good, 0.25, 4, 16, [1], 30))
    # Enough of them, or none: as without.
    for plenty in (np.ones(100, dtype=bool), np.zeros(100, dtype=bool)):
        expected = shuffled_batches(100, 4, 16, [1], 30)
        np.testing.assert_array_equal(batches_with_good(plenty, 0.25, 4, 16, [1], 30), expected)
    assert batches_with_good(np.zeros(0, dtype=bool), 0.25, 4, 16, [1], 30).shape == (0, 16)


@pytest.mark.parametrize(
    ("count", "share", "each"),
    [
        (25, 0.25, 4),  # exactly the share
        (60, 0.25, 10),  # more: 9.6 on average
        (99, 0.25, 15),  # almost all: no row is left out
        (60, 0.7, 12),  # fewer
        (60, 0.0, None),
    ],
)
def test_the_share_of_good_rows_is_kept_in_every_batch(count: int, share: float, each: int | None) -> None:
    good = np.arange(100) < count
    order = batches_with_good(good, share, epochs=4, batch_size=16, seed=[1], min_steps=30)
    assert order.shape == (30, 16)
    if each is None:
        np.testing.assert_array_equal(order, shuffled_batches(100, 4, 16, [1], 30))
        return
    assert (good[order].sum(1) == each).all()
    assert each >= share * 16
    assert set(order.ravel()) == set(range(100))


def test_trajectories_survive_the_disk(tmp_path: Path) -> None:
    made = [make_trajectory(60, seed=1), make_trajectory(55, success=False, seed=2)]
    made[0].labels = made[0].actions + 1
    save_trajectories(tmp_path / "t.safetensors", made, {"note": "x"})
    for before, after in zip(made, load_trajectories(tmp_path / "t.safetensors"), strict=True):
        assert (before.context, before.success, before.instruction) == (after.context, after.success, after.instruction)
        for name in ("actions", "states", "frames", "frame_steps", "state_hashes", "labels"):
            a, b = getattr(before, name), getattr(after, name)
            assert (a is None) == (b is None)
            if a is not None:
                np.testing.assert_array_equal(a, b)


def test_a_missing_file_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"launch\.py demos"):
        load_trajectories(tmp_path / "absent")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(UserError, match="holds no trajectories"):
        load_trajectories(tmp_path / "other")


def test_a_damaged_file_names_the_command_that_makes_it_again(tmp_path: Path) -> None:
    (tmp_path / "demos.safetensors").write_bytes(b"no demonstrations")
    with pytest.raises(UserError, match=r"launch\.py demos"):
        load_trajectories(tmp_path / "demos.safetensors")
