import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import INSTRUCTION, make_policy, make_trajectory

from learner.update import NonFinite, Step, learning_rate, update
from ript_ray.algos.objectives import Draw
from ript_ray.config import ObjectiveConfig, SftConfig, TrainConfig
from ript_ray.data.windows import gather
from ript_ray.errors import UserError
from ript_ray.policies.checkpoints import (
    build_policy,
    cpu_weights,
    load_policy,
    save_policy,
    weights_sha256,
)
from ript_ray.policies.flow import FlowPolicy
from ript_ray.policies.policy import draw_shifts, sample_time, shift_images
from ript_ray.policies.transform import Transform
from ript_ray.types import Batch, Window


def make_batch(rows: int = 6) -> Batch:
    pool = {i: make_trajectory(70, seed=i) for i in range(rows)}
    return gather([Window(i, 10) for i in range(rows)], pool, {i: 1.0 if i % 2 else -1.0 for i in range(rows)})


def test_decode_is_the_inverse_of_encode_relative_or_not() -> None:
    transform = make_policy().transform
    actions, state = torch.randn(4, 50, 7), torch.randn(4, 8)
    encoded = transform.encode_actions(actions, state)
    torch.testing.assert_close(transform.decode_actions(encoded, state), actions, rtol=0, atol=1e-5)
    mean, std = torch.tensor(transform.action_mean), torch.tensor(transform.action_std)
    shifted = actions.clone()
    shifted[..., 0] -= state[:, None, 0]
    shifted[..., 2] -= state[:, None, 2]
    torch.testing.assert_close(encoded, (shifted - mean) / (std + 1e-6))


def test_actions_that_a_world_would_clip_are_refused() -> None:
    transform = dataclasses.replace(make_policy().transform, state_mean=(0.0,) * 8, action_mean=(0.0,) * 7)
    transform.check_reach("env.id='x'")
    degrees = dataclasses.replace(transform, action_mean=(45.0, *transform.action_mean[1:]))
    with pytest.raises(UserError, match=r"env.id='x' takes actions in .* around 45"):
        dataclasses.replace(degrees, relative=(False,) * 7).check_reach("env.id='x'")
    # pi0_libero's statistics: the hand points down, 3.0 about the first axis, and actions are relative to that.
    hand = {
        "state_mean": (0.0, 0.0, 0.0, 2.97, 0.0, 0.0, 0.0, 0.0),
        "action_mean": (0.0, 0.0, 0.0, -2.97, 0.0, 0.0, 0.0),
    }
    libero = dataclasses.replace(transform, relative=(True,) * 6 + (False,), **hand)
    libero.check_reach("it")
    for wrong in (
        dataclasses.replace(libero, relative=(False,) * 7),
        dataclasses.replace(libero, action_mean=(0.0,) * 7),
    ):
        with pytest.raises(UserError, match=r"around 2\.97: .* convert\.relative"):
            wrong.check_reach("it")
    there = (-45.0, *transform.state_mean[1:])  # where the arm is, to which 45 degrees are added
    dataclasses.replace(degrees, relative=(True,) + (False,) * 6, state_mean=there).check_reach("env.id='x'")
    with pytest.raises(UserError, match="around 45"):
        dataclasses.replace(transform, relative=(True,) + (False,) * 6, state_mean=there).check_reach("env.id='x'")


def test_fitted_statistics_normalise_the_data() -> None:
    rng = np.random.default_rng(0)
    states, actions = rng.normal(3, 2, (500, 8)), rng.normal(-1, 0.3, (500, 7))
    transform = Transform.fit(states, actions, image_size=32)
    encoded = transform.encode_state(torch.tensor(states))
    assert encoded.mean(0).abs().max() < 1e-6
    assert (encoded.std(0) - 1).abs().max() < 1e-2
    assert Transform.from_json(json.loads(json.dumps(transform.to_json()))) == transform


def test_relative_actions_are_as_far_from_the_state_as_their_chunk_goes() -> None:
    from learner.sft import new_policy

    demo = make_trajectory(60, seed=1)
    ramp = np.arange(60, dtype=np.float32)[:, None]
    demo = dataclasses.replace(demo, states=np.tile(ramp, 8), actions=np.tile(ramp + 1, 7))
    policy = new_policy(SftConfig(relative=7), [demo], [Window(0, start) for start in range(11)])
    assert isinstance(policy, FlowPolicy)
    # Whichever the window, its actions are 1 to 50 ahead.
    np.testing.assert_allclose(policy.transform.action_mean, 25.5, rtol=1e-5)
    np.testing.assert_allclose(policy.transform.action_std, np.std(np.arange(1, 51)), rtol=1e-5)
    np.testing.assert_allclose(policy.chunk_std, 0.05)  # each step of a chunk is always the same


