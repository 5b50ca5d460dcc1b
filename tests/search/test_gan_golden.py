"""Networks, losses and training loops against the authors' code in double precision."""

import copy

import pytest
import torch
from gan_reference import (
    GOLDEN,
    genotypes,
    norms,
    plain_name,
    real,
    sorted_names,
    super_discriminator,
    super_generator,
    tolerances,
)
from torch.testing import assert_close

from weightsmith.search.gan import Discriminator, Generator, SimpleDiscriminator
from weightsmith.search.gan.counts import discriminator_parameters, generator_parameters
from weightsmith.search.gan.genotypes import DISCRIMINATORS, GENERATORS
from weightsmith.search.gan.losses import discriminator_step, generator_step
from weightsmith.search.supernet import count_parameters

CLOSE = {"rtol": 0, "atol": 1e-9}
TRAINED = {"rtol": 0, "atol": 1e-8}


def within(found, expected, names):
    return bool(((found - expected).abs() <= tolerances(names)).all())


def adam(model):
    return torch.optim.Adam(model.parameters(), 2e-4, betas=(0.0, 0.9))


@pytest.mark.parametrize("index", range(3))
def test_generators_inherit_and_compute_as_the_reference(index):
    model, genotype = super_generator().eval(), genotypes("gsuper.genotypes")[index]
    expected = GOLDEN["gsuper.out_eval"][index]
    with torch.no_grad():
        shared = model(GOLDEN["gsuper.z"], genotype)
        alone = model.subnet(genotype)(GOLDEN["gsuper.z"])
    assert_close(shared[0, :, ::2, ::2], expected, **CLOSE)
    assert torch.equal(shared, alone)


@pytest.mark.parametrize("index", range(7))
def test_discriminators_inherit_and_compute_as_the_reference(index):
    model, genotype = super_discriminator().eval(), genotypes("dsuper.genotypes")[index]
    with torch.no_grad():
        shared = model(real(0, 2), genotype)
        alone = model.subnet(genotype)(real(0, 2))
    assert_close(shared, GOLDEN["dsuper.out_eval"][index], **CLOSE)
    assert torch.equal(shared, alone)


def test_a_call_in_training_mode_does_one_power_iteration():
    model = super_discriminator()
    out = model(real(0, 2), DISCRIMINATORS["D_C"])
    assert_close(out.detach(), GOLDEN["dsuper.out_train_first"], **CLOSE)
    assert_close(model.cell0.e0.op3.parametrizations["weight"][0].u, GOLDEN["dsuper.u_after"], **CLOSE)


@pytest.mark.parametrize("mode", ["none", "zeros"])
def test_stage_one_trains_as_the_reference(mode):
    generator = super_generator()
    discriminator = super_discriminator().subnet(DISCRIMINATORS["D_autogan"])
    g_optimizer, d_optimizer = adam(generator), adam(discriminator)
    zs = iter(GOLDEN["s1.z_all"].split(GOLDEN["s1.z_len"].tolist()))
    drawn = iter(genotypes("s1.genotype_per_call"))
    zero = {"zero_unsampled": mode == "zeros"}
    d_losses, g_losses = [], []
    for t in range(6):
        genotype = next(drawn)
        sampled = lambda z, genotype=genotype: generator(z, genotype)  # noqa: E731
        d_losses.append(discriminator_step(discriminator, sampled, d_optimizer, real(t, 2), next(zs), **zero))
        assert next(drawn) == genotype
        g_losses.append(generator_step(discriminator, sampled, g_optimizer, next(zs), **zero))
    assert_close(torch.tensor(d_losses, dtype=torch.float64), GOLDEN[f"s1.d_loss.{mode}"], **CLOSE)
    assert_close(torch.tensor(g_losses, dtype=torch.float64), GOLDEN[f"s1.g_loss.{mode}"], **CLOSE)
    assert within(norms(generator), GOLDEN[f"s1.gen_l2.{mode}"], sorted_names(generator))
    if mode == "none":
        assert_close(norms(discriminator), GOLDEN["s1.dis_l2"], **TRAINED)
        final = generator.state_dict()
        for name in (name for name in GOLDEN if name.startswith("s1.gen_final.")):
            plain = name.removeprefix("s1.gen_final.")
            assert within(final[plain], GOLDEN[name], [plain])


