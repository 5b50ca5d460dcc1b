"""Weight Aligning around one's own training loop.

    wa = WeightAligning(model, "fc", memory=ExemplarMemory(2000))
    for step in range(order.steps):
        wa.begin_step(len(order.arriving(step)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        wa.attach(optimizer)
        for x, y in loader(step):                 # new data and wa.memory.dataset(), shuffled together
            optimizer.zero_grad()
            wa.loss(x, y).backward()
            optimizer.step()
        wa.end_step(inputs, labels)               # all data of the new classes; returns the factor and the norms
        predicted = order.to_labels(wa.aligned(model(x_test)).argmax(1))

Source: Zhao et al., CVPR 2020, and the authors' ``iLearn``; PyCIL's ``models/wa.py``.
"""

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightsmith.continual.aligning import WeightAlignment, align_logits, align_weights_
from weightsmith.continual.aligning_options import PRESETS, AligningOptions
from weightsmith.continual.charts import aligning_chart, check_chart_path, save_chart
from weightsmith.continual.classes import check_integers
from weightsmith.continual.distillation import incremental_loss
from weightsmith.continual.head import (
    Head,
    check_own_weight,
    clip_head_,
    expand_head_,
    find_head,
    fresh_head,
    head_name,
    replace_head_,
    warning_of_negative,
)
from weightsmith.continual.memory import ExemplarMemory
from weightsmith.core.errors import UsageError, WeightsmithWarning, unknown
from weightsmith.core.modes import evaluating
from weightsmith.core.outputs import call, logits_of


