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
        print(wa.end_step(inputs, labels))        # all data of the new classes; prints the factor and the norms

Source: Zhao et al., CVPR 2020, and the authors' ``iLearn``; PyCIL's ``models/wa.py``.
"""

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightsmith.continual.aligning import WeightAlignment, align_logits, align_weights_
from weightsmith.continual.aligning_options import PRESETS, AligningOptions
from weightsmith.continual.distillation import incremental_loss
from weightsmith.continual.head import (
    Head,
    check_own_weight,
    clip_head_,
    expand_head_,
    find_head,
    fresh_head,
    replace_head_,
    warning_of_negative,
)
from weightsmith.continual.memory import ExemplarMemory
from weightsmith.core.errors import UsageError, unknown
from weightsmith.core.modes import evaluating
from weightsmith.core.outputs import call, logits_of


class WeightAligning:
    """Class-incremental learning with distillation, exemplars and aligned heads.

    Args:
        model: Trained by the caller; its head is replaced when classes arrive.
        head: Dotted name of the head, ``nn.Linear`` or 1x1 convolution, whose inputs are the features.
        options: Settings, or ``"official"`` or ``"pycil"``.
        memory: Where `end_step` puts exemplars; ``None``: the caller keeps them, or none.

    Attributes:
        step: The current step, counted from 0; -1 before the first.
        n_old: Classes before the current step.
        gamma: The factor of the last alignment; 1 while a step is trained.
        history: What every alignment did, by step: gamma and the mean norms.

    Raises:
        UsageError: There is no such module, its weight is tied or parametrized, or an option is not known.
        TypeError: The head is no linear classifier.
    """

    def __init__(
        self,
        model: nn.Module,
        head: str,
        options: AligningOptions | Literal["official", "pycil"] | None = None,
        *,
        memory: ExemplarMemory | None = None,
    ) -> None:
        if isinstance(options, str):
            if options not in PRESETS:
                raise unknown("options", options, PRESETS)
            options = PRESETS[options]
        check_own_weight(model, find_head(model, head))
        self.model, self.head_name, self.memory = model, head, memory
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
            UsageError: ``n_new`` is below 1.
        """
        if isinstance(n_new, bool) or not isinstance(n_new, int) or n_new < 1:
            raise UsageError(f"n_new must be an integer of at least 1, got {n_new!r}")
        n_old = 0 if self.step < 0 else self.n_classes
        if n_old:
            self.teacher = self._frozen()
            init, bias = self.options.head_init, self.options.bias
            expand_head_(self.model, n_old + n_new, self.head_name, init=init, bias=bias)
        elif self.n_classes != n_new or self.options.bias not in (None, self.head.bias is not None):
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

    def loss(self, x: Any, y: Tensor, *, teacher_logits: Tensor | None = None) -> Tensor:
        """``(1 - lambda) CE + lambda KD`` with ``lambda = n_old / n``; cross-entropy alone at the first step.

        Args:
            x: Inputs of the model: a tensor, a tuple or a mapping.
            y: ``(B,)``: head indices, in order of arrival.
            teacher_logits: From `teacher_logits`, if they were kept.

        Returns:
            A scalar.

        Raises:
            UsageError: No step has begun, or a label is none of the classes seen.
        """
        self._begun()
        if teacher_logits is None:
            teacher_logits = self.teacher_logits(x)
        watch = self.options.restrict and not self._checked_features
        self._checked_features = True
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
        optimizer.register_step_post_hook(lambda *_: self.after_optimizer_step())

    def after_optimizer_step(self) -> None:
        """Restrict the head to weights of at least 0, where that is asked; `attach` does it by itself."""
        if self.options.restrict:
            clip_head_(self.head)

    @torch.no_grad()
    def features(self, x: Any) -> Tensor:
        """What the head is given, ``(B, d)``, in evaluation mode."""
        found: list[Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
        try:
            with evaluating(self.model):
                call(self.model, x)
        finally:
            handle.remove()
        features = found[-1]
        return features.flatten(1) if features.dim() == 2 else features.flatten(2).mean(2)

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
            UsageError: No step has begun, or the memory needs examples.
        """
        self._begun()
        if self.memory is not None and (inputs is None or labels is None):
            raise UsageError(
                "end_step needs inputs and labels of the new classes: the memory chooses exemplars of them"
            )
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
            if features is None and self.memory.selection == "herding":
                device = self.head.weight.device
                features = torch.cat([self.features(part.to(device)).cpu() for part in torch.split(inputs, batch_size)])
            self.memory.add(inputs, labels, features)
        return found

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
        if state["n_classes"] != self.n_classes:
            self._fresh(state["n_classes"])
        self.step, self.n_old, self.gamma = state["step"], state["n_old"], state["gamma"]
        self.history = [dict(row) for row in state["history"]]
        if self.memory is not None:
            self.memory.load_state_dict(state["memory"])

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