def test_stage_two_trains_one_to_one_and_resets_as_the_reference():
    origin, discriminator = super_generator().subnet(GENERATORS["G*"]), super_discriminator()
    copies = [copy.deepcopy(origin) for _ in range(3)]
    d_optimizer, g_optimizers = adam(discriminator), [adam(model) for model in copies]
    zs = iter(GOLDEN["s2.z_all"].split(GOLDEN["s2.z_len"].tolist()))
    partners, individuals = genotypes("dsuper.genotypes"), iter(GOLDEN["s2.individual"].tolist())
    d_losses, g_losses, t, names = [], [], 0, sorted_names(origin)
    for round_ in range(2):
        for _ in range(3):
            for _ in range(2):
                i = next(individuals)
                scored = lambda x, i=i: discriminator(x, partners[i])  # noqa: E731
                d_losses.append(discriminator_step(scored, copies[i], d_optimizer, real(100 + t, 2), next(zs)))
                t += 1
            g_losses.append(generator_step(scored, copies[i], g_optimizers[i], next(zs)))
        assert within(torch.stack([norms(model) for model in copies]), GOLDEN[f"s2.gen_l2.round{round_}"], names)
        means = torch.stack([model.bn.running_mean for model in copies])
        assert_close(means, GOLDEN[f"s2.bn_mean.round{round_}"], **TRAINED)
        best = copy.deepcopy((copies[round_].state_dict(), g_optimizers[round_].state_dict()))
        for model, optimizer in zip(copies, g_optimizers, strict=True):
            model.load_state_dict(best[0])
            optimizer.load_state_dict(copy.deepcopy(best[1]))
    assert within(torch.stack([norms(model) for model in copies]), GOLDEN["s2.gen_l2.after_reset"], names)
    assert_close(torch.tensor(d_losses, dtype=torch.float64), GOLDEN["s2.d_loss"], **CLOSE)
    assert_close(torch.tensor(g_losses, dtype=torch.float64), GOLDEN["s2.g_loss"], **CLOSE)
    assert_close(norms(discriminator), GOLDEN["s2.dis_l2"], **TRAINED)


def test_parameter_counts_are_those_of_the_reference():
    assert [generator_parameters(g) for g in genotypes("params.g")] == GOLDEN["params.g_count"].tolist()
    assert [discriminator_parameters(g) for g in genotypes("params.d")] == GOLDEN["params.d_count"].tolist()


@pytest.mark.parametrize(("name", "bottom", "count"), [("G*", 4, 7_142_403), ("G*", 6, 11_550_723)])
def test_published_generators_have_the_published_counts(name, bottom, count):
    assert generator_parameters(GENERATORS[name], bottom=bottom) == count
    with torch.device("meta"):
        assert count_parameters(Generator(name, bottom=bottom)) == count


@pytest.mark.parametrize(("name", "count"), [("D_C", 906_240), ("D_S", 1_578_112), ("D_autogan", 1_053_824)])
def test_published_discriminators_have_the_published_counts(name, count):
    assert discriminator_parameters(DISCRIMINATORS[name]) == count
    assert count_parameters(Discriminator(name)) == count


def test_the_other_networks_have_the_published_counts():
    assert round(generator_parameters(GENERATORS["adversarialnas"]) / 1e6, 2) == 8.85
    assert count_parameters(SimpleDiscriminator()) == 921_920
    with torch.device("meta"):
        assert count_parameters(Generator()) == 72_776_963
    assert count_parameters(Discriminator()) == 23_806_592


def test_names_are_those_of_the_reference():
    named = {plain_name(name) for name, _ in super_discriminator().named_parameters()}
    assert {"cell0.e5.op2.weight", "stem.shortcut.bias", "fc.weight"} <= named
