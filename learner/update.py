"""The update: micro-batches in, better weights out. No Ray here; supervised training uses the same loop."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import Parameter

from learner.sharding import copy_whole, is_divided, shard, whole
from ript_ray.algos.objectives import Draw, find_objective, traits_of
from ript_ray.config import ObjectiveConfig, TrainConfig
from ript_ray.policies.adapt import adapt, autocast, merge_lora
from ript_ray.policies.policy import Policy, draw_shifts, sample_time, shift_images
from ript_ray.types import Batch

_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "unable to find an engine")
"""As PyTorch's CPU allocator, CUDA, cuBLAS and cuDNN, and cuDNN again, say it."""
_LOSS_SCALE = 65536.0
"""Of ``train.precision=float16`` at the beginning of an update, as PyTorch's ``GradScaler`` begins."""
Load = Callable[[], Batch]
"""Gathers one micro-batch; called when its turn comes, so that only one is in memory."""


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step of one learner."""

    micro_batches: Sequence[Load]
    rows: int
    """Windows of this learner: of its micro-batches together."""
    batch_size: int
    """Windows of all learners together, by which the loss is divided."""


class NonFinite(RuntimeError):
    """A loss, a gradient or weights became NaN or infinite; the policy is not to be used any more.

    Args:
        step: index of the optimiser step.
        message: what was found and what to try.
    """

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


_State = tuple[torch.Tensor, dict[str, torch.Tensor], int]


@dataclass(slots=True)
class _Terms:
    """What the loss of an update is made of."""

    policy: Policy
    train: TrainConfig
    objective: ObjectiveConfig
    generator: torch.Generator
    reference: Policy | None
    """The policy before the update, if the objective compares with it."""
    anchor: Policy | None
    """The starting policy, if a change since then is penalised."""
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    """Sum over samples of each diagnostic."""
    samples: int = 0
    scale: float = 1.0
    """Factor of the loss in the backward pass, a power of two: gradients below 6e-8 would vanish in float16."""

    def state(self) -> _State:
        """What a step changes before the optimiser's."""
        return self.generator.get_state(), dict(self.sums), self.samples

    def go_back(self, state: _State) -> None:
        """Before the step: it draws the same noise again."""
        random, sums, self.samples = state
        self.generator.set_state(random)
        self.sums = dict(sums)

    def note(self, name: str, values: torch.Tensor) -> None:
        """Add one diagnostic of some samples; on the policy's device, so that nothing waits for it."""
        self.sums[name] = self.sums.get(name, values.new_zeros(())) + values.detach().sum()


