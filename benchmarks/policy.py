"""π0's speed and memory, beside the π0 of ``transformers`` with the same sizes in the same run.

Needs neither Ray nor a simulator: ``python -m benchmarks.policy --preset pi0 --json FILE`` runs wherever torch and
transformers are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ript_ray.policies.checkpoints import build_policy, from_published, published_bytes, to_publish
from ript_ray.policies.pi0.layout import to_openpi
from ript_ray.policies.pi0.policy import PRESETS, Pi0Config, Pi0Policy
from ript_ray.policies.pi0.prompt import PromptTokenizer
from ript_ray.policies.pi0.transform import Pi0Transform
from ript_ray.policies.policy import Policy

if TYPE_CHECKING:
    from ript_ray.config import Config

_PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}
"""Dense bf16, by what a device's name holds."""
_CAMERAS = 2
_PROMPT = "pick up the alphabet soup and place it in the basket"


def measure_policy(
    preset: str, batches: tuple[int, ...] = (1, 8), train_batch: int = 32, rounds: int = 5, compiled: bool = False
) -> dict[str, Any]:
    """Chunks per second, training samples per second, memory and the share of the device's arithmetic (MFU).

    Args:
        preset: of sizes; transformers has π0 only.
        batches: sizes for inference.
        train_batch: size for training of all weights.
        rounds: each is timed so often, in turns; medians are reported.
        compiled: let ``torch.compile`` fuse the Euler step.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    policy = make_policy(PRESETS[preset]).to(device)
    result: dict[str, Any] = {
        "preset": preset,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "parameters": sum(p.numel() for p in policy.parameters()),
        "torch": torch.__version__,
        "compiled": compiled,  # ours; transformers' runs as it comes
    }
    result["training"] = _measure_training(policy, train_batch, rounds)
    policy.requires_grad_(False).eval()
    for name, parameter in policy.named_parameters():
        parameter.data = parameter.data if policy.keeps_exact(name) else parameter.data.to(dtype)
    theirs = None if policy.config.pi05 else _transformers_pi0(policy).to(dtype)
    if compiled:
        policy.compile_step("max-autotune-no-cudagraphs")
    packed = build_policy(policy.describe(), from_published(to_publish(policy, "int8")[0]), share=True).to(device)
    result["int8_bytes_over_bfloat16"] = published_bytes(policy, "int8") / published_bytes(policy, "bfloat16")
    result["inference"] = [_measure_inference(policy, packed, theirs, batch, rounds) for batch in batches]
    return result


def measure(config: Config) -> dict[str, Any]:
    """The benchmark as ``launch.py bench policy`` runs it."""
    return measure_policy(config.bench.preset, compiled=config.bench.compiled)


def make_policy(config: Pi0Config) -> Pi0Policy:
    """Random weights, and a tokeniser of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", *sorted(set(_PROMPT.split()))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    transform = Pi0Transform(
        state_mean=(0.0,) * 8,
        state_std=(1.0,) * 8,
        action_mean=(0.0,) * 7,
        action_std=(1.0,) * 7,
        relative=(False,) * 7,
        state_width=config.state_dim,
        action_width=config.action_dim,
        image_size=config.vision.image_size,
    )
    return Pi0Policy(config, transform, PromptTokenizer("tokenizer.json", tokenizer.to_str().encode())).eval()


