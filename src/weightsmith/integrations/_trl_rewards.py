"""Reward weights inside TRL's GRPO trainer: validation points, gradients of objectives, advantages with new weights."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError
from weightsmith.integrations._trl_tokens import forward_arguments
from weightsmith.reweight import (
    FixedWeights,
    GradientWeights,
    HypervolumeWeights,
    group_advantages,
    influence_of,
    objective_gradients,
)

InfluenceWhere = Callable[[str, Tensor], bool] | None
TRL_EPS = 1e-4
_BLOCK = re.compile(r"\.(\d+)\.")


def check_weighting(trainer: Any, weighting: FixedWeights, *, own_point: bool = False) -> None:
    """Refuse settings of the trainer that the weighting cannot work with.

    Raises:
        UsageError: Names the setting and what to do.
    """
    if not isinstance(weighting, FixedWeights):
        raise UsageError(f"reward_weighting must be such as HypervolumeWeights(...), got {weighting!r}")
    if len(weighting.weights) != len(trainer.reward_funcs):
        raise UsageError(
            f"reward_weighting has {len(weighting.weights)} weights, the trainer {len(trainer.reward_funcs)} reward "
            "functions: give one weight per function"
        )
    if isinstance(weighting, GradientWeights):
        if trainer.multi_objective_aggregation != "sum_then_normalize":
            raise UsageError(
                'GradientWeights needs multi_objective_aggregation="sum_then_normalize", got '
                f"{trainer.multi_objective_aggregation!r}"
            )
        kind = str(trainer.accelerator.distributed_type).rpartition(".")[-1]
        if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
            raise UsageError(
                f"GradientWeights takes gradients of single objectives, which {kind} does not gather: train with DDP "
                "or on one device"
            )
    if isinstance(weighting, HypervolumeWeights):
        check_one_validation_set(trainer.eval_dataset)
        names = trainer.reward_func_names
        if not own_point and len(set(names)) < len(names):
            raise UsageError(
                f"reward functions need different names, by which TRL logs them, got {', '.join(names)}: rename them, "
                "or give point"
            )
        normalizes = trainer.scale_rewards != "none" or trainer.multi_objective_aggregation == "normalize_then_sum"
        weighting.check_estimator("grpo" if normalizes else "dr_grpo")


def check_one_validation_set(data: Any) -> None:
    """Refuse several validation sets: points of different data are no front.

    Raises:
        UsageError: Names the sets.
    """
    if isinstance(data, Mapping):
        raise UsageError(
            f"HypervolumeWeights compares points of one validation set, eval_dataset has {', '.join(map(str, data))}: "
            "give one of them"
        )


def trl_advantages(trainer: Any, scores: Tensor, weights: Tensor) -> Tensor:
    """Advantages ``(N,)`` of TRL's ``sum_then_normalize`` for rewards ``(N, K)``."""
    total = (scores * weights.to(scores)).nansum(1)
    known = ~scores.isnan().all(1)
    # TRL: the only sample of a group that a reward applies to is its own mean
    alone = known.view(-1, trainer.num_generations).sum(1) == 1
    total = torch.where(known, total, torch.nan)
    group = torch.arange(len(total), device=total.device) // trainer.num_generations
    grpo = trainer.scale_rewards == "group"
    found = group_advantages(total, group, method="grpo" if grpo else "dr_grpo", eps=TRL_EPS)
    if trainer.scale_rewards == "batch" and int(known.sum()) > 1:
        found = found / (total[known].std() + TRL_EPS)
    return torch.where(alone[group], 0.0, found)


def influence(
    trainer: Any, score: Any, output: dict[str, Any], scores: Tensor, where: InfluenceWhere, max_norm: float | None
) -> Tensor:
    """Influence of each reward function on the rollouts of the current policy, equal on all processes.

    Args:
        trainer: The trainer.
        score: TRL's own ``_get_per_token_logps_and_entropies``.
        output: What ``_generate_and_score_completions`` has returned.
        scores: ``(N, K)``, rewards of all processes.
        where: Which parameters are measured.
        max_norm: Clip each objective's gradient, over all trainable parameters, to this norm.
    """
    if "pixel_values" in output:
        raise UsageError("GradientWeights cannot cut images into micro-batches: train it on text, or use FixedWeights")
    accelerator = trainer.accelerator
    model = accelerator.unwrap_model(trainer.model)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    targets = [name for name in named if (where or middle_blocks(list(named)))(name, named[name])]
    if not targets:
        raise UsageError("influence_where chooses none of the trainable parameters")
    order = targets + ([name for name in named if name not in set(targets)] if max_norm is not None else [])
    params = [named[name] for name in order]
    rows = len(output["completion_ids"])
    mine = slice(accelerator.process_index * rows, (accelerator.process_index + 1) * rows)
    single = torch.eye(scores.shape[1], device=scores.device)
    # rewards that do not apply are NaN, and so is 0 times them: each column on its own
    each = torch.stack([trl_advantages(trainer, scores[:, k : k + 1], one[k : k + 1]) for k, one in enumerate(single)])
    each = each[:, mine]
    mask = output["completion_mask"] * output.get("tool_mask", 1)
    total = accelerator.reduce(mask.sum().float(), "sum").clamp(min=1).item()
    size = trainer.args.per_device_train_batch_size
    gradients: list[list[Tensor]] | None = None
    for start in range(0, rows, size):
        part = slice(start, start + size)
        batch = {name: value[part] for name, value in output.items() if isinstance(value, Tensor) and value.dim()}
        if not (batch["completion_mask"].any() and each[:, part].any()):  # no gradient: no pass either
            continue
        logps = score(model, **(forward_arguments(score, batch) | {"compute_entropy": False}))[0]
        found = objective_gradients(logps, each[:, part], mask[part], params, normalizer=total)
        if gradients is None:
            gradients = found
        else:
            for held, new in zip(gradients, found, strict=True):
                torch._foreach_add_(held, new)
    if gradients is None:
        gradients = [[torch.zeros_like(p) for p in params] for _ in each]
    if accelerator.num_processes > 1:
        gradients = [[accelerator.reduce(part, "sum") for part in parts] for parts in gradients]
    return influence_of(gradients, max_norm=max_norm, targets=len(targets))


def middle_blocks(names: Sequence[str]) -> Callable[[str, Tensor], bool]:
    """Choose the middle half of a model's numbered blocks by the names of its parameters; all when none is numbered."""
    numbers = {name: int(found[1]) for name in names if (found := _BLOCK.search(name)) is not None}
    if not numbers:
        return lambda _, __: True
    count = max(numbers.values()) + 1
    low, high = count // 4, max(count // 4 + 1, count - count // 4)
    return lambda name, _: low <= numbers.get(name, -1) < high


def validation_point(trainer: Any) -> list[float] | None:
    """Mean of each reward function in the latest evaluation."""
    names = [f"eval_rewards/{name}/mean" for name in trainer.reward_func_names]
    for logged in reversed(trainer.state.log_history):
        if all(name in logged for name in names):
            return [float(logged[name]) for name in names]
    return None
