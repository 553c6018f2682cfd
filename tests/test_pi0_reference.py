"""The NumPy reference of π0 against the implementation in transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pi0_reference import Sizes, random_weights, sample, velocity
from safetensors.numpy import save_file
from transformers import PI0Config, PI0ForConditionalGeneration

BATCH, CAMERAS, IMAGE, TEXT, VOCAB, STEPS = 3, 3, 28, 9, 97, 10
WIDTHS = {
    "vision_width": 32,
    "vision_mlp": 48,
    "vision_layers": 2,
    "image": IMAGE,
    "width": 48,
    "mlp": 80,
    "expert_width": 32,
    "expert_mlp": 56,
    "layers": 3,
    "vocab": VOCAB,
    "action_dim": 7,
    "state_dim": 8,
}


def make_sizes(kv_heads: int = 1, pi05: bool = False) -> Sizes:
    return Sizes(vision_heads=4, patch=14, heads=4, kv_heads=kv_heads, head_dim=16, horizon=6, pi05=pi05)


def load_transformers(folder: Path, sizes: Sizes, weights: dict[str, np.ndarray]) -> PI0ForConditionalGeneration:
    """The same weights in transformers, through its own conversion of openpi's names."""
    heads = {
        "num_hidden_layers": WIDTHS["layers"],
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
    }
    text = {"model_type": "gemma", "hidden_size": WIDTHS["width"], "intermediate_size": WIDTHS["mlp"]}
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": WIDTHS["vision_width"],
        "intermediate_size": WIDTHS["vision_mlp"],
        "num_hidden_layers": WIDTHS["vision_layers"],
        "num_attention_heads": sizes.vision_heads,
        "patch_size": sizes.patch,
        "image_size": IMAGE,
        "vision_use_head": False,
    }
    expert = {"model_type": "gemma", "hidden_size": WIDTHS["expert_width"], "intermediate_size": WIDTHS["expert_mlp"]}
    PI0Config(
        vlm_config={
            "model_type": "paligemma",
            "text_config": {**text, **heads, "vocab_size": VOCAB},
            "vision_config": vision,
            "projection_dim": WIDTHS["width"],
            "image_token_id": VOCAB,
        },
        dit_config={**expert, **heads},
        chunk_size=sizes.horizon,
        max_state_dim=WIDTHS["state_dim"],
        max_action_dim=WIDTHS["action_dim"],
    ).save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model, report = PI0ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert set(report["missing_keys"]) <= {"model.dit.embed_tokens.weight"}
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_the_reference_agrees_with_transformers(tmp_path: Path, kv_heads: int) -> None:
    sizes = make_sizes(kv_heads)
    weights = random_weights(sizes, **WIDTHS, seed=kv_heads)
    rng = np.random.default_rng(7)
    pixels = rng.uniform(-1, 1, (BATCH, CAMERAS, IMAGE, IMAGE, 3)).astype(np.float32)
    image_mask = np.array([[True, True, True], [True, False, True], [True, True, False]])
    tokens = rng.integers(0, VOCAB, (BATCH, TEXT))
    token_mask = np.arange(TEXT) < np.array([[TEXT], [4], [6]])
    state = rng.normal(size=(BATCH, WIDTHS["state_dim"])).astype(np.float32)
    noise = rng.normal(size=(BATCH, sizes.horizon, WIDTHS["action_dim"])).astype(np.float32)
    t = np.array([1.0, 0.53, 0.007], dtype=np.float32)
    observation = (pixels, image_mask, tokens, token_mask, state)

    # transformers leaves masked cameras out of the prompt, so the rows are packed and padded on the right.
    patches = (IMAGE // sizes.patch) ** 2
    length = CAMERAS * patches + TEXT
    ids, mask = np.zeros((BATCH, length), dtype=np.int64), np.zeros((BATCH, length), dtype=np.int64)
    for row in range(BATCH):
        images = np.full(image_mask[row].sum() * patches, VOCAB)
        packed = np.concatenate([images, tokens[row, token_mask[row]]])
        ids[row, : len(packed)], mask[row, : len(packed)] = packed, 1
    inputs = {
        "state": torch.from_numpy(state),
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "pixel_values": torch.from_numpy(pixels.transpose(0, 1, 4, 2, 3).copy()),
        "pixel_attention_mask": torch.from_numpy(image_mask),
        "noise": torch.from_numpy(noise),
    }
    model = load_transformers(tmp_path, sizes, weights)
    # transformers rounds the frequencies to float32, which turns the fastest angle, 1571 t, by 1e-4.
    embedding = model.embed_action_time.sinusoid_embeds
    exact = 2 * np.pi / (4e-3 * 1000.0 ** np.linspace(0, 1, WIDTHS["expert_width"] // 2))
    np.testing.assert_allclose(embedding.sinusoid_freq, exact, rtol=1e-6)
    embedding.sinusoid_freq = torch.from_numpy(exact)
    with torch.no_grad():
        expected = model(**inputs, timestep=torch.from_numpy(t)).logits.numpy()
    actions = model.sample_actions(**inputs, num_steps=STEPS).numpy()

    assert expected.std() > 0.3
    np.testing.assert_allclose(velocity(weights, sizes, *observation, noise, t), expected, rtol=0, atol=2e-5)
    np.testing.assert_allclose(sample(weights, sizes, *observation, noise, STEPS), actions, rtol=0, atol=1e-4)


@pytest.mark.parametrize("pi05", [False, True])
def test_the_reference_ignores_what_is_masked_and_shows_what_is_not(pi05: bool) -> None:
    sizes = make_sizes(kv_heads=2, pi05=pi05)
    weights = random_weights(sizes, **WIDTHS, seed=3)
    rng = np.random.default_rng(5)
    pixels = rng.uniform(-1, 1, (1, 2, IMAGE, IMAGE, 3))
    tokens, state = rng.integers(0, VOCAB, (1, TEXT)), rng.normal(size=(1, WIDTHS["state_dim"]))
    image_mask, token_mask = np.array([[True, False]]), np.arange(TEXT)[None] < 5
    x, t = rng.normal(size=(1, sizes.horizon, WIDTHS["action_dim"])), np.array([0.4])
    base = velocity(weights, sizes, pixels, image_mask, tokens, token_mask, state, x, t)

    hidden = np.where(image_mask[..., None, None, None], pixels, -pixels)
    other_tokens = np.where(token_mask, tokens, (tokens + 1) % VOCAB)
    same = velocity(weights, sizes, hidden, image_mask, other_tokens, token_mask, state, x, t)
    np.testing.assert_allclose(same, base, rtol=0, atol=1e-12)

    without = velocity(weights, sizes, pixels[:, :1], image_mask[:, :1], tokens[:, :5], token_mask[:, :5], state, x, t)
    np.testing.assert_allclose(without, base, rtol=0, atol=1e-12)

    later = velocity(weights, sizes, pixels, image_mask, tokens, token_mask, state, x, t + 0.1)
    assert np.abs(later - base).max() > 1e-2
    offset = np.full((1, WIDTHS["expert_width"]), 0.5)
    pushed = velocity(weights, sizes, pixels, image_mask, tokens, token_mask, state, x, t, offset)
    assert (np.abs(pushed - base).max() > 1e-2) != pi05
