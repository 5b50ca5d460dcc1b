"""A training step with gradient-weighted rewards beside one with fixed weights, and hypervolumes beside pymoo.

    OMP_NUM_THREADS=1 python benchmarks/rewards.py [--rounds N]

A step is what it is in the experiment: sample 48 x 8 answers, reward, update in two mini-batches; three objectives.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from _timing import interleave, show
from weightsmith.experiments.policies import scored
from weightsmith.lab.models.policy import PolicyTransformer
from weightsmith.lab.policy import optimize_policy
from weightsmith.lab.tasks.expressions import AnyDigits
from weightsmith.reweight import (
    FixedWeights,
    GradientWeights,
    hypervolume,
    objective_advantages,
    objective_influence,
    policy_loss,
)

TASK = AnyDigits()


def step(kind: str) -> Callable[[], object]:
    """One rollout and its updates."""
    torch.manual_seed(0)
    model = PolicyTransformer(
        vocabulary=TASK.vocabulary, length=TASK.prompt_length + TASK.new_tokens, width=128, depth=4
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    weighting = FixedWeights([1 / 3] * 3) if kind == "fixed" else GradientWeights(3)
    names = [name for name, _ in model.named_parameters() if name.startswith(("blocks.1.", "blocks.2."))]
    targets = [model.get_parameter(name) for name in names]

    def advantages(rollout):
        scores = torch.cat([rollout.scores, (rollout.mask.sum(1, keepdim=True) < 5).float()], 1)
        find = partial(objective_advantages, group=rollout.group, mask=rollout.mask)
        if isinstance(weighting, GradientWeights):
            each = torch.stack([find(scores, one) for one in torch.eye(3)])
            if kind == "backward":
                logp = scored(model, rollout)[0]
                found = objective_influence(logp, each, rollout.mask, targets, max_norm=None)
            else:
                tokens = torch.cat([rollout.prompts, rollout.answers[:, :-1]], 1)

                def logp_of(values):
                    logits = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (tokens,))
                    answers = logits[:, rollout.prompts.shape[1] - 1 :].log_softmax(-1)
                    return answers.gather(-1, rollout.answers[..., None])[..., 0]

                found = objective_influence(logp_of, each, rollout.mask, targets, method=kind, max_norm=None)
            weighting.update(found)
        return find(scores, weighting.reward_weights)

    def loss(rollout, gains):
        return policy_loss(scored(model, rollout)[0], gains, rollout.mask, old_logp=rollout.logp).loss

    return lambda: optimize_policy(
        model, optimizer, TASK, advantages=advantages, loss=loss, steps=1, prompts=48, samples=8, mini_batches=2,
        seed=0, device=torch.device("cpu"),
    )  # fmt: skip


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    steps = {kind: step(kind) for kind in ("fixed", "backward", "sequence", "jvp")}
    show(
        "a step with three objectives (targets: backward 1.6x, without clipping 1.4x)",
        interleave(steps, rounds=rounds),
        baseline="fixed",
    )
    from pymoo.indicators.hv import HV

    rng = np.random.default_rng(0)
    for n, k in ((100, 3), (400, 3), (50, 4)):
        points = rng.random((n, k))
        theirs = HV(ref_point=np.zeros(k))
        calls = {"pymoo": lambda p=points, h=theirs: h(-p), "ours": lambda p=points, k=k: hypervolume(p, [0.0] * k)}
        show(f"hypervolume of {n} points in {k} dimensions", interleave(calls, rounds=rounds), baseline="pymoo")
    start = time.perf_counter()
    hypervolume(rng.random((400, 3)), [0.0] * 3)
    print(f"400 points in 3 dimensions: {1e3 * (time.perf_counter() - start):.2f} ms; target 5 ms")


if __name__ == "__main__":
    main()
