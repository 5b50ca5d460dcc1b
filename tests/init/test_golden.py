"""Reference values that were computed without this library: truncations, effective ranks, soft ranks."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from weightsmith.diagnose import effective_rank
from weightsmith.init import low_rank_, low_rank_from_, soft_rank_

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "rich-lazy.safetensors")
CUTS = [(name, i, int(r)) for name in ("square", "rect", "conv") for i, r in enumerate(GOLDEN[f"init_{name}/ranks"])]
KINDS = ("stable", "nuclear", "participation", "participation_s", "entropy", "eig_sum", "eig")


@pytest.mark.parametrize(("name", "index", "rank"), CUTS)
def test_a_cut_keeps_the_norm_that_was_asked_for(name, index, rank):
    base = GOLDEN[f"init_{name}/W0"]
    torch.testing.assert_close(
        low_rank_(torch.empty_like(base), rank, base=base), GOLDEN[f"init_{name}/W_rank{rank}"], rtol=1e-8, atol=1e-12
    )
    spectral = low_rank_from_(base.clone(), rank, norm="spectral")
    torch.testing.assert_close(spectral, GOLDEN[f"init_{name}/W_rank{rank}_spectral"], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("name", "index", "rank"), CUTS)
def test_effective_ranks(name, index, rank):
    w = GOLDEN[f"init_{name}/W_rank{rank}"]
    for kind, expected in zip(KINDS, GOLDEN[f"init_{name}/effective_ranks"][index], strict=True):
        if expected.isnan():
            with pytest.raises(ValueError, match="square"):
                effective_rank(w, kind)
        else:
            assert effective_rank(w, kind) == pytest.approx(expected.item(), rel=1e-8)


@pytest.mark.parametrize("target", [2.0, 5.5])
@pytest.mark.parametrize("kind", ["stable", "nuclear", "participation", "entropy"])
def test_soft_ranks(kind, target):
    base = GOLDEN["soft/W0"]
    w = soft_rank_(torch.empty_like(base), target, kind, base=base)
    torch.testing.assert_close(w, GOLDEN[f"soft/{kind}_{target}/W"], rtol=1e-7, atol=1e-10)
    values = GOLDEN[f"soft/{kind}_{target}/singular_values"]
    torch.testing.assert_close(torch.linalg.svdvals(w), values, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_authors_script_starts_from_the_same_weights(index):
    base, rank = GOLDEN["rnn_2af/W0"], int(GOLDEN["rnn_2af/ranks"][index])
    torch.testing.assert_close(
        low_rank_(torch.empty(32, 32), rank, base=base), GOLDEN[f"rnn_2af/{index}/init/h2h"], rtol=0, atol=1e-6
    )