@pytest.mark.parametrize("relative", [None, (True, True, False)])
def test_a_state_may_be_shorter_than_an_action(relative: tuple[bool, ...] | None) -> None:
    rng = np.random.default_rng(0)
    states, actions = rng.normal(3, 2, (500, 2)), rng.normal(-1, 0.3, (500, 3))
    transform = Transform.fit(states, actions, image_size=32, relative=relative)
    expected = actions if relative is None else actions - np.hstack([states, np.zeros((500, 1))])
    np.testing.assert_allclose(transform.action_mean, expected.mean(0))
    chunks, before = torch.tensor(actions)[:, None], torch.tensor(states)
    encoded = transform.encode_actions(chunks, before)
    np.testing.assert_allclose(encoded[:, 0], (expected - expected.mean(0)) / (expected.std(0) + 1e-6))
    torch.testing.assert_close(transform.decode_actions(encoded, before), chunks)
    with pytest.raises(UserError, match="the state has 2 dimensions"):
        Transform.fit(states, actions, image_size=32, relative=(False, False, True))


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(UserError, match=r"env\.image_size=16"):
        make_policy().transform.encode_images(torch.zeros(1, 2, 16, 16, 3, dtype=torch.uint8))


@pytest.mark.parametrize("image_size", [16, 17, 19, 25, 30, 50, 64, 90])
def test_frames_of_any_size_and_no_words_are_understood(image_size: int) -> None:
    policy = make_policy(image_size=image_size)
    frames = torch.zeros(3, 2, image_size, image_size, 3, dtype=torch.uint8)
    told = policy.encode(frames, torch.zeros(3, 8), [INSTRUCTION, "", "  "])
    assert not torch.equal(told[0], told[1])
    torch.testing.assert_close(policy.encode(frames[:1], torch.zeros(1, 8), [""]), told[1:2])


def test_guidance_means_what_it_says() -> None:
    policy = make_policy()
    features, x, t = torch.randn(3, 32), torch.randn(3, 50, 7), torch.rand(3)
    v1 = policy.velocity(policy.conditioned(features, torch.ones(3, dtype=torch.long)), x, t)
    v0 = policy.velocity(policy.conditioned(features, torch.zeros(3, dtype=torch.long)), x, t)
    for w in (0.0, 0.5, 1.0, 3.0):
        guided = policy.guided_velocity(policy.guided(features, 3, w), x, t, w)
        torch.testing.assert_close(guided, v0 + w * (v1 - v0), rtol=1e-4, atol=1e-5)
    assert (v1 - v0).abs().max() > 1e-3


def test_velocity_points_from_the_predicted_chunk_to_the_noise() -> None:
    """With the network silent the predicted chunk is the mean, and one step from any time must arrive there."""
    policy = make_policy()
    torch.nn.init.zeros_(policy.project_out.weight)
    torch.nn.init.zeros_(policy.project_out.bias)
    x, t = torch.randn(3, 50, 7), torch.tensor([0.1, 0.5, 1.0])
    v = policy.velocity(torch.zeros(3, 32), x, t)
    torch.testing.assert_close(x - t[:, None, None] * v, policy.chunk_mean.expand(3, 50, 7), rtol=1e-4, atol=1e-5)
    # ... and at that chunk's own noisy versions it is the target ε − a.
    noise = torch.randn(3, 50, 7)
    noisy = t[:, None, None] * noise + (1 - t[:, None, None]) * policy.chunk_mean
    v = policy.velocity(torch.zeros(3, 32), noisy, t)
    torch.testing.assert_close(v, noise - policy.chunk_mean, rtol=1e-3, atol=1e-4)


def test_acting_is_ten_euler_steps_and_leaves_the_noise_alone() -> None:
    policy, batch = make_policy(), make_batch(2)
    noise = torch.randn(2, 50, 7)
    before = noise.clone()
    acted, _ = policy.act(batch.frames, batch.states, batch.instructions, noise)
    assert torch.equal(noise, before)
    with torch.no_grad():
        features = policy.encode(batch.frames, batch.states, batch.instructions)
        good = policy.conditioned(features, torch.ones(2, dtype=torch.long))
        x = noise.clone()
        for k in range(10):
            x -= 0.1 * policy.velocity(good, x, torch.full((2,), 1 - 0.1 * k))
    torch.testing.assert_close(acted, policy.transform.decode_actions(x, batch.states), rtol=1e-4, atol=1e-5)


