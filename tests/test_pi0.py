"""π0 and π0.5 against a NumPy computation that shares nothing with them, and through the policy protocol."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pi0_reference as reference
import pytest
import torch
from conftest import INSTRUCTION, make_trajectory
from torch.nn import functional as F

from benchmarks.policy import measure_policy
from learner.update import Step, update
from ript_ray.algos.objectives import Draw
from ript_ray.config import Config, ObjectiveConfig, TrainConfig
from ript_ray.data.windows import gather
from ript_ray.errors import UserError
from ript_ray.policies.checkpoints import (
    build_policy,
    cpu_weights,
    from_published,
    load_policy,
    published_bytes,
    save_policy,
    to_publish,
    weights_sha256,
)
from ript_ray.policies.pi0.gemma import GemmaSizes
from ript_ray.policies.pi0.layout import from_openpi, to_openpi
from ript_ray.policies.pi0.policy import Pi0Config, Pi0Policy, VisionSizes
from ript_ray.policies.pi0.prompt import PromptTokenizer, prompt_tokens
from ript_ray.policies.pi0.transform import Pi0Transform, quantile, quantiles_of, resize_with_pad
from ript_ray.policies.stages import recording
from ript_ray.policies.starting import load_policy_to_train, load_starting_policy
from ript_ray.types import Batch, Window

SENTENCES = ["pick up the alphabet soup and place it in the basket", "open the top drawer", "turn on the stove"]
TOKENIZER = PromptTokenizer.train(SENTENCES, 320)


def make_config(pi05: bool = False, kv_heads: int = 1, **changes: object) -> Pi0Config:
    """No two sizes alike, so that a transposed weight shows."""
    return Pi0Config(
        pi05=pi05,
        horizon=50,
        action_dim=32,
        vocabulary=340,
        max_tokens=200,
        state_in_prompt=pi05,
        vision=VisionSizes(width=24, mlp=40, layers=2, heads=2, patch=14, image_size=28),
        language=GemmaSizes(48, 80, 3, 4, kv_heads, 16),
        expert=GemmaSizes(32, 56, 3, 4, kv_heads, 16),
        **changes,
    )


def make_pi0(config: Pi0Config, seed: int = 0) -> Pi0Policy:
    transform = Pi0Transform(
        state_mean=tuple(np.linspace(-0.2, 0.3, 8)),
        state_std=tuple(np.linspace(0.5, 1.2, 8)),
        action_mean=tuple(np.linspace(-0.1, 0.1, 7)),
        action_std=tuple(np.linspace(0.3, 0.9, 7)),
        relative=(True,) * 6 + (False,),
        state_width=config.state_dim,
        action_width=config.action_dim,
        image_size=config.vision.image_size,
    )
    policy = Pi0Policy(config, transform, TOKENIZER)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.named_parameters():
        scale = 0.5 if name.startswith(("words", "condition")) else 1.3 / max(1, parameter.shape[-1]) ** 0.5
        parameter.data = torch.randn(parameter.shape, generator=generator) * (0.2 if parameter.dim() == 1 else scale)
    return policy.eval()


def make_batch(rows: int = 3) -> Batch:
    pool = {i: make_trajectory(70, seed=i) for i in range(rows)}
    batch = gather([Window(i, 10) for i in range(rows)], pool, dict.fromkeys(range(rows), 1.0))
    batch.instructions = [INSTRUCTION, "open the top drawer", "turn on the stove"][:rows]
    return batch


def as_reference(policy: Pi0Policy) -> tuple[reference.Sizes, dict[str, np.ndarray]]:
    c = policy.config
    sizes = reference.Sizes(
        c.vision.heads, c.vision.patch, c.language.heads, c.language.kv_heads, c.language.head_dim, c.horizon, c.pi05
    )
    return sizes, {to_openpi(name): w.numpy() for name, w in cpu_weights(policy).items() if name != "condition.weight"}


def observed(policy: Pi0Policy, batch: Batch, advantage: str | None = None) -> tuple[np.ndarray, ...]:
    """Pixels, tokens padded to a fixed length and their mask, as the reference takes them; and the state."""
    pixels = policy.transform.encode_images(batch.frames).movedim(2, -1).numpy()
    state = policy.transform.encode_state(batch.states)
    words = [None] * len(batch) if not policy.config.state_in_prompt else list(state[:, :8].numpy())
    rows = [
        prompt_tokens(TOKENIZER, text, s, advantage, 200) for text, s in zip(batch.instructions, words, strict=True)
    ]
    tokens = np.array([row + [0] * (200 - len(row)) for row in rows])
    return pixels, tokens, np.array([[i < len(row) for i in range(200)] for row in rows]), state.numpy()


# The reference has no embedded condition for π0.5.
CASES = [(False, 1, "none"), (False, 2, "embedding"), (False, 1, "text"), (True, 1, "none"), (True, 1, "text")]


@pytest.mark.parametrize(("pi05", "kv_heads", "condition"), CASES)
def test_velocity_and_actions_equal_the_reference(pi05: bool, kv_heads: int, condition: str) -> None:
    policy, batch = make_pi0(make_config(pi05, kv_heads, condition=condition)), make_batch()
    sizes, weights = as_reference(policy)
    g = torch.Generator().manual_seed(1)
    noise, t = torch.randn(3, 50, 32, generator=g), torch.tensor([0.03, 0.4, 1.0])
    features = policy.encode(batch.frames, batch.states, batch.instructions)
    for c, word in enumerate(("negative", "positive")):
        pixels, tokens, mask, state = observed(policy, batch, word if condition == "text" else None)
        present = np.ones(pixels.shape[:2], dtype=bool)
        offset = policy.condition.weight[c].detach().numpy()[None].repeat(3, 0) if condition == "embedding" else None
        seen = (weights, sizes, pixels, present, tokens, mask, state)
        with torch.no_grad():
            told = policy.conditioned(features, torch.full((3,), c))
            velocity = policy.velocity(told, noise, t)
        expected = reference.velocity(*seen, noise.numpy(), t.numpy(), state_offset=offset)
        assert np.abs(expected).std() > 0.1
        assert np.abs(velocity.numpy() - expected).max() < 1e-4
    if condition != "embedding":
        acted, _ = policy.act(batch.frames, batch.states, batch.instructions, noise)
        expected = torch.from_numpy(reference.sample(*seen, noise.numpy()))
        found = policy.transform.encode_actions(acted, batch.states)[..., :7]
        assert (found - expected[..., :7]).abs().max() < 1e-4


@pytest.mark.parametrize("condition", ["embedding", "text"])
@pytest.mark.parametrize("pi05", [False, True])
def test_guidance_means_what_it_says_and_the_noise_is_left_alone(pi05: bool, condition: str) -> None:
    policy, batch = make_pi0(make_config(pi05, condition=condition)), make_batch()
    noise, t = torch.randn(3, 50, 32), torch.rand(3)
    before = noise.clone()
    policy.act(batch.frames, batch.states, batch.instructions, noise, guidance=2.0)
    assert torch.equal(noise, before)
    features = policy.encode(batch.frames, batch.states, batch.instructions)
    v0, v1 = (policy.velocity(policy.conditioned(features, torch.full((3,), c)), noise, t) for c in (0, 1))
    assert (v1 - v0).abs().max() > 1e-3
    for w in (0.0, 0.5, 1.0, 3.0):
        guided = policy.guided_velocity(policy.guided(features, 3, w), noise, t, w)
        torch.testing.assert_close(guided, v0 + w * (v1 - v0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("pi05", "condition"), [(False, "embedding"), (True, "embedding"), (False, "text")])
def test_a_fused_step_sees_prompts_of_one_length_and_acts_the_same(pi05: bool, condition: Any) -> None:
    policy = make_pi0(make_config(pi05, condition=condition))
    frames, states, noise = make_batch(1).frames, make_batch(1).states, torch.randn(1, 50, 32)
    prompts = ["go", "pick up the alphabet soup and place it in the basket"]
    expected = [policy.act(frames, states, [prompt], noise, 2.0)[0] for prompt in prompts]
    policy.compile_step()
    del policy.velocity  # to compile it takes a minute; its graphs would depend on the sizes of what it is given
    for prompt, actions in zip(prompts, expected, strict=True):
        with recording() as stages:
            acted, _ = policy.act(frames, states, [prompt], noise, 2.0)
        assert {v.shape[1] for k, v in stages.items() if k.startswith("tokens")} == {policy.config.max_tokens}
        torch.testing.assert_close(acted, actions, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pi05", [False, True])
def test_learning_reaches_every_tensor_that_matters_and_checkpointing_changes_nothing(pi05: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        policy, batch = make_pi0(make_config(pi05)), make_batch()
        if checkpointing:
            policy.checkpoint_activations()
            policy.train()
        draw = Draw(policy, batch, torch.ones(3, 50, 32), torch.full((3,), 0.5), torch.rand(3))
        draw.mean(draw.errors(torch.stack(draw.velocity(1, 0)).mean(0))).sum().backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters()})
    for name, plain in gradients[0].items():
        assert policy.is_unused(name) == (plain is None), name
        if plain is not None:
            assert plain.abs().max() > 0, name
            torch.testing.assert_close(gradients[1][name], plain, rtol=1e-3, atol=1e-5)


def test_a_few_steps_of_the_learner_lower_the_loss_and_the_checkpoint_holds_all(tmp_path: object) -> None:
    policy, batch = make_pi0(make_config()), make_batch()
    train = TrainConfig(batch_size=3, micro_batch=2, lr=3e-3, image_shift=0)
    steps = [Step([lambda: batch[:2], lambda: batch[2:]], 3, 3)] * 40
    after, result = update(policy, steps, train, ObjectiveConfig(), torch.Generator().manual_seed(0))
    assert result["loss"] < 0.7 * result["loss_first"]
    save_policy(tmp_path / "p", after)
    loaded = load_policy(tmp_path / "p")
    assert weights_sha256(cpu_weights(loaded)) == weights_sha256(cpu_weights(after))
    noise = torch.randn(3, 50, 32)
    seen = batch.frames, batch.states, batch.instructions, noise
    assert torch.equal(loaded.act(*seen)[0], after.act(*seen)[0])


def trained_with(**changes: object) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights before and after a few steps."""
    policy, batch = make_pi0(make_config()), make_batch()
    before = cpu_weights(policy)
    train = TrainConfig(batch_size=3, micro_batch=3, lr=3e-3, image_shift=0, weight_decay=0.0, **changes)
    after, result = update(
        policy, [Step([lambda: batch], 3, 3)] * 30, train, ObjectiveConfig(), torch.Generator().manual_seed(0)
    )
    assert result["loss"] < result["loss_first"]
    assert [p.requires_grad for p in after.parameters()] == [
        p.requires_grad for p in make_pi0(make_config()).parameters()
    ]
    return before, cpu_weights(after)


