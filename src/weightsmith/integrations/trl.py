"""Token rules and reward weights in TRL's ``GRPOTrainer``.

    from trl import GRPOConfig, GRPOTrainer
    from weightsmith.integrations.trl import Reweighting
    from weightsmith.reweight import Steer

    class Trainer(Reweighting, GRPOTrainer):
        pass

    Trainer("Qwen/Qwen3-0.6B", reward_funcs=[...], args=GRPOConfig(...), token_weighting=Steer()).train()

It overrides six methods and copies none of TRL's: `HOOKS` lists what it stands on, and `check_trl` compares the
installed version with it.
"""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError, require
from weightsmith.core.files import write_atomically
from weightsmith.core.json_files import read_json
from weightsmith.integrations import _trl_rewards as rewards
from weightsmith.integrations._trl_tokens import OLD_ENTROPY, RAW_REWARDS, TokenPlan, check_rule
from weightsmith.reweight import FixedWeights, GradientWeights, HypervolumeWeights, TokenRule

TESTED = "1.16"
STATE = "weightsmith_reweighting.json"
HOOKS: Mapping[str, tuple[str, ...]] = {
    "_compute_loss": ("model", "inputs"),
    "_get_per_token_logps_and_entropies": ("model", "input_ids", "attention_mask", "logits_to_keep", "compute_entropy"),
    "_generate_and_score_completions": ("inputs",),
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_save_checkpoint": ("model", "trial"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
}
"""Methods of ``GRPOTrainer`` that `Reweighting` overrides, with the arguments that it relies on."""


def check_trl(trainer_class: type | None = None) -> None:
    """Compare a ``GRPOTrainer`` with what `Reweighting` stands on.

    Args:
        trainer_class: The class; ``None``: that of the installed TRL.

    Raises:
        UsageError: It is another trainer, or a method or an argument is gone; names it and the version.
        MissingExtra: TRL is not installed.
    """
    trl = require("trl", extra="hf", purpose="weighting tokens and rewards in TRL")
    trainer_class = trl.GRPOTrainer if trainer_class is None else trainer_class
    if not issubclass(trainer_class, trl.GRPOTrainer):
        raise UsageError(
            f"Reweighting goes in front of GRPOTrainer or a subclass of it, not of {trainer_class.__name__}: its loss "
            "has no place for weights of tokens; use weightsmith.reweight in a loop of your own"
        )
    for method, arguments in HOOKS.items():
        found = getattr(trainer_class, method, None)
        known = () if found is None else tuple(inspect.signature(found).parameters)
        missing = [name for name in arguments if name not in known]
        if found is None or missing:
            what = f"has no {method}" if found is None else f"{method} has no argument {', '.join(missing)}"
            raise UsageError(
                f"TRL {trl.__version__} has moved: {trainer_class.__name__} {what}; install trl {TESTED}, which this "
                "was written for, or weight tokens in a loop of your own with weightsmith.reweight.policy_loss"
            )


