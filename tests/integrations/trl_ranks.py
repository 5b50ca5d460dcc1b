"""Started by torchrun: trains with a token rule, and keeps what each process gave the rule and what came back."""

import sys
from pathlib import Path

import torch
from test_trl import ForkTokens, KLCov, Steer, trainer, weights

RULES = {"fork": lambda: ForkTokens(0.25), "steer": lambda: Steer(lambda_min=0.1), "kl-cov": lambda: KLCov(0.2)}


def main(folder, name):
    made = trainer(
        folder, token_weighting=RULES[name](), per_device_train_batch_size=2, gradient_accumulation_steps=2,
        steps_per_generation=4, num_generations=2, max_steps=2,
    )  # fmt: skip
    kept, inner = [], made._plan._answer

    def answer(seen):
        parts = inner(seen)
        kept.append((seen, [(effect.weights, effect.drift) for effect, _ in parts]))
        return parts

    made._plan._answer = answer
    made.train()
    rank = made.accelerator.process_index
    torch.save((kept, weights(made)), Path(folder) / f"rank{rank}-of-{made.accelerator.num_processes}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
