"""``transformers.Trainer`` for data whose labels may be wrong: a thin adapter of ``MetaRescaler``."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError, require
from weightsmith.reweight import AuditTable, LossRescaler, MetaRescaler, RandomBatches, RescalingSettings
from weightsmith.reweight.passes import LossFn, cross_entropy, forward_batch

_transformers: Any = require("transformers", extra="hf", purpose="training with Trainer")
Trainer: Any = _transformers.Trainer
TrainerCallback: Any = _transformers.TrainerCallback
_INDEX = "sample_index"


class MetaRescalingTrainer(Trainer):
    """A ``Trainer`` for classifiers that learns on the way which labels to trust.

    Everything else is Trainer's: optimizer, schedule, precision, accumulation, checkpoints. Samples are identified by
    their place in ``train_dataset``. The state of the rescaler is saved in every checkpoint and resumed from there. The
    log has ``mean_weight`` beside the loss.

    Args:
        *args: As for ``Trainer``.
        rescaling: Options of the rescaler.
        rescaler: Its network; ``None``: one for ``model.config.num_labels`` classes.
        loss_fn: ``(logits, labels) -> (B,)``; ``None``: the cross-entropy.
        meta_dataset: Where validation batches are drawn from: clean samples, with ``outer=False``; ``None``: the
            training data themselves.
        **kwargs: As for ``Trainer``.

    Raises:
        UsageError: The training has its own loss function or label smoothing, is sharded (DeepSpeed, FSDP), or the
            number of classes is unknown.

    Example:
        >>> trainer = MetaRescalingTrainer(model, args, train_dataset=rows)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> trainer.audit().to_csv("audit.csv")  # doctest: +SKIP
    """

    data_collator: Any
    train_dataset: Any

    def __init__(
        self,
        *args: Any,
        rescaling: RescalingSettings | None = None,
        rescaler: LossRescaler | None = None,
        loss_fn: LossFn | None = None,
        meta_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.compute_loss_func is not None or self.args.label_smoothing_factor:
            raise UsageError(
                "compute_loss_func and label_smoothing_factor have no loss per sample: give loss_fn instead"
            )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise UsageError("sharded training (DeepSpeed, FSDP) is not supported: use one process or DDP")
        self._rescaling = rescaling or RescalingSettings()
        self._loss_fn, self._meta_dataset = loss_fn or cross_entropy, meta_dataset
        if self._rescaling.mode == "official":
            raise UsageError("mode='official' takes the optimizer's step itself: use it in a loop of your own")
        self._rescaler = rescaler
        if rescaler is None and not isinstance(getattr(self._config, "num_labels", None), int):
            raise UsageError("the model's config does not say num_labels: give rescaler=LossRescaler(num_classes)")
        self.model_accepts_loss_kwargs = False  # so that Trainer divides our mean by the accumulation steps
        self.data_collator = _Collator(self.data_collator)
        self._meta: MetaRescaler | None = None
        self._weights: list[Tensor] = []
        self.add_callback(_Epochs(self))

    @property
    def _config(self) -> Any:
        return getattr(self.model, "config", None)

    @property
    def meta(self) -> MetaRescaler:
        """The rescaler with its state, made when training starts, anew for every model of ``model_init``."""
        if self._meta is None or self._meta.model is not self.model:
            if self.optimizer is None:
                raise UsageError("the rescaler is made when training starts: call train() first")
            rescaler = (
                LossRescaler(self._config.num_labels, self._rescaling.n_features)
                if self._rescaler is None
                else deepcopy(self._rescaler)
            )
            source = self.train_dataset if self._meta_dataset is None else self._meta_dataset
            sampler = self._sampler(source) if hasattr(source, "__len__") else None
            self._meta = MetaRescaler(
                self.model,
                self.optimizer,
                rescaler,
                forward_batch,
                loss_fn=self._loss_fn,
                val_sampler=sampler,
                settings=self._rescaling,
            )
        return self._meta

    def audit(self, class_names: Sequence[str] = ()) -> AuditTable:
        """What is known of the labels, the most suspicious first; rows are numbered as in ``train_dataset``.

        Args:
            class_names: Names of the labels; empty: those of the model's config.
        """
        known = getattr(self._config, "id2label", None)
        if not class_names and isinstance(known, Mapping):
            class_names = [str(known[number]) for number in sorted(known)]
        return self.meta.audit(class_names)

    # Trainer's own methods

    def get_train_dataloader(self) -> Any:
        """Number the samples on their way."""
        plain = self.train_dataset
        if plain is not None and hasattr(plain, "__len__"):
            self.train_dataset = _Numbered(plain)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = plain

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if _INDEX not in self._signature_columns:
            self._signature_columns.append(_INDEX)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted loss in training, the model's own in evaluation."""
        ids = inputs.pop(_INDEX, None)
        if return_outputs or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = self.meta.loss(dict(inputs), ids=ids, model=model)  # a plain dict can be saved
        if len(self.meta.last_weights):
            self._weights.append(self.meta.last_weights.mean())
        return loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """A forward and backward pass; with the last one before the optimizer's step, one of the rescaler."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler
            self.meta.update(scale=1.0 if scaler is None else float(scaler.get_scale()))
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean weight to rows that have a training loss."""
        if "loss" in logs and self._weights:
            logs["mean_weight"] = float(torch.stack(self._weights).mean())
            self._weights.clear()
        super().log(logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        torch.save(self.meta.state_dict(), self._state_file(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._state_file(checkpoint).is_file():
            self.meta.load_state_dict(torch.load(self._state_file(checkpoint), map_location="cpu", weights_only=True))

    def _state_file(self, folder: str) -> Path:
        return Path(folder) / f"rescaler-{self.args.process_index}.pt"  # memories differ between processes

    def _sampler(self, dataset: Any) -> "_Prepared":
        seed = self.args.seed + self.args.process_index
        collate = self._get_collator_with_removed_columns(self.data_collator)
        return _Prepared(self, RandomBatches(dataset, self._train_batch_size, seed=seed, collate_fn=collate))


class _Prepared:
    """Validation batches on the device of the trainer."""

    def __init__(self, trainer: MetaRescalingTrainer, draw: RandomBatches) -> None:
        self._trainer, self._draw = trainer, draw
        self.state_dict, self.load_state_dict = draw.state_dict, draw.load_state_dict

    def __call__(self) -> Any:
        return self._trainer._prepare_inputs(self._draw())


class _Numbered(torch.utils.data.Dataset[Any]):
    """Rows with their number."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        row = self.rows[index]
        return {**row, _INDEX: int(index)} if isinstance(row, Mapping) else row


class _Collator:
    """The user's collator, which does not see the numbers."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, rows: list[Any]) -> Any:
        numbers = [row[_INDEX] for row in rows if isinstance(row, Mapping) and _INDEX in row]
        if len(numbers) < len(rows):
            return self.collate(rows)
        batch = self.collate([{name: value for name, value in row.items() if name != _INDEX} for row in rows])
        batch[_INDEX] = torch.tensor(numbers)
        return batch


class _Epochs(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Memories start anew with every epoch, but not where a run resumes within one."""

    def __init__(self, trainer: MetaRescalingTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        epoch = state.epoch or 0.0
        if abs(epoch - round(epoch)) < 1e-6:
            self.trainer.meta.start_epoch()
