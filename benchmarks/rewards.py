"""A training step with gradient-weighted rewards beside one with fixed weights, and hypervolumes beside pymoo.

    OMP_NUM_THREADS=1 python benchmarks/rewards.py [--rounds N]

A step is what it is in the experiment: sample 48 x 8 answers, reward, update in two mini-batches, or in one; three
objectives. The rewards are random, so that every answer has an advantage in every objective: what has none, costs less.
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


def step(kind: str, mini_batches: int) -> Callable[[], object]:
    """One rollout and its updates; a ``"shared"`` forward pass serves the influence and the only update."""
    method, _, shared = kind.partition(", ")
    torch.manual_seed(0)
    model = PolicyTransformer(
        vocabulary=TASK.vocabulary, length=TASK.prompt_length + TASK.new_tokens, width=128, depth=4
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    weighting = FixedWeights([1 / 3] * 3) if method == "fixed" else GradientWeights(3)
    names = [name for name, _ in model.named_parameters() if name.startswith(("blocks.1.", "blocks.2."))]
    targets = [model.get_parameter(name) for name in names]

    def influence(rollout, each):
        """The influence, and the log-probabilities that it was computed from."""
        if method == "backward":
            logp = scored(model, rollout)[0]
            more = {"max_norm": None, "retain_graph": bool(shared)}
            return objective_influence(logp, each, rollout.mask, targets, **more), logp
        tokens, kept = torch.cat([rollout.prompts, rollout.answers[:, :-1]], 1), []

        def logp_of(values):
            if method == "sequence":  # is called with the parameters themselves
                kept.append(scored(model, rollout)[0])
                return kept[0]
            logits = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (tokens,))
            answers = logits[:, rollout.prompts.shape[1] - 1 :].log_softmax(-1)
            return answers.gather(-1, rollout.answers[..., None])[..., 0]

        return objective_influence(logp_of, each, rollout.mask, targets, method=method, max_norm=None), *kept[:1]

    def advantages(rollout):
        scores = torch.rand(len(rollout), 3)
        find = partial(objective_advantages, group=rollout.group, mask=rollout.mask)
        if isinstance(weighting, GradientWeights):
            found, *kept = influence(rollout, torch.stack([find(scores, one) for one in torch.eye(3)]))
            weighting.update(found)
        gains = find(scores, weighting.reward_weights)
        return torch.stack([gains, *kept], -1) if shared else gains  # so that both are shuffled alike

    def loss(rollout, gains):
        gains, logp = gains.unbind(-1) if shared else (gains, scored(model, rollout)[0])
        return policy_loss(logp, gains.detach(), rollout.mask, old_logp=rollout.logp).loss

    return lambda: optimize_policy(
        model, optimizer, TASK, advantages=advantages, loss=loss, steps=1, prompts=48, samples=8,
        mini_batches=mini_batches, seed=0, device=torch.device("cpu"),
    )  # fmt: skip


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    each = {1: ("backward", "backward, shared", "sequence", "sequence, shared", "jvp")}
    each[2] = ("backward", "sequence", "jvp")
    for updates, kinds in each.items():
        steps = {kind: step(kind, updates) for kind in ("fixed", *kinds)}
        show(
            f"updates per rollout: {updates}, objectives: 3 (targets: backward 1.6x, without clipping 1.4x)",
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
