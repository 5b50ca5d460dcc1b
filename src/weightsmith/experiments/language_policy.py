"""The policy experiments on a language model: trained through TRL, by other people's optimizer and sampler."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError, require
from weightsmith.core.files import write_atomically
from weightsmith.core.json_files import read_json
from weightsmith.core.modes import evaluating
from weightsmith.experiments.language_start import language_model, token_logprobs, train_questions
from weightsmith.experiments.policies import BEFORE, MEASURE_SEED, PolicyConfig, PolicyRun
from weightsmith.integrations.trl import Reweighting
from weightsmith.lab.data.labels import hold_out
from weightsmith.lab.data.text_sets import load_questions, prompt, same_answer
from weightsmith.lab.job import Job
from weightsmith.lab.models.external import hugging_face_config
from weightsmith.lab.policy import PolicyTask, Rollout
from weightsmith.lab.train import Row, Stateful
from weightsmith.reweight import boxed_accuracy, clarity

STATE = "weightsmith_experiment.json"
INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."
NEEDS = (
    "needs trl, at the published size a GPU of 80 GB per job, and --data: a file or folder of questions and answers in "
    "columns of these names, for example DAPO-Math-17k with AIME 2024 as test, or MATH-500"
)


def check(config: PolicyConfig) -> None:
    """Refuse what cannot run; of a language model also missing data, packages and batches that do not divide.

    Raises:
        UsageError: Names the setting.
        MissingExtra: TRL is not installed.
    """
    config.check()
    if not config.model:
        return
    if not config.data:
        raise UsageError(f"model {config.model!r} {NEEDS}")
    require("trl", extra="hf", purpose="training a language model")
    if config.warmup_steps and config.answers != "number":
        raise UsageError(
            f"warmup_steps must be 0 for answers in boxes, which the data do not show, got {config.warmup_steps}; "
            "answers may be 'number'"
        )
    answers = config.prompts * config.samples
    if answers % (config.micro_batch * config.mini_batches):
        raise UsageError(
            f"prompts * samples must be a multiple of micro_batch * mini_batches, got {answers} and "
            f"{config.micro_batch} * {config.mini_batches}"
        )
    train_questions(config)
    hugging_face_config(config.model)


def run_of(config: PolicyConfig, task: PolicyTask, job: Job) -> "PolicyRun | LanguageModelRun":
    """The small policy on its task, or the configuration's language model on its questions."""
    return LanguageModelRun(config, job) if config.model else PolicyRun(config, task, job)


