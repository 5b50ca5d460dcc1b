"""Token rules in two processes: a selection is over the tokens of both, as one process would make it."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("trl")

from weightsmith.reweight import ForkTokens, KLCov, Steer

HERE = Path(__file__).parent
RULES = {"fork": lambda: ForkTokens(0.25), "steer": lambda: Steer(lambda_min=0.1), "kl-cov": lambda: KLCov(0.2)}
FIELDS = ("logp", "old_logp", "advantages", "mask", "entropy", "old_entropy")


def train(folder, rule):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = os.pathsep.join([str(HERE.parents[1] / "src"), str(HERE)])
    done = subprocess.run(
        [*command, str(HERE / "trl_ranks.py"), str(folder), rule], capture_output=True, text=True, timeout=240,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}-of-2.pt", weights_only=False) for rank in range(2)]


def together(tokens):
    """The tokens of all micro-batches of all processes, as one process holds them."""
    width = max(part.mask.shape[1] for part in tokens)

    def joined(name):
        parts = [getattr(part, name) for part in tokens]
        if parts[0] is None:
            return None
        return torch.cat([F.pad(p, (0, width - p.shape[1])) if p.dim() == 2 and p.shape[1] > 1 else p for p in parts])

    return replace(tokens[0], **{name: joined(name) for name in FIELDS})


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_a_selection_over_two_processes_is_that_of_one(rule, tmp_path):
    (first, one), (second, other) = train(tmp_path, rule)
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert len(first) == len(second) == 2  # optimizer steps
    differed = False
    for (seen, answered), (seen_too, answered_too) in zip(first, second, strict=True):
        assert len(seen) == 2  # micro-batches
        everything = [*seen, *seen_too]
        expected = RULES[rule]()(together(everything))
        alone = [RULES[rule]()(together(part)) for part in (seen, seen_too)]
        at = 0
        for tokens, (factors, drift) in zip(everything, [*answered, *answered_too], strict=True):
            rows, width = tokens.mask.shape
            for found, name in ((factors, "weights"), (drift, "drift")):
                wanted = getattr(expected, name)
                assert (found is None) == (wanted is None)
                if found is not None:
                    counted = tokens.mask > 0
                    torch.testing.assert_close(
                        found[:, :width][counted].float(), wanted[at : at + rows, :width][counted].float()
                    )
                    share = len(wanted) // 2
                    by_itself = getattr(alone[at // share], name)[at % share : at % share + rows, :width]
                    differed |= not torch.equal(found[:, :width][counted], by_itself[counted])
            at += rows
    assert differed, "one process alone would have chosen the same, so this shows nothing"