def test_both_branches_of_a_draw_share_noise_and_time() -> None:
    policy, batch = make_policy(), make_batch(3)
    noise, t = torch.randn(3, 50, 7), torch.rand(3)
    draw = Draw(policy, batch, noise, t, torch.rand(3))
    chunk = policy.transform.encode_actions(batch.actions, batch.states)
    features = policy.encode(batch.frames, batch.states, batch.instructions)
    noisy = t[:, None, None] * noise + (1 - t[:, None, None]) * chunk
    for value, c in zip(draw.velocity(1, 0), (1, 0), strict=True):
        v = policy.velocity(policy.conditioned(features, torch.full((3,), c)), noisy, t)
        torch.testing.assert_close(value, v, rtol=1e-4, atol=1e-5)
        expected = t[:, None, None] ** 2 * (v - (noise - chunk)) ** 2
        torch.testing.assert_close(draw.errors(value), expected, rtol=1e-4, atol=1e-5)


def test_training_times_follow_their_distribution() -> None:
    t = sample_time(100_000, torch.Generator().manual_seed(0))
    assert t.min() >= 0.001
    assert t.max() <= 1.0
    assert t.mean().item() == pytest.approx(0.999 * 0.6 + 0.001, abs=0.005)
    assert (t > 0.9).float().mean().item() == pytest.approx(1 - ((0.9 - 0.001) / 0.999) ** 1.5, abs=0.005)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 32), (32, 20)])
def test_shifting_moves_pixels_and_repeats_the_border(height: int, width: int) -> None:
    frames = make_batch(4).frames[:, :, :height, :width]
    offsets = draw_shifts(4, 2, 3, torch.Generator().manual_seed(1))
    assert offsets.abs().max() == 3
    shifted = shift_images(frames, offsets)
    padded = np.pad(frames.numpy(), ((0, 0), (0, 0), (3, 3), (3, 3), (0, 0)), mode="edge")
    for row in range(4):
        for camera in range(2):
            down, right = (3 + offsets[row, camera]).tolist()
            view = padded[row, camera, down : down + height, right : right + width]
            np.testing.assert_array_equal(shifted[row, camera], view)
    assert torch.equal(shift_images(frames, torch.zeros_like(offsets)), frames)


def test_a_saved_policy_loads_with_the_same_bytes_and_acts_the_same(tmp_path: Path) -> None:
    policy, batch = make_policy(), make_batch(2)
    save_policy(tmp_path / "p", policy)
    save_policy(tmp_path / "p", policy)
    loaded = load_policy(tmp_path / "p")
    assert weights_sha256(cpu_weights(loaded)) == weights_sha256(cpu_weights(policy))
    noise = torch.randn(2, 50, 7)
    arguments = (batch.frames, batch.states, [INSTRUCTION] * 2, noise)
    assert torch.equal(loaded.act(*arguments)[0], policy.act(*arguments)[0])
    assert weights_sha256(cpu_weights(make_policy(seed=1))) != weights_sha256(cpu_weights(policy))


def test_a_checkpoint_that_does_not_fit_is_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    policy = make_policy()
    weights = cpu_weights(policy)
    with pytest.raises(UserError, match=r"time\.weight should be .* the file has nothing"):
        build_policy(policy.describe(), {k: v for k, v in weights.items() if k != "time.weight"})
    with pytest.raises(UserError, match="extra should be absent"):
        build_policy(policy.describe(), weights | {"extra": torch.zeros(1)})
    with pytest.raises(UserError, match=r"time\.bias should be \(32,\), the file has \(3,\)"):
        build_policy(policy.describe(), weights | {"time.bias": torch.zeros(3)})
    with pytest.raises(UserError, match=r"policy\.checkpoint=.*policy\.json not found"):
        load_policy(tmp_path / "absent")
    save_policy(tmp_path / "p", policy)
    (tmp_path / "p" / "policy.json").write_text('{"type": "pi9"}')
    with pytest.raises(UserError, match="type 'pi9' is unknown"):
        load_policy(tmp_path / "p")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("policy.json", b'{"type": "flow", "config"'),
        ("policy.json", b"{}"),
        ("policy.json", b'{"type": "flow", "config": {"hrizon": 50}, "transform": {}}'),
        ("model.safetensors", b"\x10\x00"),
    ],
)
def test_a_damaged_checkpoint_is_an_error_that_names_it(name: str, content: bytes, tmp_path: Path) -> None:
    save_policy(tmp_path / "policy", make_policy())
    (tmp_path / "policy" / name).write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        load_policy(tmp_path / "policy")


