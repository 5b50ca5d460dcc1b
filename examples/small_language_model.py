"""Teach a small language model sums: GRPO with STEER's token weights through TRL, LoRA, a reward that is checked.

python examples/small_language_model.py --steps 100                       # SmolLM2-135M from `make models`
python examples/small_language_model.py --steps 100 --rule none           # plain GRPO
python examples/small_language_model.py --model Qwen/Qwen2.5-0.5B-Instruct --data gsm8k --tokens 256
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from weightsmith.integrations.trl import Reweighting
from weightsmith.lab.data.text_sets import load_questions, same_answer
from weightsmith.reweight import ClipCov, EntropyBonus, Steer, TokenRule

RULES: dict[str, TokenRule | None] = {
    "none": None,
    "steer": Steer("exact"),
    "steer-signed": Steer("exact", mode="asymmetric", lambda_min=0.3, lambda_max=1.0),
    "clip-cov": ClipCov(2e-3),
    "entropy-bonus": EntropyBonus(0.01),
}


class Trainer(Reweighting, GRPOTrainer):
    """TRL's trainer, with weights of tokens."""


def right(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """1 where the last number of a reply is the right one."""
    return [float(same_answer(said[0]["content"], wanted)) for said, wanted in zip(completions, answer, strict=True)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, and print what TRL logs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".models/SmolLM2-135M-Instruct", help="folder or hub id")
    parser.add_argument("--data", default="sums", help="sums, arithmetic, gsm8k, or a file of questions and answers")
    parser.add_argument("--rule", choices=sorted(RULES), default="steer")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=4, help="prompts per rollout, with eight answers each")
    parser.add_argument("--tokens", type=int, default=16, help="most tokens of an answer")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--folder", default="runs/small-language-model")
    options = parser.parse_args(arguments)
    rows = [
        {"prompt": [{"role": "user", "content": f"{question}. Reply with the number only."}], "answer": answer}
        for question, answer in load_questions(options.data, "train")
    ]
    args = GRPOConfig(
        output_dir=options.folder, max_steps=options.steps, learning_rate=options.lr, num_generations=8,
        per_device_train_batch_size=8, steps_per_generation=options.prompts, num_iterations=2,
        gradient_accumulation_steps=options.prompts, max_completion_length=options.tokens, logging_steps=1,
        lr_scheduler_type="constant", save_strategy="no", report_to=[], epsilon_high=0.28, bf16=False,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = Trainer(
        model=options.model, reward_funcs=right, args=args, train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(options.model, padding_side="left"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        token_weighting=RULES[options.rule],
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return 0


if __name__ == "__main__":
    sys.exit(main())
