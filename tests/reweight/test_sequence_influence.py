"""The influence of objectives from one backward pass is what one backward pass per objective gives."""

import pytest
import torch
from torch import nn

from weightsmith.core.errors import UsageError
from weightsmith.lab.models.policy import PolicyTransformer
from weightsmith.reweight import objective_influence

TOKENS, ANSWERS = torch.randint(7, (6, 5), generator=torch.Generator().manual_seed(0)), 3


class Norms(nn.Module):
    """Sequences through layers that share a weight, one scale of its own, and a root mean square norm."""

    def __init__(self, change=False):
        super().__init__()
        self.embed, self.norm, self.layer = nn.Embedding(7, 8), nn.RMSNorm(8), nn.Linear(8, 8)
        self.scale, self.change = nn.Parameter(torch.rand(8)), change

    def forward(self, tokens):
        x = self.layer(self.norm(self.embed(tokens)))
        x = x.tanh_() if self.change else x.tanh()
        return nn.functional.linear(self.scale * self.layer(x), self.embed.weight)


def policy_of(kind):
    torch.manual_seed(0)
    made = PolicyTransformer(vocabulary=7, length=5, width=8, depth=2, heads=2) if kind == "transformer" else Norms()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return made.double()


def influence(policy, method, *, where="", advantages=None, **options):
    g = torch.Generator().manual_seed(1)
    mask = torch.rand(6, ANSWERS, generator=g) < 0.7
    answers = torch.randint(7, (6, ANSWERS), generator=g)
    given = torch.randn(3, 6, generator=g, dtype=torch.float64)
    names = [name for name, _ in policy.named_parameters() if name.startswith(where)]

    def logp(values):
        logits = torch.func.functional_call(policy, dict(zip(names, values, strict=True)), (TOKENS,))
        return logits[:, -ANSWERS:].log_softmax(-1).gather(-1, answers[..., None])[..., 0]

    return objective_influence(
        logp, given if advantages is None else advantages, mask, [policy.get_parameter(name) for name in names],
        method=method, **options,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["transformer", "norms"])
@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_it_equals_one_backward_pass_per_objective(kind, max_norm):
    policy = policy_of(kind)
    found = influence(policy, "sequence", max_norm=max_norm)
    torch.testing.assert_close(found, influence(policy, "backward", max_norm=max_norm), rtol=1e-9, atol=1e-14)
    assert all(p.grad is None for p in policy.parameters())


def test_it_measures_some_layers_and_clips_by_the_norm_over_all():
    policy = policy_of("transformer")
    options = {"where": "blocks.1.", "max_norm": 0.05, "norm_params": list(policy.parameters())}
    found = influence(policy, "sequence", **options)
    torch.testing.assert_close(found, influence(policy, "backward", **options), rtol=1e-9, atol=1e-14)


def test_advantages_that_differ_within_a_sequence_are_refused():
    each = torch.randn(3, 6, ANSWERS, dtype=torch.float64)
    with pytest.raises(UsageError, match="constant within a sequence"):
        influence(policy_of("norms"), "sequence", advantages=each)


def test_layers_whose_output_is_changed_in_place_are_refused():
    with pytest.raises(UsageError, match="in place"):
        influence(Norms(change=True).double(), "sequence")


def test_it_needs_a_function():
    logp = torch.zeros(2, 3, requires_grad=True)
    with pytest.raises(UsageError, match="as a function"):
        objective_influence(logp, torch.ones(1, 2), torch.ones(2, 3), [logp], method="sequence")


@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_the_graph_it_followed_serves_the_loss_of_the_same_step(max_norm):
    policy = policy_of("transformer")
    kept = []

    def logp(_):
        kept.append(policy(TOKENS)[:, -ANSWERS:].log_softmax(-1)[..., 0])
        return kept[-1]

    params = list(policy.parameters())
    given, mask = torch.randn(3, 6, dtype=torch.float64), torch.ones(6, ANSWERS)
    objective_influence(logp, given, mask, params, method="sequence", max_norm=max_norm)
    found = torch.autograd.grad(kept[0].sum(), params)
    torch.testing.assert_close(found, torch.autograd.grad(logp(None).sum(), params))


def test_a_weight_that_is_also_used_in_another_place_is_found_behind_a_cached_cast():
    layer = nn.Linear(8, 7)
    x = torch.randn(6, ANSWERS, 8)

    def logp(values):
        with torch.autocast("cpu", dtype=torch.bfloat16):  # casts the weight once for both
            return (layer(x) + x.tanh() @ values[0].T).float().log_softmax(-1)[..., 0]

    given, mask, params = torch.randn(3, 6), torch.ones(6, ANSWERS), [layer.weight, layer.bias]
    found, expected = (objective_influence(logp, given, mask, params, method=how) for how in ("sequence", "backward"))
    torch.testing.assert_close(found, expected, rtol=0.02, atol=1e-4)