def test_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate(i, 100, 1.0, 0.1) for i in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] < 0.001
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def config(**changes: object) -> TrainConfig:
    return TrainConfig.model_validate({"batch_size": 6, "micro_batch": 6, "image_shift": 0, "lr": 1e-3} | changes)


def updated(policy_seed: int, micro: int, **changes: object) -> dict[str, torch.Tensor]:
    policy, batch = make_policy(policy_seed), make_batch(6)
    parts = [lambda i=i: batch[i : i + micro] for i in range(0, 6, micro)]
    settings = config(micro_batch=micro, **changes)
    update(policy, [Step(parts, 6, 6)], settings, ObjectiveConfig(), torch.Generator().manual_seed(0))
    return cpu_weights(policy)


def test_learning_lowers_the_loss() -> None:
    policy, batch = make_policy(), make_batch(6)
    steps = [Step([lambda: batch], 6, 6)] * 60
    seen: list[int] = []
    generator = torch.Generator().manual_seed(0)
    _, result = update(policy, steps, config(), ObjectiveConfig(), generator, lambda i, loss: seen.append(i))
    assert result["loss"] < 0.9 * result["loss_first"]
    assert seen == list(range(60))


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_of_any_size_give_the_same_update(micro: int) -> None:
    whole, divided = updated(0, micro=6, image_shift=2), updated(0, micro=micro, image_shift=2)
    for name, tensor in whole.items():
        torch.testing.assert_close(divided[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_batch_that_does_not_fit_is_split_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = updated(0, micro=6)
    encode = FlowPolicy.encode
    calls: list[int] = []

    def limited(self: FlowPolicy, frames: torch.Tensor, states: torch.Tensor, instructions: list[str]) -> torch.Tensor:
        calls.append(len(states))
        if len(states) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(self, frames, states, instructions)

    monkeypatch.setattr(FlowPolicy, "encode", limited)
    split = updated(0, micro=6)
    assert calls == [6, 3, 2, 2, 2]
    for name, tensor in whole.items():
        torch.testing.assert_close(split[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_batch_of_one_that_does_not_fit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(FlowPolicy, "encode", never)
    with pytest.raises(torch.OutOfMemoryError):
        updated(0, micro=2)


def test_nan_never_reaches_the_weights() -> None:
    policy, batch = make_policy(), make_batch(6)
    before = weights_sha256(cpu_weights(policy))
    batch.actions[0, 0, 0] = float("nan")
    imitation = ObjectiveConfig(name="imitation")
    with pytest.raises(NonFinite, match=r"try a lower train\.lr"):
        update(policy, [Step([lambda: batch], 6, 6)], config(), imitation, torch.Generator().manual_seed(0))
    assert weights_sha256(cpu_weights(policy)) == before


def test_infinite_weights_of_the_last_step_are_not_returned() -> None:
    policy, batch = make_policy(), make_batch(6)
    settings = config(lr=1e37, warmup=1.0, weight_decay=0.0)
    with pytest.raises(NonFinite, match=r"the weights after the last step; try a lower train\.lr"):
        update(policy, [Step([lambda: batch], 6, 6)], settings, ObjectiveConfig(), torch.Generator().manual_seed(0))


def test_what_tells_the_condition_may_learn_faster() -> None:
    def moved(factor: float) -> dict[str, float]:
        policy, batch = make_policy(), make_batch(6)
        before = cpu_weights(policy)
        settings = config(lr=1e-5, warmup=1.0, condition_lr=factor, weight_decay=0.0)
        update(policy, [Step([lambda: batch], 6, 6)], settings, ObjectiveConfig(), torch.Generator().manual_seed(0))
        return {name: (tensor - before[name]).abs().max().item() for name, tensor in cpu_weights(policy).items()}

    alike, faster = moved(1.0), moved(100.0)
    for name, change in alike.items():
        assert faster[name] == pytest.approx(change * (100 if name == "condition.weight" else 1), rel=1e-2, abs=1e-9)
    assert alike["condition.weight"] == pytest.approx(1e-5, rel=1e-2)  # AdamW's first step


def change_in_three_steps(precision: str) -> tuple[torch.Tensor, dict[str, float], int]:
    """The change of all weights, diagnostics, and how often a step was computed."""
    policy, batch = make_policy(), make_batch(6)
    before = torch.cat([p.detach().flatten().clone() for p in policy.parameters()])
    computed = []

    def load() -> Batch:
        computed.append(batch)
        return batch

    steps, settings = [Step([load], 6, 6)] * 3, config(precision=precision, warmup=1.0)
    _, diagnostics = update(policy, steps, settings, ObjectiveConfig(), torch.Generator().manual_seed(0))
    return torch.cat([p.detach().flatten() for p in policy.parameters()]) - before, diagnostics, len(computed)


@pytest.mark.parametrize(("precision", "alike"), [("bfloat16", 0.98), ("float16", 0.999)])
def test_less_precision_changes_the_update_by_its_rounding_alone(precision: str, alike: float) -> None:
    (exact, there, _), (rounded, here, computed) = (change_in_three_steps(name) for name in ("float32", precision))
    assert not torch.equal(exact, rounded)
    assert torch.nn.functional.cosine_similarity(exact, rounded, dim=0) > alike
    assert here == pytest.approx(there, rel=0.02)
    assert computed == 3


def test_a_step_whose_gradients_leave_float16_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, there, _ = change_in_three_steps("float16")
    monkeypatch.setattr("learner.update._LOSS_SCALE", 2.0**30)
    found, here, computed = change_in_three_steps("float16")
    assert computed > 6  # it did leave it
    assert torch.nn.functional.cosine_similarity(expected, found, dim=0) > 0.9999
    assert here == pytest.approx(there, rel=1e-3)  # no sample counts twice, and the noise is the same


def test_the_moving_average_is_one_and_is_published_or_not() -> None:
    def trained(averaging: bool = True, **changes: object) -> tuple[FlowPolicy, FlowPolicy]:
        policy, batch = make_policy(), make_batch(6)
        steps, generator = [Step([lambda: batch], 6, 6)] * 5, torch.Generator().manual_seed(0)
        settings = config(warmup=1.0, **changes)
        return policy, update(policy, steps, settings, ObjectiveConfig(), generator, averaging=averaging)[0]

    # The weights after each of the steps, from runs that stop there would need other schedules: take them as they go.
    seen: list[dict[str, torch.Tensor]] = []
    policy, batch = make_policy(), make_batch(6)
    update(
        policy,
        [Step([lambda: batch], 6, 6)] * 5,
        config(warmup=1.0),
        ObjectiveConfig(),
        torch.Generator().manual_seed(0),
        lambda i, loss: seen.append(cpu_weights(policy)),
    )
    expected = seen[0]["time.weight"]
    for weights in seen[1:]:
        expected = 0.8 * expected + 0.2 * weights["time.weight"]
    last, averaged = trained(ema=0.8)
    torch.testing.assert_close(averaged.time.weight, expected)
    assert weights_sha256(cpu_weights(last)) == weights_sha256(seen[-1])
    last, acting = trained(ema=0.8, averaging=False)
    assert acting is last
    settings = TrainConfig(ema=0.8, updates=3)
    assert [settings.averages(step) for step in range(3)] == [True, True, True]
    settings = TrainConfig(ema=0.8, updates=3, act_with_ema=False)
    assert [settings.averages(step) for step in range(3)] == [False, False, True]


def test_an_anchor_holds_the_policy_back_and_its_penalty_is_the_change_of_the_velocity() -> None:
    def change(anchor: float) -> float:
        policy, batch = make_policy(), make_batch(6)
        start = make_policy()
        settings = config(anchor=anchor)
        update(
            policy, [Step([lambda: batch], 6, 6)] * 40, settings, ObjectiveConfig(), torch.Generator().manual_seed(0)
        )
        draw = Draw(policy, batch, torch.ones(6, 50, 7), torch.full((6,), 0.5), torch.rand(6))
        old = Draw(start, batch, torch.ones(6, 50, 7), torch.full((6,), 0.5), torch.rand(6))
        valid = batch.valid[..., None].float()
        expected = sum(
            (0.25 * (new - before).square() * valid).sum((1, 2)) / (7 * valid.sum((1, 2)))
            for new, before in zip(draw.velocity(1, 0), old.velocity(1, 0), strict=True)
        )
        torch.testing.assert_close(draw.change_since(start), expected / 2, rtol=1e-4, atol=1e-6)
        return draw.change_since(start).mean().item()

    free, held = change(0.0), change(10.0)
    assert held < 0.3 * free