def test_frozen_parts_stay_and_the_rest_learns() -> None:
    before, after = trained_with(freeze=("vision", "language", "words"))
    for name, tensor in before.items():
        moved = not torch.equal(tensor, after[name])
        assert moved == (not name.startswith(("vision", "language", "words"))), name


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_lora_changes_the_linear_layers_of_its_part_by_its_rank(ema: float) -> None:
    before, after = trained_with(lora_rank=2, lora_part="expert", ema=ema)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        change = after[name] - tensor
        if name.startswith("expert.layers") and tensor.dim() == 2:
            assert torch.linalg.matrix_rank(change, rtol=1e-3) == 2, name
        elif name == "condition.weight":
            assert not torch.equal(after[name][0], after[name][1])  # guidance has something to go by
        else:
            assert not change.any(), name


def test_parts_that_do_not_exist_are_named() -> None:
    for changes, message in (
        ({"freeze": ("vison",)}, "it has action_in_proj, action_out_proj"),
        ({"lora_rank": 1, "lora_part": "words"}, "no linear layer"),
        ({"freeze": ("expert",), "lora_rank": 1, "lora_part": "expert"}, "no linear layer"),
    ):
        with pytest.raises(UserError, match=message):
            trained_with(**changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"env": {"image_size": 24}}, r"env\.image_size=24: .* looks at 28×28 pixels"),
        ({"env": {"image_size": 64}, "policy": {"execute": 20}}, r"policy\.execute=20: .* predicts chunks of 10"),
    ],
)
def test_a_policy_sees_no_blur_and_is_asked_for_no_more_than_it_plans(
    changes: dict[str, dict[str, int]], expected: str, tmp_path: Path
) -> None:
    save_policy(tmp_path, make_pi0(replace(make_config(), horizon=10)))
    asked = {**changes, "policy": {"checkpoint": str(tmp_path), **changes.get("policy", {})}}
    with pytest.raises(UserError, match=expected):
        load_starting_policy(Config.model_validate(asked))
    fitting = {"env": {"image_size": 28}, "policy": {"checkpoint": str(tmp_path), "execute": 10}}
    assert load_starting_policy(Config.model_validate(fitting)).horizon == 10


