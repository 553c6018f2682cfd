"""Checkpoints through `launch.py convert`: every byte arrives, and nothing half."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pi0_reference as reference
import pytest
import torch
from conftest import make_policy
from pi0_reference import Sizes, random_weights
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_tensors
from test_pi0 import SENTENCES, TOKENIZER, make_batch

import launch
from ript_ray.policies.checkpoints import load_policy, save_policy, to_publish
from ript_ray.policies.pi0.layout import from_openpi
from ript_ray.policies.pi0.prompt import PromptTokenizer, prompt_tokens

SIZES = {
    "vision_width": 24,
    "vision_mlp": 40,
    "vision_layers": 2,
    "image": 28,
    "width": 48,
    "mlp": 80,
    "expert_width": 32,
    "expert_mlp": 56,
    "layers": 3,
    "vocab": 340,
    "action_dim": 32,
    "state_dim": 32,
}
RNG = np.random.default_rng(0)


def statistics(size: int, padded: int) -> dict[str, list[float]]:
    mean, std = RNG.normal(size=size), RNG.uniform(0.2, 1, size)
    columns = {"mean": mean, "std": std, "q01": mean - std, "q99": mean + std}
    return {name: [*values.tolist(), *[0.0] * (padded - size)] for name, values in columns.items()}


def make_openpi(folder: Path, pi05: bool, padded: int = 32) -> tuple[Sizes, dict[str, np.ndarray]]:
    """What openpi's PyTorch trainer leaves, with one vision head of 24."""
    sizes = Sizes(vision_heads=1, patch=14, heads=4, kv_heads=1, head_dim=16, horizon=50, pi05=pi05)
    weights = random_weights(sizes, **SIZES, seed=5)
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"action_dim": 32, "action_horizon": 50}))
    (folder / "assets" / "libero").mkdir(parents=True)
    stats = {"state": statistics(8, padded), "actions": statistics(7, padded)}
    (folder / "assets" / "libero" / "norm_stats.json").write_text(json.dumps({"norm_stats": stats}))
    (folder / "tokenizer.model").write_bytes(TOKENIZER.content)
    return sizes, weights


