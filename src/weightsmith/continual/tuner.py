"""Tune one model on task after task: a group of parameters per kind of instruction.

Before a task the router says whether its instructions are near those of an earlier group. Then the group goes on, with
an average (`weightsmith.continual.DynamicEMA`) that becomes its weights; else a new group is trained without one. At
test time the router says which group answers.

Source: Qiao et al., ICML 2025, arXiv 2410.10868, algorithm 1, and the authors' scripts.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from weightsmith.continual.averaged import named_trainable
from weightsmith.continual.dynamic_ema import DynamicEMA
from weightsmith.continual.group_files import adapter_name, load_group, save_group
from weightsmith.continual.router import Assignment, InstructionRouter, distinct
from weightsmith.core.errors import UsageError, unknown
from weightsmith.core.files import check_plain_name, write_atomically
from weightsmith.core.json_files import read_json
from weightsmith.core.ranks import from_first_rank_, on_first_rank

_FILE = "continual.json"
_SHAPE = {"tasks": int, "groups": [{"folder": str, "instructions": [str]}]}
Begin = Literal["previous", "base", "random"]


class ContinualTuner:
    """Which parameters a task trains, how they are averaged, and which of them answer.

    The model holds one group at a time: its trainable parameters. The other groups are in main memory and, with
    ``folder``, on disk: PEFT models as PEFT adapters. Every finished task is written there before the next begins, and
    a new tuner on the same folder goes on after it. With several processes every one makes its own tuner and calls the
    same methods with the same instructions; the first one writes.

    Args:
        model: Any model; with PEFT, one active adapter. What is trainable now belongs to every group.
        router: ``None``: by words, with the authors' thresholds.
        folder: Where groups are written; ``None``: they are not.
        new_group_init: A new group starts from the task before (``"previous"``, as in the authors' scripts), from the
            parameters as they are now (``"base"``), or from random ones (``"random"``).
        resume: Go on with the groups in ``folder``; otherwise there must be none.
        **ema: Arguments of `DynamicEMA`, for tasks that join a group: ``mode``, ``kappa``, ``fallback_beta``, ...

    Attributes:
        ema: The average of the task in progress; ``None`` where a new group is trained, and between tasks.
        assignment: Of the task in progress, else of the last one.
        tasks: Finished tasks.

    Raises:
        UsageError: Nothing is trainable, an argument is not known, or the folder is damaged or of another model.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> tuner = ContinualTuner(model, kappa=0.01)
        >>> for instruction in ("Add the numbers", "Add the two numbers"):
        ...     with tuner.task([instruction]):
        ...         optimizer = torch.optim.AdamW(model.parameters())
        ...         for _ in range(3):
        ...             model(torch.randn(8, 4)).square().mean().backward()
        ...             optimizer.step()
        ...             tuner.step()
        ...             optimizer.zero_grad()
        >>> tuner.use(["Add these numbers"])
        1
    """

    def __init__(
        self,
        model: nn.Module,
        router: InstructionRouter | None = None,
        folder: Path | str | None = None,
        *,
        new_group_init: Begin = "previous",
        resume: bool = True,
        **ema: Any,
    ) -> None:
        if new_group_init not in ("previous", "base", "random"):
            raise unknown("new_group_init", str(new_group_init), ("previous", "base", "random"))
        DynamicEMA(model, **ema)  # so that a wrong argument shows now and not after the first task
        adapter_name(model)
        if new_group_init == "random":
            list(_resets(model))  # refused now, and not after the first task
        self.model, self.router = model, router if router is not None else InstructionRouter()
        self.folder = None if folder is None else Path(folder)
        self.new_group_init, self._options = new_group_init, ema
        self.ema: DynamicEMA | None = None
        self.assignment: Assignment | None = None
        self.tasks = 0
        self._names = [name for name, _ in named_trainable(model)]
        self._base = self._copy() if new_group_init == "base" else {}
        self._groups: list[dict[str, Tensor]] = []
        self._folders: list[str] = []
        self._latest = 0
        self._instructions: list[str] | None = None
        if self.router.groups:
            raise UsageError(f"router has {len(self.router.groups)} groups already: give one without")
        if self.folder is not None and (self.folder / _FILE).exists():
            if not resume:
                raise UsageError(f"{self.folder} holds groups already: give resume=True or another folder")
            self._load(self.folder)

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters of all groups."""
        return sum(tensor.nbytes for group in self._groups for tensor in group.values())

    @property
    def in_task(self) -> bool:
        """Whether a task has begun and not ended."""
        return self._instructions is not None

    @property
    def instructions(self) -> tuple[str, ...] | None:
        """Of the task in progress."""
        return None if self._instructions is None else tuple(self._instructions)

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model in which other parameters are trained than those of the groups.

        Args:
            model: The tuner's, perhaps within a wrapper.

        Raises:
            UsageError: Names a parameter.
        """
        own = {name: self._parameter(name) for name in self._names}
        if missing := [name for name, parameter in own.items() if parameter is None]:
            raise UsageError(f"{missing[0]} is gone from the tuner's model: make the tuner anew after such a change")
        known = set(map(id, own.values()))
        if wrong := [name for name, parameter in named_trainable(model) if id(parameter) not in known]:
            raise UsageError(
                f"{wrong[0]} is trained and belongs to no group: give the tuner the model that is trained, with the "
                "same adapter active and the same parameters trainable in all tasks"
            )

    def begin(self, instructions: Sequence[str]) -> Assignment:
        """Start a task: its group's parameters are put into the model. Make the optimizer after this.

        Args:
            instructions: Prompts of the task's training data, without questions or inputs.

        Raises:
            UsageError: A task is in progress.
        """
        if self._instructions is not None:
            raise UsageError("a task is in progress: end it first")
        self.check_model(self.model)
        found = self.router.assign(instructions)
        if not found.is_new:
            self._put(self._groups[found.group - 1])
        elif self.new_group_init == "previous" and self._groups:
            self._put(self._groups[self._latest])  # the model may hold another since `use`
        elif self.new_group_init == "base":
            self._put(self._base)
        elif self.new_group_init == "random" and self._groups:
            for reset in list(_resets(self.model)):
                reset()
            from_first_rank_(self.model.get_parameter(name) for name in self._names)
        self.ema = None if found.is_new else DynamicEMA(self.model, **self._options)
        self.assignment, self._instructions = found, distinct(instructions)
        return found

    def step(self) -> None:
        """After every ``optimizer.step()``, before ``zero_grad()``."""
        if self._instructions is None:
            raise UsageError("there is no task in progress: call begin first")
        if self.ema is not None:
            self.ema.step()

    def end(self) -> Assignment:
        """Finish the task: the average, where there is one, becomes the group's parameters; all is written."""
        if self._instructions is None or self.assignment is None:
            raise UsageError("there is no task in progress: call begin first")
        found, instructions = self.assignment, self._instructions
        self.check_model(self.model)
        if self.ema is not None:
            if not self.ema.step_count:
                raise UsageError("step was never called in this task: call it after every optimizer.step()")
            self.ema.copy_to_model()
        trained = self._copy()
        if self.folder is not None:
            folders = self._folders_after(found)
            on_first_rank(partial(self._save, self.folder, folders, found, trained, instructions))
            self._folders = folders
        if found.is_new:
            self._groups.append(trained)
        else:
            self._groups[found.group - 1] = trained
        self.router.commit(found, instructions)
        self._latest = found.group - 1
        self.tasks += 1
        self.ema = self._instructions = None
        return found

    def cancel(self) -> None:
        """Give up the task in progress: groups and router are as before it, the model keeps what it has."""
        self.ema = self._instructions = None

    @contextmanager
    def task(self, instructions: Sequence[str]) -> Iterator[Assignment]:
        """`begin` and `end` around a block; after an error the task does not count."""
        found = self.begin(instructions)
        try:
            yield found
        except BaseException:
            self.cancel()
            raise
        self.end()

    def fit(self, instructions: Sequence[str], train: Callable[[nn.Module], object]) -> Assignment:
        """Train a task by a function, which calls `step` (in Trainer: ``LCIACallback(tuner)`` does)."""
        with self.task(instructions) as found:
            train(self.model)
        return found

    def predict_group(self, instructions: str | Sequence[str]) -> Assignment:
        """Which group answers a prompt, or prompts that belong together."""
        return self.router.assign([instructions] if isinstance(instructions, str) else instructions, train=False)

    def use(self, group: int | str | Sequence[str]) -> int:
        """Put a group's parameters into the model.

        Args:
            group: Its number, from 1, or the prompts that it is to answer.

        Returns:
            Its number.

        Raises:
            UsageError: There is no such group, or a task is in progress.
        """
        if self._instructions is not None:
            raise UsageError("a task is in progress: end it first")
        number = group if isinstance(group, int) else self.predict_group(group).group
        if isinstance(group, bool) or not 1 <= number <= len(self._groups):
            raise UsageError(f"group must be between 1 and {len(self._groups)}, got {group!r}")
        self._put(self._groups[number - 1])
        return number

    def _parameter(self, name: str) -> Tensor | None:
        try:
            return self.model.get_parameter(name)
        except AttributeError:  # an adapter has been put in, or taken out
            return None

    def _copy(self) -> dict[str, Tensor]:
        return {name: self.model.get_parameter(name).detach().to("cpu", copy=True) for name in self._names}

    @torch.no_grad()
    def _put(self, group: dict[str, Tensor]) -> None:
        for name, tensor in group.items():
            self.model.get_parameter(name).copy_(tensor)

    def _folders_after(self, found: Assignment) -> list[str]:
        """Where the groups are when the task has been written."""
        folders = [*self._folders, f"group_{found.group}-task_{self.tasks + 1}"]
        if not found.is_new:
            folders[found.group - 1] = folders.pop()
        return folders

    def _save(
        self,
        folder: Path,
        folders: list[str],
        found: Assignment,
        trained: dict[str, Tensor],
        instructions: Sequence[str],
    ) -> None:
        """The new group first and then the list that names it, so that a kill in between loses this task alone."""
        save_group(self.model, trained, folder / folders[found.group - 1])
        texts = [*map(list, self.router.groups), *([[]] if found.is_new else [])]
        texts[found.group - 1] += [text for text in instructions if text not in texts[found.group - 1]]
        listed = [{"folder": f, "instructions": t} for f, t in zip(folders, texts, strict=True)]
        content = json.dumps({"tasks": self.tasks + 1, "groups": listed}, indent=2, ensure_ascii=False)
        write_atomically(folder / _FILE, content + "\n")
        if not found.is_new:
            shutil.rmtree(folder / self._folders[found.group - 1], ignore_errors=True)

    def _load(self, folder: Path) -> None:
        state = read_json(folder / _FILE, _SHAPE)
        shapes = {name: tuple(self.model.get_parameter(name).shape) for name in self._names}
        folders = [check_plain_name(group["folder"], folder / _FILE) for group in state["groups"]]
        texts = [distinct(group["instructions"]) for group in state["groups"]]
        self._groups = [load_group(self.model, shapes, folder / name) for name in folders]
        self._folders, self.tasks = folders, state["tasks"]
        self.router.load_state_dict({"groups": texts})
        if folders:
            self._latest = max(range(len(folders)), key=lambda at: _task_of(folders[at]))
            self._put(self._groups[self._latest])


def _task_of(folder: str) -> int:
    number = folder.rpartition("_")[2]
    return int(number) if number.isdecimal() and len(number) < 10 else 0


def _resets(model: nn.Module) -> Iterator[Callable[[], object]]:
    """What makes trainable parameters random again, as their modules make them.

    Raises:
        UsageError: A module cannot; nothing has been changed.
    """
    for name, module in model.named_modules():
        own = [key for key, parameter in module.named_parameters(recurse=False) if parameter.requires_grad]
        if hasattr(module, "reset_lora_parameters") and hasattr(module, "active_adapters"):
            for adapter in module.active_adapters:
                yield partial(module.reset_lora_parameters, adapter, True)
        elif own and hasattr(module, "reset_parameters"):
            if any(not parameter.requires_grad for parameter in module.parameters(recurse=False)):
                raise UsageError(f"{name} is frozen in part, so it cannot be reset: take another new_group_init")
            if not any("lora_" in part for part in name.split(".")):  # which its layer has reset
                yield cast(Any, module).reset_parameters
        elif own:
            raise UsageError(f"{name or type(module).__name__}.{own[0]} cannot be reset: take another new_group_init")