@pytest.mark.parametrize(
    ("horizon", "settings", "expected"),
    [
        (10, {"data": {"tail": "drop"}}, r"data\.tail=drop: .* would never learn the last 40 actions"),
        (60, {}, "predicts chunks of 60; expected at most 50"),
        (50, {"train": {"freeze": ("visoin",)}}, r"train\.freeze='visoin': the policy has no such part"),
        (50, {"train": {"lora_rank": 2, "lora_part": "exprt"}}, "no linear layer"),
    ],
)
def test_what_cannot_be_trained_so_is_refused_before_anything_is_played(
    horizon: int, settings: dict[str, dict[str, Any]], expected: str, tmp_path: Path
) -> None:
    save_policy(tmp_path, make_pi0(replace(make_config(), horizon=horizon)))
    common = {"env": {"image_size": 28}, "policy": {"checkpoint": str(tmp_path)}, "data": {"tail": "pad"}}
    with pytest.raises(UserError, match=expected):
        load_policy_to_train(Config.model_validate(common | settings))
    lora = {"lora_rank": 2, "lora_part": "expert", "freeze": ("vision",), "checkpoint_activations": True}
    if horizon <= 50:
        assert load_policy_to_train(Config.model_validate(common | {"train": lora})).horizon == horizon


@pytest.mark.parametrize("pi05", [False, True])
def test_actors_may_hold_half_the_bytes(pi05: bool) -> None:
    policy, batch = make_pi0(make_config(pi05)), make_batch()
    arrays, sha256 = to_publish(policy, "bfloat16")
    assert sha256 == weights_sha256(cpu_weights(policy))
    acting = build_policy(policy.describe(), from_published(arrays), share=True)
    kinds = {name: tensor.dtype for name, tensor in acting.state_dict().items()}
    assert kinds["language.layers.0.mlp.up_proj.weight"] == kinds["vision.post_layernorm.weight"] == torch.bfloat16
    assert kinds["action_in_proj.weight"] == kinds["language.layers.0.input_layernorm.weight"] == torch.float32
    noise = torch.randn(3, 50, 32, generator=torch.Generator().manual_seed(0))
    exact, rough = (p.act(batch.frames, batch.states, batch.instructions, noise)[0] for p in (policy, acting))
    assert 0 < (exact - rough).abs().mean() < 0.03 * exact.std()