@pytest.mark.parametrize(("pi05", "told"), [(False, 8), (True, 8), (True, 32)])
def test_an_openpi_checkpoint_acts_as_the_reference_and_goes_back_byte_for_byte(
    pi05: bool, told: int, tmp_path: Path
) -> None:
    sizes, weights = make_openpi(tmp_path / "theirs", pi05)
    settings = ["convert.relative=6", *(["convert.prompt_states=32"] if told == 32 else [])]  # as LeRobot had it
    assert launch.main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours"), *settings]) == 0
    policy, batch = load_policy(tmp_path / "ours"), make_batch(2)
    assert policy.transform.relative == (True,) * 6 + (False,)
    noise = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(1))
    acted, _ = policy.act(batch.frames, batch.states, batch.instructions, noise)

    # The same by hand: openpi's formulas on plain arrays.
    stats = json.loads((tmp_path / "theirs/assets/libero/norm_stats.json").read_text())["norm_stats"]

    def unpadded(group: str, name: str, size: int) -> np.ndarray:
        return np.array(stats[group][name][:size])

    raw = batch.states.numpy().astype(np.float64)
    if pi05:
        low, high = unpadded("state", "q01", 8), unpadded("state", "q99", 8)
        state = (raw - low) / (high - low + 1e-6) * 2 - 1
    else:
        state = (raw - unpadded("state", "mean", 8)) / (unpadded("state", "std", 8) + 1e-6)
    padded = np.pad(state, ((0, 0), (0, 24)))
    words = list(padded[:, :told]) if pi05 else [None, None]
    rows = [prompt_tokens(TOKENIZER, text, s, None, 200) for text, s in zip(batch.instructions, words, strict=True)]
    tokens = np.array([row + [0] * (200 - len(row)) for row in rows])
    mask = np.array([[i < len(row) for i in range(200)] for row in rows])
    pixels = policy.transform.encode_images(batch.frames).movedim(2, -1).numpy()
    present = np.ones((2, 2), dtype=bool)
    x = reference.sample(weights, sizes, pixels, present, tokens, mask, padded, noise.numpy())[..., :7]
    if pi05:
        low, high = unpadded("actions", "q01", 7), unpadded("actions", "q99", 7)
        expected = (x + 1) / 2 * (high - low + 1e-6) + low
    else:
        expected = x * (unpadded("actions", "std", 7) + 1e-6) + unpadded("actions", "mean", 7)
    expected[..., :6] += raw[:, None, :6]
    assert np.abs(acted.numpy() - expected).max() < 1e-4

    back = ["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "convert.to=openpi", "convert.asset=libero"]
    assert launch.main(back) == 0
    found = load_file(tmp_path / "back" / "model.safetensors")
    embedding = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
    found[embedding] = found.pop("paligemma_with_expert.paligemma.lm_head.weight")
    assert not found.pop("paligemma_with_expert.gemma_expert.lm_head.weight").any()
    assert {name: (w.dtype, w.tobytes()) for name, w in found.items()} == {
        name: (w.dtype, w.tobytes()) for name, w in weights.items()
    }
    written = json.loads((tmp_path / "back/assets/libero/norm_stats.json").read_text())["norm_stats"]
    for group, size in (("state", 8), ("actions", 7)):
        for name in ("q01", "q99") if pi05 else ("mean", "std"):
            np.testing.assert_allclose(written[group][name], stats[group][name][:size], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_source_of_less_precision_becomes_float32_of_the_same_values(dtype: torch.dtype, tmp_path: Path) -> None:
    _, weights = make_openpi(tmp_path / "theirs", pi05=False)
    rough = {name: torch.from_numpy(w).to(dtype) for name, w in weights.items()}
    save_tensors(rough, tmp_path / "theirs" / "model.safetensors")
    assert launch.main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    policy, batch = load_policy(tmp_path / "ours"), make_batch(2)
    published, _ = to_publish(policy)
    for name, tensor in rough.items():
        expected = torch.tensor(tensor.tolist(), dtype=torch.float32)
        np.testing.assert_array_equal(published[from_openpi(name)], expected.numpy(), strict=True)
    acted, _ = policy.act(batch.frames, batch.states, batch.instructions, torch.randn(2, 50, 32))
    assert acted.isfinite().all()


def test_a_policy_that_is_told_good_in_words_has_no_place_in_openpi(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch.main(["convert", "random:pi0_tiny", str(tmp_path / "words"), "convert.condition=text"]) == 0
    assert launch.main(["convert", str(tmp_path / "words"), str(tmp_path / "theirs"), "convert.to=openpi"]) == 2
    assert 'prompts that end in "Advantage: positive"' in capsys.readouterr().err
    assert not (tmp_path / "theirs").exists()


def test_a_tokeniser_that_was_saved_with_padding_pads_nothing() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<bos>": 0, "<pad>": 1, "open": 2, "the": 3, "drawer": 4}
    theirs = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    theirs.pre_tokenizer = pre_tokenizers.Whitespace()
    theirs.enable_padding(length=48, pad_id=1, pad_token="<pad>")
    theirs.enable_truncation(2)
    assert len(theirs.encode("open the drawer").ids) == 48
    tokenizer = PromptTokenizer("tokenizer.json", theirs.to_str().encode())
    assert tokenizer.encode("open the drawer") == [0, 2, 3, 4]


def test_statistics_of_a_robot_keep_what_stands_still_and_padding_goes(tmp_path: Path) -> None:
    make_openpi(tmp_path / "theirs", pi05=False, padded=8)  # the last of eight action dimensions is always 0
    assert launch.main(["convert", str(tmp_path / "theirs"), str(tmp_path / "robot")]) == 0
    assert len(load_policy(tmp_path / "robot").transform.action_mean) == 8
    make_openpi(tmp_path / "padded", pi05=False, padded=32)
    assert launch.main(["convert", str(tmp_path / "padded"), str(tmp_path / "trimmed")]) == 0
    assert len(load_policy(tmp_path / "trimmed").transform.action_mean) == 7


def test_lerobot_s_own_words_on_normalisation_and_relative_actions_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "theirs"
    make_openpi(theirs, pi05=True)
    stats = json.loads((theirs / "assets/libero/norm_stats.json").read_text())["norm_stats"]
    middles = {"state": stats["state"]["mean"][:8], "actions": stats["actions"]["mean"][:7]}
    # Quantiles that are not as far from the mean on both sides.
    stats["state"]["q99"], stats["actions"]["q99"] = (
        [high + 1 if high else 0 for high in stats[group]["q99"]] for group in ("state", "actions")
    )
    (theirs / "assets/libero/norm_stats.json").write_text(json.dumps({"norm_stats": stats}))

    def converted(config: dict[str, object], *settings: str) -> tuple[bool, bool]:
        """Are state and actions normalised by their means?"""
        (theirs / "config.json").write_text(json.dumps({"type": "pi05", "chunk_size": 50} | config))
        target = tmp_path / str(len(list(tmp_path.iterdir())))
        assert launch.main(["convert", str(theirs), str(target), *settings]) == 0
        transform = load_policy(target).transform
        found = (transform.state_mean, transform.action_mean)
        return found[0] == tuple(middles["state"]), found[1] == tuple(middles["actions"])

    def refused(config: dict[str, object]) -> str:
        (theirs / "config.json").write_text(json.dumps({"type": "pi05"} | config))
        assert launch.main(["convert", str(theirs), str(tmp_path / "never")]) == 2
        return capsys.readouterr().err

    def mapping(state: str, action: str) -> dict[str, object]:
        return {"normalization_mapping": {"VISUAL": "IDENTITY", "STATE": state, "ACTION": action}}

    assert converted({}) == (False, False)
    assert converted(mapping("QUANTILES", "MEAN_STD")) == (False, True)
    assert converted(mapping("QUANTILES", "MEAN_STD"), "convert.normalise=z_score") == (True, True)
    assert "actions by MIN_MAX; expected MEAN_STD or QUANTILES" in refused(mapping("MEAN_STD", "MIN_MAX"))
    relative = mapping("MEAN_STD", "MEAN_STD") | {"use_relative_actions": True}
    assert "set convert.relative" in refused(relative)
    assert converted(relative, "convert.relative=6")[0]

    norm_map = mapping("MEAN_STD", "QUANTILES")["normalization_mapping"]
    for kind, step in (("pre", "normalizer_processor"), ("post", "unnormalizer_processor")):
        steps = [
            {"registry_name": "relative_actions_processor", "config": {"enabled": False, "exclude_joints": []}},
            {"registry_name": step, "config": {"eps": 1e-8, "features": {}, "norm_map": norm_map}},
        ]
        (theirs / f"policy_{kind}processor.json").write_text(json.dumps({"name": kind, "steps": steps}))
    assert converted(mapping("QUANTILES", "MEAN_STD")) == (True, False)
    steps[0]["config"]["enabled"] = True
    (theirs / "policy_preprocessor.json").write_text(json.dumps({"name": "pre", "steps": steps[:1]}))
    assert "set convert.relative" in refused({})


@pytest.mark.parametrize(("pi05", "in_prompt"), [(False, False), (True, True), (True, False)])
def test_a_learnt_condition_becomes_part_of_what_is_exported(pi05: bool, in_prompt: bool, tmp_path: Path) -> None:
    make_openpi(tmp_path / "theirs", pi05=pi05)
    told = ["convert.relative=5", f"convert.state_in_prompt={in_prompt}"]
    assert launch.main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours"), *told]) == 0
    policy, batch = load_policy(tmp_path / "ours"), make_batch(2)
    policy.condition.weight.data.normal_()
    save_policy(tmp_path / "learnt", policy)
    assert launch.main(["convert", str(tmp_path / "learnt"), str(tmp_path / "openpi"), "convert.to=openpi"]) == 0
    assert launch.main(["convert", str(tmp_path / "openpi"), str(tmp_path / "again"), "convert.condition=none"]) == 0
    assert load_policy(tmp_path / "again").transform.relative == policy.transform.relative == (True,) * 5 + (False,) * 2
    assert load_policy(tmp_path / "again").config.state_in_prompt == policy.config.state_in_prompt == in_prompt
    noise = torch.randn(2, 50, 32)
    seen = batch.frames, batch.states, batch.instructions, noise
    expected = policy.act(*seen)[0]
    torch.testing.assert_close(load_policy(tmp_path / "again").act(*seen)[0], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(load_policy(tmp_path / "ours").act(*seen)[0], expected, rtol=1e-2, atol=1e-2)


def test_what_is_missing_or_does_not_fit_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, weights = make_openpi(tmp_path / "whole", pi05=False)

    def refused(change: dict[str, np.ndarray | None], *settings: str) -> str:
        changed = {name: w for name, w in (weights | change).items() if w is not None}
        save_file(changed, tmp_path / "whole" / "model.safetensors")
        assert launch.main(["convert", str(tmp_path / "whole"), str(tmp_path / "target"), *settings]) == 2
        assert not (tmp_path / "target").exists()
        return capsys.readouterr().err

    layer = "paligemma_with_expert.gemma_expert.model.layers.1.mlp.up_proj.weight"
    assert "expert.layers.1.mlp.up_proj.weight should be (56, 32), the file has nothing" in refused({layer: None})
    assert "the file has (55, 32)" in refused({layer: weights[layer][:-1]})
    assert "unheard.of should be absent" in refused({"unheard.of": np.zeros(3, dtype=np.float32)})
    assert "patch_embedding" in refused({n: None for n in weights if "patch_embedding" in n})
    assert "has libero" in refused({}, "convert.asset=droid")
    assert "expected tokenizer.model or tokenizer.json" in refused({}, f"convert.tokenizer={tmp_path}")
    assert "convert.relative=9: there are 7" in refused({}, "convert.relative=9")
    words = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
    assert "the tokeniser knows" in refused({words: weights[words][:100]})
    assert "action_in_proj.weight': (" in refused({"action_in_proj.weight": weights["action_in_proj.weight"][0]})
    (tmp_path / "whole/assets/libero/norm_stats.json").unlink()
    assert "launch.py stats" in refused({})
    assert launch.main(["convert", "random:pi1", str(tmp_path / "target")]) == 2
    assert "random:pi0_tiny" in capsys.readouterr().err
    save_policy(tmp_path / "flow", make_policy())
    assert launch.main(["convert", str(tmp_path / "flow"), str(tmp_path / "target")]) == 2
    assert "only 'pi0' converts" in capsys.readouterr().err
    assert launch.main(["convert", "random:pi0_tiny", str(tmp_path / "none"), "convert.stats=mine.json"]) == 2
    assert "convert.stats='mine.json': the source makes its statistics up" in capsys.readouterr().err
    assert launch.main(["convert", "random:pi0_tiny", str(tmp_path / "text"), "convert.condition=text"]) == 0
    assert load_policy(tmp_path / "text").describe()["config"]["condition"] == "text"
    assert launch.main(["convert", str(tmp_path / "text"), str(tmp_path / "none"), "convert.condition=none"]) == 2
    assert "convert.condition='none': the source is a policy of this project already" in capsys.readouterr().err
    assert launch.main(["convert", "random:pi0_tiny", str(tmp_path / "flow")]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["pi0_tiny", "pi05_tiny"])
def test_a_random_one_acts(preset: str, tmp_path: Path) -> None:
    assert launch.main(["convert", f"random:{preset}", str(tmp_path / "p")]) == 0
    policy, batch = load_policy(tmp_path / "p"), make_batch(2)
    chunk, _ = policy.act(batch.frames, batch.states, SENTENCES[:2], torch.randn(2, 50, 32), guidance=2.0)
    assert chunk.shape == (2, 50, 7)
    assert torch.isfinite(chunk).all()