def right(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1 for completions whose box holds the answer: a reward function for TRL."""
    return [boxed_accuracy(text, _wanted(one)) for text, one in zip(completions, answer, strict=True)]


def right_number(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1 for completions whose last number is the answer: a reward function for TRL."""
    return [float(same_answer(text, one)) for text, one in zip(completions, answer, strict=True)]


def clear(completions: Sequence[str], **_: Any) -> list[float]:
    """1 for well-formed completions: a reward function for TRL."""
    return [clarity(text) for text in completions]


class LanguageModelRun:
    """A language model of one arm and seed: optimized through TRL, measured on other questions.

    Args:
        config: With ``model`` and ``data``.
        job: Where it runs.
    """

    def __init__(self, config: PolicyConfig, job: Job) -> None:
        transformers = require("transformers", extra="hf", purpose="training a language model")
        self.config, self.job = config, job
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(config.model, padding_side="left")
        self.model = language_model(config).to(job.device)
        self.model.load_state_dict(job.start, strict=False)  # only what is trained is kept
        train = self._prompts(train_questions(config))
        kept, held = hold_out(len(train), config.measure_prompts / len(train))  # as the supervised start does
        self._train, self._few = ([train[i] for i in rows.tolist()] for rows in (kept, held))
        self._test = self._prompts(load_questions(config.data, "test", config.test_prompts))
        self._log: list[dict[str, Any]] = []

    def optimize(
        self,
        rewards: Sequence[Callable[..., list[float]]],
        *,
        measure: Callable[[int], Row],
        states: Mapping[str, Stateful],
        after_step: Callable[[int], None] | None = None,
        weighing: Mapping[str, Any],
        **options: Any,
    ) -> None:
        """Train through TRL; the arm `BEFORE` takes no step.

        Args:
            rewards: TRL's reward functions.
            measure: As of `weightsmith.lab.policy.optimize_policy`.
            states: As there.
            after_step: As there.
            weighing: Arguments of `Reweighting`.
            **options: Of ``GRPOConfig``.
        """
        config, job = self.config, self.job
        rows: list[Row] = []
        last = self._last_checkpoint()
        if last is not None:
            held = read_json(last / STATE)
            for name, part in states.items():
                part.load_state_dict(held["states"][name])
            rows += held["rows"]
            for row in rows:
                job.record(row)

        def note(step: int) -> None:
            rows.append({"step": float(step), **measure(step)})
            job.record(rows[-1])

        if not rows:
            note(0)
        if job.arm == BEFORE.name:
            return
        trl, transformers = (require(name, extra="hf", purpose="training") for name in ("trl", "transformers"))

        class Watch(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
            def on_step_end(self, _: Any, state: Any, __: Any, **___: Any) -> None:
                step, rest = divmod(state.global_step, config.mini_batches)
                if rest:
                    return
                if after_step is not None:
                    after_step(step)
                if step % config.measure_every == 0 or step == config.steps:
                    note(step)

            def on_save(self, args: Any, state: Any, _: Any, **__: Any) -> None:
                held = {"states": {name: part.state_dict() for name, part in states.items()}, "rows": rows}
                write_atomically(Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE, json.dumps(held))

        per_rollout = config.prompts * config.samples // config.micro_batch
        cuda = job.device.type == "cuda"
        args = {
            "output_dir": str(job.folder), "max_steps": config.steps * config.mini_batches, "seed": job.seed,
            "per_device_train_batch_size": config.micro_batch, "steps_per_generation": per_rollout,
            "gradient_accumulation_steps": per_rollout // config.mini_batches, "num_generations": config.samples,
            "max_completion_length": config.max_tokens, "learning_rate": config.lr, "weight_decay": 0.01,
            "lr_scheduler_type": "constant", "max_grad_norm": config.clip_norm, "optim": "adamw_torch", "beta": 0.0,
            "temperature": 1.0, "loss_type": "bnpo", "save_strategy": "steps", "save_total_limit": 1,
            "save_steps": config.measure_every * config.mini_batches, "logging_steps": 1, "report_to": [],
            "use_cpu": not cuda, "bf16": cuda, "gradient_checkpointing": cuda, "disable_tqdm": True,
        }  # fmt: skip
        made = type("Trainer", (Reweighting, trl.GRPOTrainer), {})(
            model=self.model, reward_funcs=list(rewards), args=trl.GRPOConfig(**args | options),
            train_dataset=require("datasets", extra="hf", purpose="training").Dataset.from_list(self._train),
            processing_class=self.tokenizer, callbacks=[Watch()], **weighing,
        )  # fmt: skip
        made.remove_callback(transformers.PrinterCallback)  # rows are recorded, standard output is the run's
        made.train(resume_from_checkpoint=None if last is None else str(last))
        self._log = made.state.log_history
        job.diverged = not all(bool(p.isfinite().all()) for p in self.model.parameters())

    def logged(self, name: str) -> list[float]:
        """What TRL has logged under a name, over the run."""
        return [float(row[name]) for row in self._log if name in row]

    def validated(self) -> Rollout:
        """Answers to the questions of the curves."""
        return self._answered(self._few, self.config.measure_samples)

    def tested(self) -> Rollout:
        """Answers to the questions of the result."""
        return self._answered(self._test, self.config.test_samples)

    @property
    def right(self) -> Callable[..., list[float]]:
        """The reward for right answers."""
        return right if self.config.answers == "boxed" else right_number

    def _prompts(self, rows: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
        asked = self._boxed if self.config.answers == "boxed" else prompt
        return [{"prompt": asked(question), "answer": answer} for question, answer in rows]

    def _boxed(self, question: str) -> str:
        text = f"{question}\n{INSTRUCTION}"
        if not self.tokenizer.chat_template:
            return text
        messages = [{"role": "user", "content": text}]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _last_checkpoint(self) -> Path | None:
        found = [path for path in self.job.folder.glob("checkpoint-*") if (path / STATE).is_file()]
        return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

    def _answered(self, rows: Sequence[dict[str, str]], samples: int) -> Rollout:
        """One sample per question is greedy, as in the paper on reward weights; more are drawn."""
        parts = []
        with torch.random.fork_rng(), torch.no_grad(), evaluating(self.model):
            torch.manual_seed(MEASURE_SEED)  # the same random numbers for all arms
            for index, row in enumerate(rows):
                parts.append(self._one(index, row, samples))
        return Rollout(*_padded(parts))

    def _one(self, index: int, row: dict[str, str], samples: int) -> tuple[Tensor, ...]:
        prompt = self.tokenizer(row["prompt"], return_tensors="pt").to(self.job.device)
        drawn: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_p": self.config.top_p, "top_k": 0}
        tokens = self.model.generate(
            **prompt, **(drawn if samples > 1 else {"do_sample": False}), num_return_sequences=samples,
            max_new_tokens=self.config.max_tokens, pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        size = prompt["input_ids"].shape[1]
        answers = tokens[:, size:]
        ended = (answers == self.tokenizer.eos_token_id).long()
        mask = (ended.cumsum(1) - ended) == 0
        seen = torch.cat([torch.ones_like(tokens[:, :size], dtype=torch.bool), mask], 1)
        logps, entropies = [], []
        for rows in torch.arange(samples, device=tokens.device).split(self.config.micro_batch):
            logp, entropy, _ = token_logprobs(self.model, tokens[rows], seen[rows], mask[rows])
            logps.append(logp)
            entropies.append(entropy)
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        scores = list(zip(self.right(texts, answer=[row["answer"]] * samples), map(clarity, texts), strict=True))
        group = torch.full((samples,), index)
        return tokens[:, :size], answers, mask, torch.cat(logps), torch.cat(entropies), group, torch.tensor(scores)


def _wanted(answer: str) -> str:
    """What stands behind ``####``, as GSM8K marks it, or else the answer."""
    return answer.rpartition("####")[2].strip()


def _padded(parts: Sequence[tuple[Tensor, ...]]) -> Iterator[Tensor]:
    for column in zip(*parts, strict=True):
        width = max(part.shape[1] for part in column) if column[0].dim() == 2 else 0
        filled = [
            torch.nn.functional.pad(part, (0, width - part.shape[1])) if part.dim() == 2 else part for part in column
        ]
        yield torch.cat(filled).cpu()