@pytest.mark.parametrize("pi05", [False, True])
def test_actors_may_hold_a_quarter_of_the_bytes(pi05: bool) -> None:
    policy, batch = make_pi0(make_config(pi05)), make_batch()
    arrays, sha256 = to_publish(policy, "int8")
    assert sha256 == weights_sha256(cpu_weights(policy))
    assert sum(array.nbytes for array in arrays.values()) == published_bytes(policy, "int8")
    assert published_bytes(policy, "int8") < published_bytes(policy, "bfloat16") < published_bytes(policy, "float32")
    name = "language.layers.0.mlp.up_proj.weight"
    before = policy.state_dict()[name]
    packed, factor = arrays[name], arrays["language.layers.0.mlp.up_proj.factor"]
    for row in range(len(before)):  # one at a time: each is rounded by at most half of its own step
        step = before[row].abs().max().item() / 127
        assert factor[row] == pytest.approx(step)
        assert np.abs(packed[row] * factor[row] - before[row].numpy()).max() <= 0.5001 * step
    assert arrays["action_in_proj.weight"].dtype == np.float32
    if pi05:  # of its norms
        assert arrays["expert.layers.0.input_layernorm.dense.weight"].dtype == np.float32
    acting = build_policy(policy.describe(), from_published(arrays), share=True)
    rough = build_policy(policy.describe(), from_published(to_publish(policy, "bfloat16")[0]), share=True)
    noise = torch.randn(3, 50, 32, generator=torch.Generator().manual_seed(0))
    exact, other, eight = (
        p.act(batch.frames, batch.states, batch.instructions, noise)[0] for p in (policy, rough, acting)
    )
    assert (exact - eight).abs().mean() < 0.05 * exact.std()
    assert not torch.equal(other, eight)
    newer = {name: tensor + 0.01 for name, tensor in policy.state_dict().items()}  # as compiled policies get them
    policy.load_state_dict(newer)
    acting.load_state_dict(from_published(to_publish(policy, "int8")[0]))
    exact, eight = (p.act(batch.frames, batch.states, batch.instructions, noise)[0] for p in (policy, acting))
    assert (exact - eight).abs().mean() < 0.05 * exact.std()


