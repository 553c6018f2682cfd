"""π0 checkpoints of others become policies of this project, and the other way; random ones for tests and benchmarks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch

from ript_ray.config import ConvertConfig
from ript_ray.errors import UserError
from ript_ray.policies.checkpoints import build_policy, load_policy, save_policy
from ript_ray.policies.pi0.gemma import GemmaSizes
from ript_ray.policies.pi0.layout import from_openpi, to_openpi
from ript_ray.policies.pi0.norm_stats import NormStats, lerobot_rules, parse_stats, read_json
from ript_ray.policies.pi0.openpi import Checkpoint, open_checkpoint, write_openpi
from ript_ray.policies.pi0.policy import PRESETS, Pi0Config, Pi0Policy, VisionSizes, description_of
from ript_ray.policies.pi0.prompt import PromptTokenizer
from ript_ray.policies.pi0.transform import Pi0Transform, quantile, quantiles_of, z_score
from ript_ray.policies.transform import check_relative

_HEAD_DIM = 72
"""Of So400m/14, the vision tower of every published π0."""
RANDOM = "random:"
_TELLING = ("vision.embeddings.patch_embedding.weight", "words.weight", "action_in_proj.weight", "state_proj.weight")
"""Tensors whose shape is taken apart."""
_RULES = {"z_score": z_score, "quantile": quantile}
_LEROBOT_RULES = {"MEAN_STD": "z_score", "QUANTILES": "quantile"}


def convert(source: str, target: Path, settings: ConvertConfig) -> dict[str, Any]:
    """Write ``target`` from ``source``.

    Args:
        source: a folder of openpi (JAX or PyTorch), LeRobot or this project; or ``random:`` and a name of `PRESETS`.
        target: a folder that does not exist.
        settings: what the source does not say.

    Raises:
        UserError: when something is missing, unknown, misshapen or in the way.
    """
    if target.exists():
        raise UserError(f"{target} exists already; choose another folder or remove it")
    if source.startswith(RANDOM):
        policy = random_policy(source.removeprefix(RANDOM), settings)
    elif (Path(source) / "policy.json").is_file():
        loaded = load_policy(Path(source))
        if not isinstance(loaded, Pi0Policy):
            raise UserError(f"{source} is a policy of type {loaded.kind!r}; only 'pi0' converts")
        _refuse(
            settings, {"to", "asset"}, "is a policy of this project already; only convert.to and convert.asset say how"
        )
        policy = loaded
    else:
        policy = adopt(open_checkpoint(Path(source)), settings)
    if settings.to == "openpi":
        export(policy, target, settings.asset or "ript_ray")
    else:
        save_policy(target, policy, about={"source": source})
    return {
        "source": source,
        "target": str(target),
        "model": "pi05" if policy.config.pi05 else "pi0",
        "parameters": sum(p.numel() for p in policy.parameters()),
        "horizon": policy.horizon,
    }


def adopt(checkpoint: Checkpoint, settings: ConvertConfig) -> Pi0Policy:
    """The policy of somebody's checkpoint, in float32; every tensor is read once and must fit."""
    shapes = {from_openpi(name): tuple(shape) for name, shape in checkpoint.tensors.shapes.items()}
    config = infer_config(shapes, checkpoint.config, settings)
    stats = _stats(checkpoint, settings)
    modes, relative = lerobot_rules(checkpoint.path, checkpoint.config)
    if relative and not settings.relative:
        raise UserError(
            f"convert.relative=0: {checkpoint.path} says that its actions are relative to the state "
            "(use_relative_actions); expected the number of first action dimensions that are: set convert.relative, as "
            "5 for an SO100 arm whose gripper is not (relative_exclude_joints)"
        )
    if checkpoint.config.get("adapt_to_pi_aloha"):
        raise UserError(
            f"{checkpoint.path} was trained with adapt_to_pi_aloha=true: its joints are turned and its grippers scaled "
            "to those of openpi's Aloha, which this project does not do; expected a checkpoint without"
        )
    settings = settings.model_copy(update={"relative": settings.relative or int(checkpoint.config.get("relative", 0))})
    tokenizer = PromptTokenizer.load(Path(settings.tokenizer) if settings.tokenizer else checkpoint.path)
    _check_words(tokenizer, config)
    transform = make_transform(config, stats, settings, modes)
    weights = {from_openpi(name): _in_float32(checkpoint.tensors.load(name)) for name in checkpoint.tensors.shapes}
    if config.condition == "embedding":
        weights["condition.weight"] = torch.zeros(2, config.expert.width)
    description = description_of(config, transform, tokenizer)
    return cast("Pi0Policy", build_policy(description, weights, share=True))