def training_flops(config: Pi0Config, batch: int) -> float:
    """Floating-point operations of a forward and backward pass: 6 for each weight and token, and the attention's.

    Only what is needed counts: of the last layer for images and words the keys and values alone.
    """
    v, lang, expert = config.vision, config.language, config.expert
    patches = (v.image_size // v.patch) ** 2
    seen, acted = _CAMERAS * patches + 12, config.horizon + (not config.pi05)
    vision = v.layers * (4 * v.width**2 + 2 * v.width * v.mlp) + 3 * v.patch**2 * v.width + v.width * lang.width
    vision_attention = v.layers * 2 * patches * v.width

    def layer(sizes: Any) -> tuple[int, int]:
        keys = 2 * sizes.width * sizes.kv_heads * sizes.head_dim
        return keys, keys + 2 * sizes.width * sizes.heads * sizes.head_dim + 3 * sizes.width * sizes.mlp

    keys, whole = layer(lang)
    language = (lang.layers - 1) * whole + keys
    language_attention = (lang.layers - 1) * 2 * seen * lang.heads * lang.head_dim
    acting = expert.layers * layer(expert)[1]
    acting_attention = expert.layers * 2 * (seen + acted) * expert.heads * expert.head_dim
    tokens = (
        _CAMERAS * patches * (vision + vision_attention)
        + seen * (language + language_attention)
        + acted * (acting + acting_attention)
    )
    return 6.0 * batch * tokens


def _measure_inference(policy: Pi0Policy, packed: Policy, theirs: Any, batch: int, rounds: int) -> dict[str, Any]:
    device = next(policy.parameters()).device
    size = policy.config.vision.image_size
    frames = torch.randint(0, 256, (batch, _CAMERAS, size, size, 3), dtype=torch.uint8, device=device)
    states = torch.zeros(batch, 8, device=device)
    noise = torch.randn(batch, policy.horizon, policy.action_dim, device=device)

    def ours() -> Any:
        return policy.act(frames, states, [_PROMPT] * batch, noise)

    runs: dict[str, Callable[[], Any]] = {
        "ours": ours,
        "int8": lambda: packed.act(frames, states, [_PROMPT] * batch, noise),
    }
    if theirs is not None:
        inputs = _their_inputs(policy, theirs, frames, states)
        their_noise = noise.to(next(theirs.parameters()).dtype)
        runs["transformers"] = lambda: theirs.sample_actions(**inputs, noise=their_noise, num_steps=10)
    seconds = _in_turns(runs, rounds)
    result: dict[str, Any] = {
        "batch": batch,
        "chunks_per_second": batch / seconds["ours"],
        "int8_chunks_per_second": batch / seconds["int8"],
    }
    if theirs is not None:
        result["transformers_chunks_per_second"] = batch / seconds["transformers"]
        result["speedup"] = seconds["transformers"] / seconds["ours"]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        ours()
        weights = sum(p.numel() * p.element_size() for p in policy.parameters())
        others = sum(
            tensor.numel() * tensor.element_size()
            for other in (packed, theirs)
            if other is not None
            for tensor in other.state_dict().values()
        )
        result["memory_over_weights"] = (torch.cuda.max_memory_allocated() - others) / weights
    return result


def _measure_training(policy: Pi0Policy, batch: int, rounds: int) -> dict[str, Any]:
    device = next(policy.parameters()).device
    size = policy.config.vision.image_size
    frames = torch.randint(0, 256, (batch, _CAMERAS, size, size, 3), dtype=torch.uint8, device=device)
    states, time_ = torch.zeros(batch, 8, device=device), torch.rand(batch, device=device)
    x = torch.randn(batch, policy.horizon, policy.action_dim, device=device)
    good = torch.ones(batch, dtype=torch.long, device=device)
    if device.type == "cuda":
        policy.checkpoint_activations()
    policy.train()
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-6, fused=device.type == "cuda")

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            features = policy.encode(frames, states, [_PROMPT] * batch)
            loss = policy.velocity(policy.conditioned(features, good), x, time_).float().square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    seconds = _in_turns({"ours": step}, rounds)["ours"]
    flops = training_flops(policy.config, batch) / seconds
    peak = _peak_flops(device)
    memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    return {
        "batch": batch,
        "samples_per_second": batch / seconds,
        "tflops": flops / 1e12,
        "mfu": flops / peak,
        "peak_tflops": peak / 1e12,
        "memory_gb": memory,
    }


def _peak_flops(device: torch.device) -> float:
    """What the maker says of a known GPU, else what a large matrix product reaches."""
    if device.type == "cuda":
        for name, tflops in _PEAK_TFLOPS.items():
            if name in torch.cuda.get_device_name():
                return tflops * 1e12
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    return 2 * n**3 / min(_in_turns({"matmul": lambda: a @ a}, 1)["matmul"] for _ in range(10))


def _in_turns(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, timed in turns after one round of warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            _wait()
            started = time.perf_counter()
            run()
            _wait()
            if i:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _transformers_pi0(policy: Pi0Policy) -> Any:
    """The same sizes and weights in transformers, through its conversion of openpi's names."""
    import tempfile

    from safetensors.torch import save_file
    from transformers import PI0Config, PI0ForConditionalGeneration

    c = policy.config

    def gemma(sizes: Any) -> dict[str, Any]:
        return {
            "model_type": "gemma",
            "hidden_size": sizes.width,
            "intermediate_size": sizes.mlp,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.kv_heads,
            "head_dim": sizes.head_dim,
            "vocab_size": c.vocabulary,
        }

    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": c.vision.width,
        "intermediate_size": c.vision.mlp,
        "num_hidden_layers": c.vision.layers,
        "num_attention_heads": c.vision.heads,
        "patch_size": c.vision.patch,
        "image_size": c.vision.image_size,
        "vision_use_head": False,
    }
    vlm = {
        "model_type": "paligemma",
        "text_config": gemma(c.language),
        "vision_config": vision,
        "projection_dim": c.language.width,
        "image_token_id": c.vocabulary,
    }
    with tempfile.TemporaryDirectory() as folder:
        sizes: dict[str, Any] = {"max_state_dim": c.state_dim, "max_action_dim": c.action_dim, "chunk_size": c.horizon}
        PI0Config(vlm_config=vlm, dit_config=gemma(c.expert), **sizes).save_pretrained(folder)
        weights = {to_openpi(n): w.contiguous() for n, w in policy.state_dict().items() if n != "condition.weight"}
        save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        device, dtype = next(policy.parameters()).device, policy.words.weight.dtype
        theirs: Any = PI0ForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        return theirs.to(device).eval()


def _their_inputs(policy: Pi0Policy, theirs: Any, frames: torch.Tensor, states: torch.Tensor) -> dict[str, Any]:
    batch, device = len(frames), frames.device
    pixels = policy.transform.encode_images(frames).to(policy.words.weight.dtype)
    patches = (policy.config.vision.image_size // policy.config.vision.patch) ** 2
    words = [*policy.tokenizer.encode(_PROMPT), *policy.tokenizer.encode("\n", begin=False)]
    ids = torch.tensor([[policy.config.vocabulary] * (_CAMERAS * patches) + words] * batch, device=device)
    return {
        "state": policy.transform.encode_state(states).to(policy.words.weight.dtype),
        "input_ids": ids,
        "pixel_values": pixels,
        "pixel_attention_mask": torch.ones(batch, _CAMERAS, dtype=torch.bool, device=device),
        "attention_mask": torch.ones_like(ids),
    }


def main() -> None:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="pi0_tiny")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--train-batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = measure_policy(
        options.preset, tuple(options.batches), options.train_batch, options.rounds, options.compiled
    )
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