def test_a_policy_of_ten_actions_learns_from_the_first_ten_of_a_window() -> None:
    policy, batch = make_pi0(replace(make_config(True), horizon=10)), make_batch()
    draw = Draw(policy, batch, torch.ones(3, 10, 32), torch.full((3,), 0.5), torch.rand(3))
    assert draw.velocity(1)[0].shape == (3, 10, 32)
    clean = policy.transform.encode_actions(batch.actions, batch.states)[:, :10]
    torch.testing.assert_close(draw.target, 1 - clean)


@pytest.mark.slow
def test_the_benchmark_times_both_models_on_the_same_weights() -> None:
    result = measure_policy("pi0_tiny", batches=(1,), train_batch=4, rounds=1)
    assert result["parameters"] == 170_400
    (row,) = result["inference"]
    assert row["speedup"] == pytest.approx(row["chunks_per_second"] / row["transformers_chunks_per_second"])
    assert 0 < result["training"]["mfu"] < 1


def test_names_of_tensors_are_one_to_one() -> None:
    for pi05 in (False, True):
        names = list(make_pi0(make_config(pi05, condition="none")).state_dict())
        assert [from_openpi(to_openpi(name)) for name in names] == names
        assert len({to_openpi(name) for name in names}) == len(names)


def test_frames_are_resized_as_pillow_does() -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for height, width, size in ((256, 256, 224), (64, 64, 224), (96, 128, 28), (30, 20, 56)):
        smooth = F.interpolate(torch.from_numpy(rng.random((1, 3, 8, 8))), (height, width), mode="bicubic")
        frame = (smooth[0].clamp(0, 1) * 255).byte()
        ratio = max(height, width) / size
        new = int(width / ratio), int(height / ratio)
        expected = np.zeros((size, size, 3), dtype=np.uint8)
        top, left = (size - new[1]) // 2, (size - new[0]) // 2
        resized = Image.fromarray(frame.movedim(0, -1).numpy()).resize(new, Image.Resampling.BILINEAR)
        expected[top : top + new[1], left : left + new[0]] = np.asarray(resized)
        found = resize_with_pad(frame[None], size)[0].movedim(0, -1).numpy()
        assert np.abs(found.astype(int) - expected).max() <= 1


def test_prompts_begin_once_and_are_cleaned() -> None:
    tokens = prompt_tokens(TOKENIZER, "  open_the\ntop drawer ")
    assert tokens == prompt_tokens(TOKENIZER, "open the top drawer")
    assert tokens.count(2) == 1
    assert tokens[0] == 2
    assert tokens[-1] == TOKENIZER.encode("\n", begin=False)[-1]
    with pytest.warns(UserWarning, match="is cut to 5"):
        assert len(prompt_tokens(TOKENIZER, "open the top drawer", limit=5)) == 5
    spoken = prompt_tokens(TOKENIZER, "go", np.array([-1.0, 0.0, 0.999]))
    assert spoken == TOKENIZER.encode("Task: go, State: 0 128 255;\nAction: ")


def test_quantiles_normalise_as_openpi_does() -> None:
    q01, q99 = [-2.0, 1.0, 0.5], [4.0, 3.0, 0.5]
    mean, std = quantile({"q01": q01, "q99": q99})
    transform = Pi0Transform(
        state_mean=mean, state_std=std, action_mean=mean, action_std=std, relative=(False,) * 3, action_width=5
    )
    x = torch.tensor([[-2.0, 3.0, 0.5], [1.0, 2.0, 0.5]], dtype=torch.float64)
    low, high = torch.tensor(q01), torch.tensor(q99)
    expected = (x - low) / (high - low + 1e-6) * 2 - 1
    torch.testing.assert_close(transform.encode_state(x), expected)
    wide = transform.encode_actions(x[None], x[:1])
    assert wide.shape == (1, 2, 5)
    torch.testing.assert_close(transform.decode_actions(wide, x[:1]), x[None])
    np.testing.assert_allclose(quantiles_of(mean, std), (q01, q99))