def update(
    policy: Policy,
    steps: Sequence[Step],
    train: TrainConfig,
    objective: ObjectiveConfig,
    generator: torch.Generator,
    on_step: Callable[[int, float], None] | None = None,
    anchor: Policy | None = None,
    mesh: DeviceMesh | None = None,
    averaging: bool = True,
) -> tuple[Policy, dict[str, float]]:
    """Train ``policy`` in place on all ``steps``: AdamW, warm-up and cosine, accumulation, clipping.

    Args:
        policy: in float32, on its device; with ``mesh`` on the CPU.
        steps: what this learner does; every learner has the same number of steps.
        train: optimisation settings.
        objective: the loss.
        generator: draws noise, times, chances and image shifts, on the CPU.
        on_step: called after each step with its index and loss.
        anchor: the starting policy, for ``train.anchor``; the policy before this update by default.
        mesh: of the learners that divide what they train among them (``train.shard``); each trains all by default.
        averaging: act with the moving average, if ``train.ema`` wants one.

    Returns:
        The policy to act with (``policy`` itself, or its moving average as ``train.ema`` says), and diagnostics:
        ``loss`` (mean of the last tenth of steps), ``loss_first`` (of the first), ``grad_norm`` (mean), ``pieces``
        (how often each micro-batch had to be divided to fit into memory, 1 for not at all), and the means of what the
        objective names.

    Raises:
        NonFinite: for a NaN or an infinity in losses, gradients or weights.
    """
    needs_before = traits_of(objective).compares_with_reference or (train.anchor > 0 and anchor is None)
    before = _frozen(policy, mesh) if needs_before else None
    if anchor is not None and mesh is not None:
        anchor = _frozen(anchor, mesh)
    trainable = {name: p.requires_grad for name, p in policy.named_parameters()}
    adapt(policy, train)
    trained = policy if mesh is None else shard(copy.deepcopy(policy), mesh)
    if train.checkpoint_activations:
        trained.checkpoint_activations()
    parameters = _trained_parameters(trained)
    # On a GPU the fused kernel needs no copy of what is trained, nor one launch for each tensor.
    on_gpu = parameters[0].device.type == "cuda"
    optimiser = torch.optim.AdamW(
        _groups(trained, train.condition_lr), lr=train.lr, weight_decay=train.weight_decay, fused=on_gpu or None
    )
    terms = _Terms(trained, train, objective, generator, before, (anchor or before) if train.anchor > 0 else None)
    if train.precision == "float16":
        terms.scale = _LOSS_SCALE
    average: list[torch.Tensor] = []
    losses: list[float] = []
    norms: list[float] = []
    pieces = 1
    trained.train()
    for index, step in enumerate(steps):
        loss, norm, pieces = _gradients(terms, step, parameters, pieces)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise NonFinite(
                index,
                f"step {index}: loss {loss.item():.4g}, gradient norm {norm.item():.4g}; try a lower train.lr "
                f"(now {train.lr}) or train.precision=float32",
            )
        for group in optimiser.param_groups:
            group["lr"] = group["factor"] * learning_rate(index, len(steps), train.lr, train.warmup)
        optimiser.step()
        if averaging and train.ema > 0:
            average = _averaged(average, parameters, train.ema)
        losses.append(loss.item())
        norms.append(norm.item())
        if on_step is not None:
            on_step(index, losses[-1])
    if not torch.isfinite(whole(torch.nn.utils.get_total_norm([p.detach() for p in parameters]))):
        raise NonFinite(len(steps) - 1, f"the weights after the last step; try a lower train.lr (now {train.lr})")
    del optimiser  # its moments and the gradients make room for what follows
    trained.zero_grad(set_to_none=True)
    if mesh is not None:
        copy_whole(parameters, _trained_parameters(policy))
    acting = policy
    if average:
        acting = copy.deepcopy(policy)
        copy_whole(average, _trained_parameters(acting))
    for result in {policy, acting}:
        _finish(result, trainable)
    tenth = max(1, len(losses) // 10)
    return acting, {
        "loss_first": sum(losses[:tenth]) / tenth,
        "loss": sum(losses[-tenth:]) / tenth,
        "grad_norm": sum(norms) / len(norms),
        "pieces": float(pieces),
        **{name: value.item() / terms.samples for name, value in terms.sums.items()},
    }


def _finish(policy: Policy, trainable: Mapping[str, bool]) -> None:
    """Leave nothing of how it was trained but the weights."""
    merge_lora(policy)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(trainable[name])
    policy.eval()


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over the first share ``warmup`` of ``steps``, then a cosine to zero."""
    rising = max(1, math.ceil(steps * warmup))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def _frozen(policy: Policy, mesh: DeviceMesh | None) -> Policy:
    frozen = copy.deepcopy(policy).eval().requires_grad_(False)
    return frozen if mesh is None else shard(frozen, mesh)


def _trained_parameters(policy: Policy) -> list[Parameter]:
    return [parameter for parameter in policy.parameters() if parameter.requires_grad]


def _groups(policy: Policy, factor: float) -> list[dict[str, Any]]:
    """What is trained, apart what tells the policy its condition, whose learning rate has a factor."""
    named = [(name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad]
    told = [parameter for name, parameter in named if name.startswith("condition.")]
    rest = [parameter for name, parameter in named if not name.startswith("condition.")]
    return [{"params": p, "factor": f} for p, f in ((rest, 1.0), (told, factor)) if p]


@torch.no_grad()
def _averaged(average: list[torch.Tensor], parameters: list[Parameter], decay: float) -> list[torch.Tensor]:
    """The exponential moving average after one more step; it begins at the weights after the first."""
    if not average:
        return [parameter.detach().clone() for parameter in parameters]
    for mean, parameter in zip(average, parameters, strict=True):
        mean.lerp_(parameter, 1 - decay)
    return average


def _gradients(
    terms: _Terms, step: Step, parameters: list[Parameter], pieces: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The clipped gradients of a step, over all learners.

    Where scaled gradients leave the range of float16, the step begins again with half the factor: none is left out, and
    all learners do so alike, since they see the same sums.

    Returns:
        Loss, norm of the gradient before it was clipped, and the pieces that each micro-batch was divided into.
    """
    before = terms.state()
    while True:
        loss, pieces = _accumulate_that_fits(terms, step, pieces)
        if is_divided(terms.policy):
            dist.all_reduce(loss)
        elif dist.is_initialized() and dist.get_world_size() > 1:
            _sum_over_learners(parameters, loss)
        if terms.scale != 1.0:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(terms.scale)
        norm = whole(torch.nn.utils.clip_grad_norm_(parameters, terms.train.clip_norm))
        if torch.isfinite(norm) or not torch.isfinite(loss) or terms.scale <= 1.0:
            return loss, norm, pieces
        terms.scale /= 2
        terms.go_back(before)


def _accumulate_that_fits(terms: _Terms, step: Step, pieces: int) -> tuple[torch.Tensor, int]:
    """Accumulate the gradients of a step; when memory runs out, start the step again with smaller pieces.

    The noise is drawn again from the same state and losses are sums, so the gradients do not change beyond rounding.
    """
    before = terms.state()
    while True:
        try:
            terms.policy.zero_grad(set_to_none=True)
            return _accumulate(terms, step, pieces), pieces
        except (torch.OutOfMemoryError, RuntimeError) as error:
            # Learners that divide the weights among them must all do the same, or wait for each other for ever.
            if not _is_out_of_memory(error) or pieces >= terms.train.micro_batch or is_divided(terms.policy):
                raise
        pieces *= 2
        terms.go_back(before)
        torch.cuda.empty_cache()


def _accumulate(terms: _Terms, step: Step, pieces: int) -> torch.Tensor:
    policy = terms.policy
    device = next(policy.parameters()).device
    total = torch.zeros((), device=device)
    chances: Chances | None = None
    done = 0
    for load in step.micro_batches:
        batch = load()
        chances = chances or Chances.draw(terms, step.rows, batch.frames.shape[1])
        own = chances[done : done + len(batch)]
        done += len(batch)
        if own.shifts is not None:
            batch.frames = shift_images(batch.frames, own.shifts)
        size = -(-len(batch) // pieces)
        for start in range(0, len(batch), size):
            rows = slice(start, start + size)
            eps, t, u = (tensor[rows].to(device) for tensor in (own.noise, own.time, own.uniform))
            draw = Draw(policy, batch[rows].to(device), eps, t, u, terms.reference)
            with autocast(device.type, terms.train):
                loss = _loss(draw, terms) / step.batch_size
            (loss * terms.scale).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
    return total


@dataclass(frozen=True, slots=True)
class Chances:
    """What is random in a step, drawn for all its windows at once: the size of micro-batches changes nothing."""

    shifts: torch.Tensor | None
    """Of the frames, int64[rows, C, 2], if they are shifted."""
    noise: torch.Tensor
    """float32[rows, T, D]"""
    time: torch.Tensor
    """float32[rows]"""
    uniform: torch.Tensor
    """float32[rows]"""

    @classmethod
    def draw(cls, terms: _Terms, rows: int, cameras: int) -> Chances:
        """For so many windows."""
        policy, generator = terms.policy, terms.generator
        pixels = 0 if traits_of(terms.objective).compares_with_recording else terms.train.image_shift
        return cls(
            shifts=draw_shifts(rows, cameras, pixels, generator) if pixels else None,
            noise=torch.randn(rows, policy.horizon, policy.action_dim, generator=generator),
            time=sample_time(rows, generator),
            uniform=torch.rand(rows, generator=generator),
        )

    def __getitem__(self, rows: slice) -> Chances:
        shifts = None if self.shifts is None else self.shifts[rows]
        return Chances(shifts, self.noise[rows], self.time[rows], self.uniform[rows])


def _loss(draw: Draw, terms: _Terms) -> torch.Tensor:
    """The sum over samples; the caller divides by the batch size, whatever the micro-batches are."""
    result = find_objective(terms.objective.name)(draw, terms.objective)
    total = result.per_sample.sum()
    if terms.anchor is not None:
        change = draw.change_since(terms.anchor)
        terms.note("anchor", change)
        total = total + terms.train.anchor * change.sum()
    for name, values in result.diagnostics.items():
        terms.note(name, values)
    terms.samples += len(draw.batch)
    return total


def _sum_over_learners(parameters: list[Parameter], loss: torch.Tensor) -> None:
    """Sum gradients and the loss over all learners, as one buffer after accumulation.

    Not by hooks during the backward pass: a learner that had to divide a micro-batch would then take part in another
    number of collective operations than the others.
    """
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([loss.view(1), *(g.flatten() for g in gradients)])
    dist.all_reduce(flat)
    loss.copy_(flat[0])
    offset = 1
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = flat[offset : offset + gradient.numel()].view_as(gradient)
        offset += gradient.numel()


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)