class Reweighting:
    """Mixin in front of ``GRPOTrainer`` (or a subclass of it) that weighs tokens and rewards.

    Metrics of rules and weightings are in the trainer's log, their state in its checkpoints. In evaluation nothing is
    weighted but the sum of the rewards, and nothing moves.

    A rule sees the tokens of a whole optimizer step at once, over all micro-batches and processes, so that gradient
    accumulation does not change what it selects. With more than one micro-batch per step that takes one further forward
    pass without gradient over each. A step whose micro-batches are of several generations is seen generation by
    generation.

    Args:
        *args: As for the trainer.
        token_weighting: `Steer` or another rule; ``None``: all tokens count alike.
        reward_weighting: `HypervolumeWeights`, `GradientWeights` or `FixedWeights`, one weight per reward function; it
            takes the place of ``reward_weights``.
        scope: ``"batch"``, see above; ``"micro_batch"``: a rule sees what is in one forward pass of one process, as in
            STEER's published code.
        point: Turns the latest evaluation's log into a validation point for `HypervolumeWeights`; ``None``: the mean
            of each reward function.
        influence_where: ``(name, parameter) -> bool``, which trainable parameters `GradientWeights` measures gradients
            on; ``None``: the middle half of the blocks. Adapters count as part of their block.
        max_grad_norm: Norm to which each objective's gradient, over all trainable parameters, is clipped; ``None``:
            not at all, which also needs no gradient of the other parameters.
        **kwargs: As for the trainer.

    Raises:
        UsageError: TRL has moved, or a setting of the trainer does not go with what is asked for.
        MissingExtra: TRL is not installed.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[1 : cls.__mro__.index(Reweighting)]
        late = [base for base in before if hasattr(base, "_compute_loss") and not issubclass(base, Reweighting)]
        if late:
            raise UsageError(
                f"Reweighting must stand in front of {late[0].__name__}, whose methods it overrides: "
                f"class {cls.__name__}(Reweighting, {late[0].__name__})"
            )

    def __init__(
        self,
        *args: Any,
        token_weighting: TokenRule | None = None,
        reward_weighting: FixedWeights | None = None,
        scope: Literal["batch", "micro_batch"] = "batch",
        point: Callable[[Mapping[str, float]], Sequence[float]] | None = None,
        influence_where: Callable[[str, Tensor], bool] | None = None,
        max_grad_norm: float | None = 1.0,
        **kwargs: Any,
    ) -> None:
        own = [
            base for base in type(self).__mro__ if hasattr(base, "_compute_loss") and not issubclass(base, Reweighting)
        ]
        if not own:
            raise UsageError("Reweighting is a mixin: class MyTrainer(Reweighting, GRPOTrainer)")
        check_trl(own[0])
        if scope not in ("batch", "micro_batch"):
            raise UsageError(f"scope must be batch or micro_batch, got {scope!r}")
        super().__init__(*args, **kwargs)
        self.token_weighting, self.reward_weighting = token_weighting, reward_weighting
        self._point, self._influence_where, self._influence_norm = point, influence_where, max_grad_norm
        self._plan: TokenPlan | None = None
        self._rollout_scores: list[tuple[Tensor, Tensor | None]] | None = None
        self._raw_scores: Tensor | None = None
        if token_weighting is not None:
            check_rule(self, token_weighting)
            self._plan = TokenPlan(self, token_weighting, whole_batch=scope == "batch")
        if reward_weighting is not None:
            rewards.check_weighting(self, reward_weighting, own_point=point is not None)
            self.reward_weights = reward_weighting.weights.float()

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        plan = self._plan
        if plan is None or not self.model.training:  # type: ignore[attr-defined]
            unchanged: Tensor = super()._compute_loss(model, inputs)  # type: ignore[misc]
            return unchanged
        # buffered batches are used again when num_iterations > 1: write into a copy
        plan.prepare(model, inputs, super()._get_per_token_logps_and_entropies)  # type: ignore[misc]
        plan.live = dict(inputs)
        try:
            with plan.hidden_states(model):
                loss: Tensor = super()._compute_loss(model, plan.live)  # type: ignore[misc]
            if plan.effect is None:
                raise UsageError("the trainer's loss has not scored its tokens, so token_weighting cannot reach it")
            extra = plan.extra_loss(inputs)
        finally:
            plan.live = plan.logp = plan.entropy = plan.effect = None
        return loss if extra is None else loss + extra

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        score = super()._get_per_token_logps_and_entropies  # type: ignore[misc]
        if self._plan is not None and self._plan.live is not None:
            found = score(model, *args, **kwargs)
            self._plan.take(found[0], found[1])
            return found
        if self._rollout_scores is None or model is not self.model:  # type: ignore[attr-defined]
            return score(model, *args, **kwargs)
        found = score(model, *args, **(kwargs | {"compute_entropy": True}))
        self._rollout_scores.append((found[0], found[1]))
        return found

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._raw_scores = super()._calculate_rewards(*args, **kwargs)  # type: ignore[misc]
        return self._raw_scores

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        training, weighting = self.model.training, self.reward_weighting  # type: ignore[attr-defined]
        if weighting is not None:
            self.reward_weights = (weighting.reward_weights if training else weighting.weights).float()
        rule = self.token_weighting if training else None
        self._rollout_scores = [] if rule is not None and "entropy" in rule.needs else None
        try:
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
            old = output.get("old_per_token_logps")
            for logps, entropies in self._rollout_scores or ():
                if logps is old:
                    output[OLD_ENTROPY] = entropies
        finally:
            self._rollout_scores = None
        if training and weighting is not None:
            self._weigh_rewards(weighting, output)
        if rule is not None and "rewards" in rule.needs:
            assert self._raw_scores is not None
            total = (self._raw_scores * self.reward_weights.to(self._raw_scores)).nansum(1)
            total = torch.where(self._raw_scores.isnan().all(1), torch.nan, total)
            output[RAW_REWARDS] = self._local(total, output)
        return output

    def _weigh_rewards(self, weighting: FixedWeights, output: dict[str, Any]) -> None:
        assert self._raw_scores is not None
        logged = self._metrics["train"]  # type: ignore[attr-defined]
        if isinstance(weighting, GradientWeights):
            score = super()._get_per_token_logps_and_entropies  # type: ignore[misc]
            found = rewards.influence(
                self, score, output, self._raw_scores, self._influence_where, self._influence_norm
            )
            scheduler = getattr(self, "lr_scheduler", None)
            asked = self.args.learning_rate  # type: ignore[attr-defined]
            lr = scheduler.get_last_lr()[0] if scheduler is not None else asked
            group = self.optimizer.param_groups[0] if self.optimizer is not None else {}  # type: ignore[attr-defined]
            base_lr = float(group.get("initial_lr", asked)) or None  # an optimizer of the user's own has its own rate
            self.reward_weights = weighting.update(found, lr, base_lr=base_lr).float()
            advantages = rewards.trl_advantages(self, self._raw_scores, weighting.reward_weights)
            output["advantages"] = self._local(advantages, output).to(output["advantages"].dtype)
            for name, value in zip(self.reward_func_names, found.tolist(), strict=True):  # type: ignore[attr-defined]
                logged[f"reward_influence/{name}"].append(value)
        if isinstance(weighting, HypervolumeWeights):
            output["advantages"] = output["advantages"] * weighting.advantage_factor
            logged["reward_weights/meta"].append(weighting.meta)
        for name, value in zip(self.reward_func_names, weighting.weights.tolist(), strict=True):  # type: ignore[attr-defined]
            logged[f"reward_weights/{name}"].append(value)

    def _local(self, values: Tensor, output: dict[str, Any]) -> Tensor:
        rows, rank = len(output["completion_ids"]), self.accelerator.process_index  # type: ignore[attr-defined]
        return values[rank * rows : (rank + 1) * rows]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the trainer's; the result is a validation point for `HypervolumeWeights`."""
        if isinstance(self.reward_weighting, HypervolumeWeights):
            data = kwargs.get("eval_dataset", args[0] if args else None)
            rewards.check_one_validation_set(self.eval_dataset if data is None else data)  # type: ignore[attr-defined]
        found: dict[str, float] = super().evaluate(*args, **kwargs)  # type: ignore[misc]
        if isinstance(self.reward_weighting, HypervolumeWeights):
            point = rewards.validation_point(self)
            if self._point is not None:
                point = list(self._point(self.state.log_history[-1]))  # type: ignore[attr-defined]
            if point is None:
                raise UsageError("the evaluation logged no rewards, so HypervolumeWeights has no validation point")
            self.reward_weighting.update(point)
        return found

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        state = {
            name: part.state_dict()
            for name in ("token_weighting", "reward_weighting")
            if (part := getattr(self, name)) is not None
        }
        if state and self.args.should_save:  # type: ignore[attr-defined]
            folder = Path(self._get_output_dir(trial=trial))  # type: ignore[attr-defined]
            step = self.state.global_step  # type: ignore[attr-defined]
            write_atomically(folder / f"checkpoint-{step}" / STATE, json.dumps(state))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        file = None if checkpoint is None else Path(checkpoint) / STATE
        if file is None or not file.is_file():
            return
        state = read_json(file)
        for name in ("token_weighting", "reward_weighting"):
            part = getattr(self, name)
            if part is not None and name in state:
                part.load_state_dict(state[name])