class WeightAligning:
    """Class-incremental learning with distillation, exemplars and aligned heads.

    Args:
        model: Trained by the caller; its head is replaced when classes arrive.
        head: Dotted name of the head, ``nn.Linear`` or 1x1 convolution, whose inputs are the features; or a function
            that takes it out of the model.
        options: Settings, or ``"official"`` or ``"pycil"``.
        memory: Where `end_step` puts exemplars; ``None``: the caller keeps them, or none.

    Attributes:
        step: The current step, counted from 0; -1 before the first.
        n_old: Classes before the current step.
        gamma: The factor of the last alignment; 1 while a step is trained.
        history: What every alignment did, by step: gamma, the mean norms, and what `measure` found.

    Raises:
        UsageError: There is no such module, its weight is tied or parametrized, an option is not known, or the model is
            wrapped for several processes.
        TypeError: The head is no linear classifier.
    """

    def __init__(
        self,
        model: nn.Module,
        head: str | Callable[[nn.Module], nn.Module],
        options: AligningOptions | Literal["official", "pycil"] | None = None,
        *,
        memory: ExemplarMemory | None = None,
    ) -> None:
        if isinstance(options, str):
            if options not in PRESETS:
                raise unknown("options", options, PRESETS)
            options = PRESETS[options]
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            raise UsageError(
                f"model must be what is inside of {type(model).__name__}, which knows the first head alone: "
                "wrap the model anew after every begin_step, and call loss(x, y, logits=wrapped(x))"
            )
        name = head_name(model, head)
        check_own_weight(model, find_head(model, name))
        self.model, self.head_name, self.memory = model, name, memory
        self.options = options or AligningOptions()
        self.step, self.n_old, self.gamma = -1, 0, 1.0
        self.history: list[dict[str, float]] = []
        self.teacher: nn.Module | None = None
        self._checked_features = False

    @property
    def head(self) -> Head:
        """The head that the model has now."""
        return find_head(self.model, self.head_name)

    @property
    def n_classes(self) -> int:
        """Classes seen up to the current step."""
        return int(self.head.weight.shape[0])

    def begin_step(self, n_new: int) -> nn.Module:
        """Keep the model as teacher and make room for new classes; the optimizer must be made anew after it.

        Args:
            n_new: Classes that arrive. A first head of another number of rows is replaced.

        Returns:
            The model, with a head of all classes seen.

        Raises:
            UsageError: ``n_new`` is below 1, or the memory is too small for all classes.
        """
        if isinstance(n_new, bool) or not isinstance(n_new, int) or n_new < 1:
            raise UsageError(f"n_new must be an integer of at least 1, got {n_new!r}")
        n_old = 0 if self.step < 0 else self.n_classes
        if self.memory is not None:
            self.memory.room(n_old + n_new)  # refused now, and not after the training of the step
        if n_old:
            self.teacher = self._frozen() if self.options.distill else None
            init, bias = self.options.head_init, self.options.bias
            expand_head_(self.model, n_old + n_new, self.head_name, init=init, bias=bias)
        elif not self._fits(n_new):
            self._fresh(n_new)
        self.step, self.n_old, self.gamma = self.step + 1, n_old, 1.0
        return self.model

    def teacher_logits(self, x: Any) -> Tensor | None:
        """What the model of the step before says, ``(B, n_old)``; ``None`` where nothing is distilled.

        Without random augmentation it can be computed once per example and handed to `loss`.
        """
        if self.teacher is None or not self.options.distill:
            return None
        with torch.no_grad():
            return logits_of(call(self.teacher, x))

    def loss(self, x: Any, y: Tensor, *, teacher_logits: Tensor | None = None, logits: Tensor | None = None) -> Tensor:
        """``(1 - lambda) CE + lambda KD`` with ``lambda = n_old / n``; cross-entropy alone at the first step.

        Args:
            x: Inputs of the model: a tensor, a tuple or a mapping.
            y: ``(B,)``: head indices, in order of arrival.
            teacher_logits: From `teacher_logits`, if they were kept.
            logits: ``(B, n)`` of the model on ``x``, if it was called already: of a wrapper around it, such as
                ``DistributedDataParallel`` or ``torch.compile``, which this method would pass by.

        Returns:
            A scalar.

        Raises:
            UsageError: No step has begun, or a label is none of the classes seen.
        """
        self._begun()
        if teacher_logits is None:
            teacher_logits = self.teacher_logits(x)
        watch = self.options.restrict and not self._checked_features
        self._checked_features |= logits is None
        if logits is None:
            with warning_of_negative(self.head) if watch else nullcontext():
                logits = logits_of(call(self.model, x))
        return incremental_loss(logits, y, teacher_logits, self.n_old, temperature=self.options.temperature)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Check that an optimizer trains the present head, and restrict the head after its steps where that is asked.

        Raises:
            UsageError: The optimizer lacks the head's parameters: it was made before `begin_step`.
        """
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if self.head.weight.requires_grad and id(self.head.weight) not in held:
            raise UsageError("the optimizer does not hold the head's weight: make a new optimizer after begin_step")
        inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)  # of accelerate's wrapper
        inner.register_step_post_hook(lambda *_: self.after_optimizer_step())

    def after_optimizer_step(self) -> None:
        """Restrict the head to weights of at least 0, where that is asked; `attach` does it by itself."""
        if self.options.restrict:
            clip_head_(self.head)

    @torch.no_grad()
    def features(self, x: Any) -> Tensor:
        """What the head is given, ``(B, d)``, in evaluation mode.

        A convolution's features are averaged over places. Where the head sees every token ``(B, T, d)``, as in decoders
        with a classifier, they are those of the token whose logits the model returns.

        Raises:
            UsageError: The model returns the logits of no single token.
        """
        found: list[tuple[Tensor, Tensor]] = []
        handle = self.head.register_forward_hook(lambda _, inputs, output: found.append((inputs[0], output)))
        try:
            with evaluating(self.model):
                logits = logits_of(call(self.model, x))
        finally:
            handle.remove()
        features, output = found[-1]
        if features.dim() == 2:
            return features
        if not isinstance(self.head, nn.Linear):
            return features.flatten(2).mean(2)
        each = output.flatten(1, -2)
        distance = (each - logits[:, None]).abs().amax(2) if logits.dim() == 2 else each.new_full((1, 1), torch.inf)
        nearest, at = distance.min(1)
        if bool((nearest > 1e-3 * (1 + output.abs().max())).any()):
            raise UsageError(
                f"the head is given {tuple(features.shape)} and the model returns the logits of no single token: "
                "compute features (N, d) yourself and hand them to end_step"
            )
        return features.flatten(1, -2)[torch.arange(len(at), device=at.device), at]

    def aligned(self, logits: Tensor) -> Tensor:
        """Logits of the model as they are to be read: the same after ``"fold"``, else new classes times gamma."""
        return align_logits(logits, self.n_old, self.gamma) if self.options.apply == "logits" else logits

    def end_step(
        self,
        inputs: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        features: Tensor | None = None,
        batch_size: int = 256,
    ) -> WeightAlignment | None:
        """Align the head and put exemplars of the new classes into the memory.

        Args:
            inputs: ``(N, ...)``: all examples of the new classes, as the model takes them; needed with a memory. With
                ``features`` they may be anything that stands for examples, such as their indices.
            labels: ``(N,)``: their head indices.
            features: ``(N, d)`` from `features`; ``None``: computed from ``inputs``.
            batch_size: Examples at a time, for the features.

        Returns:
            What aligning did; ``None`` at the first step and with ``align=False``.

        Raises:
            UsageError: No step has begun, the memory needs examples, or a label is none of the new classes; nothing
                has been changed.
        """
        self._begun()
        if self.memory is not None:
            if inputs is None or labels is None:
                raise UsageError(
                    "end_step needs inputs and labels of the new classes: the memory chooses exemplars of them"
                )
            self._check_new(labels)
            if features is None and self.memory.selection == "herding":
                device = self.head.weight.device  # aligning does not change features
                features = torch.cat([self.features(part.to(device)).cpu() for part in torch.split(inputs, batch_size)])
            self.memory.check(inputs, labels, features)
        found = None
        if self.options.align and self.n_old:
            options = self.options
            found = align_weights_(
                self.head, self.n_old, p=options.p, gamma_max=options.gamma_max, scale_bias=options.scale_bias,
                fold=options.apply == "fold", model=self.model,
            )  # fmt: skip
            self.gamma = found.gamma
            norms = {"mean_norm_old": found.mean_norm_old, "mean_norm_new": found.mean_norm_new}
            self.history.append({"step": self.step, "gamma": found.gamma, **norms})
        if self.memory is not None:
            assert inputs is not None
            assert labels is not None
            self.memory.add(inputs, labels, features)
        return found

    @torch.no_grad()
    def measure(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """Count what the last alignment changed on test examples, and add it to `history`.

        Args:
            logits: ``(N, n)`` of the model after `end_step`, of examples of all classes seen.
            labels: ``(N,)``: their head indices.

        Returns:
            In percent: ``accuracy`` and ``newest_share``, the part of the predictions that are the newest classes, both
            also as they were before aligning (``_before``), and ``true_share``, the part that would be right.

        Raises:
            UsageError: This step has not been aligned, or logits and labels do not fit.
            TypeError: The labels are no integers.
        """
        if not self.history or self.history[-1]["step"] != self.step:
            raise UsageError("measure needs an aligned head: call it after end_step, from the second step on")
        check_integers(labels)
        if (
            logits.dim() != 2
            or logits.shape[1] != self.n_classes
            or labels.shape != logits.shape[:1]
            or not len(labels)
        ):
            raise UsageError(
                f"logits must be (N, {self.n_classes}) and labels (N,), got {tuple(logits.shape)} and "
                f"{tuple(labels.shape)}"
            )
        before, after = logits, self.aligned(logits)
        if self.options.apply == "fold":
            bias: Tensor | float = 0.0
            if self.head.bias is not None and not self.options.scale_bias:
                bias = self.head.bias[self.n_old :].to(logits)
            new = (logits[:, self.n_old :] - bias) / self.gamma + bias
            before = torch.cat([logits[:, : self.n_old], new], dim=1)
        found = {"true_share": 100 * (labels >= self.n_old).double().mean().item()}
        for suffix, values in (("_before", before), ("", after)):
            predicted = values.argmax(1)
            found[f"accuracy{suffix}"] = 100 * (predicted == labels).double().mean().item()
            found[f"newest_share{suffix}"] = 100 * (predicted >= self.n_old).double().mean().item()
        self.history[-1] |= found
        return found

    def plot(self, path: Path | str) -> None:
        """Draw `history`: norms, factors, and what `measure` found.

        Args:
            path: ``.html``, ``.svg``, ``.png`` or ``.json`` (Vega-Lite).

        Raises:
            UsageError: The file's ending is another, or nothing has been aligned.
        """
        target = check_chart_path(path)
        if not self.history:
            raise UsageError("nothing has been aligned yet: plot after end_step, from the second step on")
        save_chart(aligning_chart(self.history), target)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the model's own weights: the step, the factors, the teacher, the memory."""
        return {
            "step": self.step,
            "n_old": self.n_old,
            "n_classes": self.n_classes,
            "gamma": self.gamma,
            "history": [dict(row) for row in self.history],
            "teacher": None if self.teacher is None else self.teacher.state_dict(),
            "memory": None if self.memory is None else self.memory.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; load the model's own weights after it, since the head grows here.

        Raises:
            UsageError: The state has a memory and this object has none, or the other way round.
        """
        if (state["memory"] is None) != (self.memory is None):
            raise UsageError("memory must be given where the state has one, and only there")
        if state["teacher"] is not None:
            self._fresh(state["n_old"])
            self.teacher = self._frozen(aligned=False)
            self.teacher.load_state_dict(state["teacher"])
        if not self._fits(state["n_classes"]):
            self._fresh(state["n_classes"])
        self.step, self.n_old, self.gamma = state["step"], state["n_old"], state["gamma"]
        self.history = [dict(row) for row in state["history"]]
        if self.memory is not None:
            self.memory.load_state_dict(state["memory"])

    def _check_new(self, labels: Tensor) -> None:
        check_integers(labels)
        strange = labels[(labels < self.n_old) | (labels >= self.n_classes)]
        if len(strange):
            raise UsageError(
                f"label {strange[0].item()} is none of this step's head indices, {self.n_old} to {self.n_classes - 1}: "
                "map labels with ClassOrder.to_rows, and give the new classes alone"
            )
        missing = sorted({*range(self.n_old, self.n_classes)} - set(labels.tolist()))
        if missing:
            warnings.warn(
                f"there is no example of new class {missing[0]}: the memory will hold none of it",
                WeightsmithWarning,
                stacklevel=3,
            )

    def _fits(self, n_classes: int) -> bool:
        return self.n_classes == n_classes and self.options.bias in (None, self.head.bias is not None)

    def _fresh(self, n_classes: int) -> None:
        replace_head_(self.model, self.head_name, fresh_head(self.head, n_classes, bias=self.options.bias))

    def _frozen(self, *, aligned: bool = True) -> nn.Module:
        teacher = copy.deepcopy(self.model).eval().requires_grad_(False)
        if aligned and self.options.apply == "logits" and self.gamma != 1:
            head = find_head(teacher, self.head_name)
            head.weight[self.n_old :] *= self.gamma
            if head.bias is not None:
                head.bias[self.n_old :] *= self.gamma
        return teacher

    def _begun(self) -> None:
        if self.step < 0:
            raise UsageError("no step has begun: call begin_step(n_new) first")