def infer_config(shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, Any], settings: ConvertConfig) -> Pi0Config:
    """Sizes from the shapes of the tensors, and what these do not tell from ``config.json`` and the settings.

    Args:
        shapes: by this project's names.
        found: the source's ``config.json``.
        settings: take precedence.
    """
    try:
        pi05 = "time_mlp_in.weight" in shapes
        width, _, patch, _ = shapes["vision.embeddings.patch_embedding.weight"]
        places = shapes["vision.embeddings.position_embedding.weight"][0]
        vision = VisionSizes(
            width=width,
            mlp=shapes["vision.encoder.layers.0.mlp.fc1.weight"][0],
            layers=_count(shapes, "vision.encoder.layers."),
            heads=int(found.get("vision_heads", max(1, width // _HEAD_DIM))),
            patch=patch,
            image_size=math.isqrt(places) * patch,
        )
        expert_width, action_dim = shapes["action_in_proj.weight"]
        return Pi0Config(
            pi05=pi05,
            horizon=settings.horizon or int(found.get("action_horizon") or found.get("chunk_size") or 50),
            action_dim=action_dim,
            state_dim=action_dim if pi05 else shapes["state_proj.weight"][1],
            vocabulary=shapes["words.weight"][0],
            max_tokens=200 if pi05 else 48,
            state_in_prompt=bool(_said(settings.state_in_prompt, found.get("state_in_prompt"), pi05)),
            prompt_states=_said(settings.prompt_states, found.get("prompt_states")),
            condition=settings.condition,
            vision=vision,
            language=_gemma(shapes, "language.", shapes["words.weight"][1]),
            expert=_gemma(shapes, "expert.", expert_width),
        )
    except KeyError as error:
        raise UserError(f"the checkpoint has no tensor {to_openpi(str(error.args[0]))!r}; it is incomplete") from error
    except (ValueError, IndexError) as error:  # a tensor that tells a size has another number of dimensions
        told = {to_openpi(name): shapes[name] for name in _TELLING if name in shapes}
        raise UserError(f"a tensor of the checkpoint has the wrong number of dimensions: {told}") from error


def make_transform(
    config: Pi0Config, stats: NormStats, settings: ConvertConfig, modes: Mapping[str, str] = MappingProxyType({})
) -> Pi0Transform:
    """The transform of a checkpoint.

    Args:
        config: sizes.
        stats: of ``state`` and ``actions``.
        settings: ``normalise`` overrules what the checkpoint says and what is usual.
        modes: LeRobot's names of how ``state`` and ``actions`` are normalised; where there is none, what is usual:
            z-scores for π0, quantiles for π0.5.

    Raises:
        UserError: when the statistics lack something, a mode is another, or too many dimensions shall be relative.
    """
    state = _normalised("state", stats, _rule("state", config, settings, modes), config.state_dim)
    actions = _normalised("actions", stats, _rule("actions", config, settings, modes), config.action_dim)
    check_relative("convert.relative", settings.relative, len(actions[0]), len(state[0]))
    return Pi0Transform(
        state_mean=state[0],
        state_std=state[1],
        action_mean=actions[0],
        action_std=actions[1],
        relative=tuple(i < settings.relative for i in range(len(actions[0]))),
        state_width=config.state_dim,
        action_width=config.action_dim,
        image_size=config.vision.image_size,
    )


def export(policy: Pi0Policy, target: Path, asset: str) -> None:
    """Write openpi's PyTorch layout.

    It has no place for the condition: in π0 "good" becomes part of the state token's bias, in π0.5 of the biases of the
    expert's norms, which are linear in it. The result acts as this policy does with a guidance of 1.

    Raises:
        UserError: for a policy that is told it in the prompt.
    """
    if policy.config.condition == "text":
        raise UserError(
            'convert.to=openpi: this policy acts on prompts that end in "Advantage: positive", which openpi\'s would '
            "not; expected a policy converted with convert.condition=embedding or none"
        )
    weights = {name: tensor.detach() for name, tensor in policy.state_dict().items()}
    condition = weights.pop("condition.weight", None)
    if condition is not None and condition.any():
        if policy.config.pi05:
            for name in [n for n in weights if n.startswith("expert.") and n.endswith("norm.dense.bias")]:
                weights[name] = weights[name] + weights[name.removesuffix("bias") + "weight"] @ condition[1]
        else:
            weights["state_proj.bias"] = weights["state_proj.bias"] + condition[1]
    transform, c = policy.transform, policy.config
    stats: NormStats = {
        "state": _as_stats(transform.state_mean, transform.state_std, c.pi05),
        "actions": _as_stats(transform.action_mean, transform.action_std, c.pi05),
    }
    config = {
        "action_dim": c.action_dim,
        "action_horizon": c.horizon,
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "precision": str(weights["words.weight"].dtype).removeprefix("torch."),
        # What openpi's own configuration says in Python, for who converts it back.
        "vision_heads": c.vision.heads,
        "relative": sum(transform.relative),
        "state_in_prompt": c.state_in_prompt,
        "prompt_states": c.prompt_states,
    }
    write_openpi(target, {to_openpi(name): tensor for name, tensor in weights.items()}, config, stats, asset)
    (target / policy.tokenizer.file).write_bytes(policy.tokenizer.content)


def random_policy(preset: str, settings: ConvertConfig) -> Pi0Policy:
    """Random weights of a preset's sizes, with a tokeniser that knows LIBERO's instructions."""
    from ript_ray.envs.tasks import all_task_ids, find_task

    if preset not in PRESETS:
        raise UserError(f"{RANDOM}{preset}: expected one of {', '.join(RANDOM + name for name in PRESETS)}")
    _refuse(settings, set(ConvertConfig.model_fields) - {"stats"}, "makes its statistics up")
    config = PRESETS[preset]
    config = replace(
        config,
        condition=settings.condition,
        horizon=settings.horizon or config.horizon,
        state_in_prompt=config.state_in_prompt if settings.state_in_prompt is None else settings.state_in_prompt,
        prompt_states=settings.prompt_states,
    )
    if settings.tokenizer:
        tokenizer = PromptTokenizer.load(Path(settings.tokenizer))
    else:
        sentences = sorted({find_task(task).instruction for task in all_task_ids()})
        tokenizer = PromptTokenizer.train(sentences, 512)
    _check_words(tokenizer, config)
    unit: NormStats = {
        group: {"mean": [0.0] * size, "std": [1.0] * size, "q01": [-1.0] * size, "q99": [1.0] * size}
        for group, size in (("state", 8), ("actions", 7))
    }
    torch.manual_seed(0)
    return Pi0Policy(config, make_transform(config, unit, settings), tokenizer).eval()


def _refuse(settings: ConvertConfig, used: set[str], why: str) -> None:
    """Settings that would change nothing are mistakes."""
    usual = ConvertConfig()
    for key in ConvertConfig.model_fields:
        if key not in used and getattr(settings, key) != getattr(usual, key):
            raise UserError(f"convert.{key}={getattr(settings, key)!r}: the source {why}; leave it out")


def _check_words(tokenizer: PromptTokenizer, config: Pi0Config) -> None:
    """Every token must have its embedding."""
    if tokenizer.size > config.vocabulary:
        raise UserError(
            f"the tokeniser knows {tokenizer.size} tokens, the model {config.vocabulary}; expected the tokeniser that "
            "it was trained with: set convert.tokenizer"
        )


def _stats(checkpoint: Checkpoint, settings: ConvertConfig) -> NormStats:
    if settings.stats:
        return parse_stats(read_json(Path(settings.stats)).get("norm_stats"), settings.stats)
    if settings.asset:
        if settings.asset not in checkpoint.assets:
            known = ", ".join(sorted(checkpoint.assets)) or "none"
            raise UserError(f"convert.asset={settings.asset!r}: {checkpoint.path} has {known}")
        return checkpoint.assets[settings.asset]
    stats = checkpoint.norm_stats
    if stats is None:
        raise UserError(
            f"{checkpoint.path} has no normalisation statistics; compute them with 'python launch.py stats' and set "
            "convert.stats=norm_stats.json"
        )
    return stats


def _said(*values: Any) -> Any:
    """The first that says something."""
    return next((value for value in values if value is not None), None)


def _in_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Policies are kept in float32, whatever their source holds; ``policy.precision`` says what actors hold."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _rule(group: str, config: Pi0Config, settings: ConvertConfig, modes: Mapping[str, str]) -> str:
    """The name in `_RULES` of how a group is normalised."""
    if settings.normalise or group not in modes:
        return settings.normalise or ("quantile" if config.pi05 else "z_score")
    if modes[group] not in _LEROBOT_RULES:
        raise UserError(
            f"the checkpoint normalises its {group} by {modes[group]}; expected {' or '.join(_LEROBOT_RULES)}: set "
            "convert.normalise to the rule that does the same with statistics of yours, and convert.stats to these"
        )
    return _LEROBOT_RULES[modes[group]]


def _normalised(group: str, stats: NormStats, rule: str, width: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of a group by a rule."""
    try:
        return _RULES[rule](_without_padding(stats[group], width))
    except (KeyError, TypeError) as error:
        raise UserError(
            f"convert.normalise={rule}: the statistics lack what it needs ({error}); expected 'state' and 'actions' "
            f"with {'q01 and q99' if rule == 'quantile' else 'mean and std'}: choose the other rule, or compute them "
            "with 'python launch.py stats' and set convert.stats"
        ) from error


def _without_padding(group: Mapping[str, list[float] | None], width: int) -> dict[str, list[float]]:
    """Statistics without the dimensions behind that never hold anything, where they are as many as the model's.

    Some checkpoints have 32 for any robot; fewer are a robot's own, and one that stands still is one of them.
    """
    deviations = group["std"] or []
    size = len(deviations)
    if size == width:
        size = max((i + 1 for i, value in enumerate(deviations) if value), default=0)
    return {name: values[:size] for name, values in group.items() if values is not None}


def _as_stats(mean: tuple[float, ...], std: tuple[float, ...], pi05: bool) -> dict[str, list[float] | None]:
    q01, q99 = quantiles_of(mean, std) if pi05 else (None, None)
    return {"mean": list(mean), "std": list(std), "q01": q01, "q99": q99}


def _gemma(shapes: Mapping[str, tuple[int, ...]], prefix: str, width: int) -> GemmaSizes:
    first = f"{prefix}layers.0."
    inner, head_dim = shapes[f"{first}self_attn.q_proj.weight"][0], shapes[f"{first}self_attn.k_proj.weight"][0]
    # All published sizes share one key head between all query heads.
    return GemmaSizes(
        width=width,
        mlp=shapes[f"{first}mlp.gate_proj.weight"][0],
        layers=_count(shapes, f"{prefix}layers."),
        heads=inner // head_dim,
        kv_heads=1,
        head_dim=head_dim,
    )


def _count(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in shapes if name.startswith(prefix))
