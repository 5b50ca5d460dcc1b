"""Super-networks and single networks: what they refuse, and that nothing is computed in place."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from weightsmith.core.errors import UsageError
from weightsmith.core.fold import fold_
from weightsmith.search import Choice, SearchSpace, SuperNet
from weightsmith.search.gan import (
    DISCRIMINATOR_SPACE,
    GENERATOR_SPACE,
    Discriminator,
    Generator,
    SimpleDiscriminator,
    discriminator_loss,
    discriminator_step,
    generator_loss,
    generator_step,
)

SMALL = {"channels": 2, "bottom": 1, "latent": 6, "image_channels": 1}
PLAIN = ((3, 0, 3, 0, 2, -1, -1),) * 3


@pytest.mark.parametrize("seed", range(6))
def test_a_stand_alone_network_computes_what_the_super_network_does(seed):
    rng = np.random.default_rng(seed)
    g, d = Generator(**SMALL).eval(), Discriminator(channels=2, image_channels=1).eval()
    genotype, opponent = GENERATOR_SPACE.sample(rng), DISCRIMINATOR_SPACE.sample(rng)
    z, x = torch.randn(3, 6), torch.randn(3, 1, 32, 32)
    assert torch.equal(g(z, genotype), g.subnet(genotype)(z))
    assert torch.equal(d(x, opponent), d.subnet(opponent)(x))


def test_a_subnet_is_a_copy_and_its_state_is_the_inherited_one():
    g = Generator(**SMALL)
    genotype = GENERATOR_SPACE.sample(np.random.default_rng(0))
    alone = g.subnet(genotype)
    inherited = g.subnet_state_dict(genotype)
    assert alone.state_dict().keys() == inherited.keys()
    assert all(torch.equal(value, inherited[name]) for name, value in alone.state_dict().items())
    before = g.rgb.bias.detach().clone()
    alone.rgb.bias.data += 1
    assert torch.equal(g.rgb.bias, before)
    fresh = Generator(genotype, **SMALL)
    fresh.load_state_dict(inherited)
    z = torch.randn(2, 6)
    assert not torch.equal(fresh.eval()(z), alone.eval()(z))
    alone.rgb.bias.data -= 1
    assert torch.allclose(fresh(z), alone(z))


@pytest.mark.parametrize("make", [lambda: Generator(**SMALL), lambda: Discriminator(channels=2, image_channels=1)])
def test_a_subnet_without_inheritance_has_weights_of_its_own(make):
    model = make()
    genotype = model.space.sample(np.random.default_rng(0))
    alone = model.subnet(genotype, inherit=False)
    inherited = model.subnet_state_dict(genotype)
    for name, value in alone.state_dict().items():
        if name.endswith(("weight", "original")) and value.dim() > 1:
            assert not torch.equal(value, inherited[name]), name


def test_spectral_norms_are_one_after_building_and_after_drawing_anew():
    for model in (Discriminator(PLAIN, channels=8), Discriminator(PLAIN, channels=8).initialize_()):
        for layer in (model.stem.conv2, model.cell0.e0.op3, model.fc):
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.1)


def test_skips_are_added_out_of_place():
    genotype = ((0, 0, 1, 0, 1, 1, 1),) * 3
    g = Generator(genotype, **SMALL)
    kept = []
    g.cell1.e0.register_forward_hook(lambda _, __, out: kept.append((out, out.clone())))
    g(torch.randn(2, 6)).sum().backward()
    assert torch.equal(*kept[0])


def test_a_folded_discriminator_scores_as_before():
    model = Discriminator("D_C", channels=2).eval()
    x = torch.randn(2, 3, 32, 32)
    before = model(x)
    fold_(model)
    assert torch.allclose(model(x), before, atol=1e-6)
    assert all("parametrizations" not in name for name in model.state_dict())


@pytest.mark.parametrize("side", [8, 16, 32, 48])
def test_the_side_of_images_is_eight_times_the_bottom(side):
    model = Generator("G*", channels=2, bottom=side // 8, latent=6, image_channels=1)
    images = model(torch.randn(1, 6))
    assert images.shape == (1, 1, side, side)
    assert images.abs().max() <= 1


def test_a_batch_of_one_trains():
    g, d = Generator("G*", **SMALL), Discriminator(PLAIN, channels=2, image_channels=1)
    optimizer = torch.optim.Adam(d.parameters(), 1e-3, betas=(0.0, 0.9))
    assert np.isfinite(discriminator_step(d, g, optimizer, torch.zeros(1, 1, 8, 8), torch.randn(1, 6)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_losses_are_taken_in_single_precision_at_least(dtype):
    real, fake = torch.randn(7, 1).to(dtype), torch.randn(7, 1).to(dtype)
    expected = (1 - real.double()).clamp_min(0).mean() + (1 + fake.double()).clamp_min(0).mean()
    found = discriminator_loss(real, fake)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert generator_loss(fake).item() == pytest.approx(-fake.double().mean().item(), rel=1e-6, abs=1e-7)


def test_a_generator_step_leaves_the_discriminator_alone_and_the_other_way_round():
    g, d = Generator("G*", **SMALL), Discriminator(PLAIN, channels=2, image_channels=1)
    go, do = (torch.optim.Adam(model.parameters(), 1e-3, betas=(0.0, 0.9)) for model in (g, d))
    weights = {name: value.clone() for name, value in d.named_parameters()}
    generator_step(d, g, go, torch.randn(4, 6))
    assert all(torch.equal(value, weights[name]) for name, value in d.named_parameters())
    weights = {name: value.clone() for name, value in g.named_parameters()}
    discriminator_step(d, g, do, torch.rand(4, 1, 8, 8), torch.randn(4, 6))
    assert all(torch.equal(value, weights[name]) for name, value in g.named_parameters())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Generator("G*", latent=100), "latent must be divisible by 3, got 100"),
        (lambda: Generator("G*", channels=0), "channels must be a whole number of at least 1, got 0"),
        (lambda: Generator("G+"), "generator 'G\\+' is not known"),
        (lambda: Discriminator("D_C", image_channels=0), "image_channels must be"),
        (lambda: Discriminator("D_C", channels=2)(torch.zeros(1, 3, 6, 6)), "divisible by 4, got \\(6, 6\\)"),
        (lambda: Discriminator([(1, 1, 1, 1, 1, 0, 0)] * 3, channels=2)(torch.zeros(1, 3, 8, 8)), "halves .* 4 times"),
        (lambda: SimpleDiscriminator()(torch.zeros(1, 3, 16, 16)), "at least 32x32"),
        (lambda: Generator(**SMALL)(torch.zeros(1, 6)), "pass forward a genotype"),
        (
            lambda: Generator("G*", **SMALL)(torch.zeros(1, 6), [[0, 0, 2, 2, 2, 2, 2]] * 3),
            "candidate 0 is not in this",
        ),
        (lambda: Generator("G*", **SMALL)(torch.zeros(1, 6), [[0, 0, 0, 0, 2, 2, 2]] * 3), "node 2 has no input"),
        (lambda: generator_step(None, None, None, torch.zeros(0, 6)), "empty batch"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(call, words):
    with pytest.raises(UsageError, match=words):
        call()


class TwoPaths(SuperNet):
    space = SearchSpace.of(first=2, second=3)

    def __init__(self):
        super().__init__()
        self.first = Choice({0: nn.Linear(4, 4), 1: nn.Identity()})
        self.second = Choice({0: nn.Linear(4, 2), 1: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))})
        self.second.add_module("op2", nn.Linear(4, 2, bias=False))

    def choices(self):
        yield 0, 0, self.first
        yield 0, 1, self.second

    def forward(self, x, genotype=None):
        (cell,) = self.chosen(genotype)
        return self.second(self.first(x, cell[0]), cell[1])


def test_any_network_can_be_a_super_network():
    model, x = TwoPaths(), torch.randn(5, 4)
    alone = model.subnet([1, 2])
    assert list(alone.state_dict()) == ["second.op2.weight"]
    assert torch.equal(alone(x), model(x, [1, 2]))
    assert torch.equal(copy.deepcopy(alone)(x), alone(x))
    model(x, ((0, 1),)).sum().backward()
    assert model.second.op0.weight.grad is None
    with pytest.raises(UsageError, match="gene 'second' must be a whole number from 0 to 2, got 3"):
        model.subnet([0, 3])


def test_an_invalid_tuple_is_refused_like_any_other_genotype():
    discriminator = Discriminator(channels=2)
    valid = DISCRIMINATOR_SPACE.sample(np.random.default_rng(0))
    broken = ((*valid[0][:5], -1, 3), *valid[1:])
    for _ in range(2):
        discriminator.chosen(valid)
        with pytest.raises(UsageError, match="must be both -1 or both from 0 to 5"):
            discriminator(torch.zeros(1, 3, 32, 32), broken)
