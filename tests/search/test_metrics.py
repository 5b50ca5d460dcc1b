import math

import numpy as np
import pytest
import torch
from gan_reference import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torch import nn

from weightsmith.core.errors import MissingExtra, UsageError, WeightsmithWarning
from weightsmith.search.gan import Generator
from weightsmith.search.gan.judges import Inception, train_stand_in
from weightsmith.search.gan.metrics import frechet_distance, inception_score, kernel_distance, moments
from weightsmith.search.gan.scoring import NotFinite, Reference, generate, recalibrate_, score, to_bytes


@pytest.mark.parametrize("splits", [1, 10])
def test_inception_score_is_that_of_the_reference(splits):
    found = inception_score(GOLDEN["is.probs"], splits=splits)
    assert found == pytest.approx(GOLDEN[f"is.splits{splits}"].tolist(), abs=1e-9)


def test_frechet_distance_is_that_of_the_reference():
    found = frechet_distance(moments(GOLDEN["fid.a"]), moments(GOLDEN["fid.b"]))
    assert found == pytest.approx(GOLDEN["fid.value"].item(), abs=1e-9)


@given(st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_frechet_distance_is_the_textbook_formula(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(40, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(30, 5)) + 1
    s, t = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)
    found = frechet_distance(moments(torch.from_numpy(a)), moments(torch.from_numpy(b)))
    assert found == pytest.approx(expected, rel=1e-8, abs=1e-8)


def test_a_certain_class_and_an_even_mixture_have_the_extreme_scores():
    assert inception_score(torch.eye(10), splits=1)[0] == pytest.approx(10, rel=1e-9)
    assert inception_score(torch.full((20, 10), 0.1)) == pytest.approx((1.0, 0.0))
    assert inception_score(torch.eye(10)[:1].expand(20, -1)) == pytest.approx((1.0, 0.0))


def test_kernel_distance_is_unbiased_and_grows_with_a_shift():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 400, 8, generator=generator).unbind()
    same, shifted = kernel_distance(a, b, subset_size=200)[0], kernel_distance(a, b + 1, subset_size=200)[0]
    assert abs(same) < 0.05 < shifted
    naive = sum(((x @ y / 8 + 1) ** 3).item() for i, x in enumerate(a[:4]) for j, y in enumerate(a[:4]) if i != j) / 12
    naive += sum(((x @ y / 8 + 1) ** 3).item() for i, x in enumerate(b[:4]) for j, y in enumerate(b[:4]) if i != j) / 12
    naive -= 2 * sum(((x @ y / 8 + 1) ** 3).item() for x in a[:4] for y in b[:4]) / 16
    assert kernel_distance(a[:4], b[:4], subsets=1, subset_size=4)[0] == pytest.approx(naive, rel=1e-5)


def test_constant_images_have_finite_scores(judged):
    images, reference = judged
    found = score(torch.zeros(100, 1, 8, 8, dtype=torch.uint8), reference)
    assert not found.failed
    assert found.inception == pytest.approx(1.0)
    assert math.isfinite(found.distance)
    assert found.distance > score(images[:100], reference).distance


def test_features_that_are_not_finite_fail_with_the_worst_scores(judged):
    _, reference = judged

    class Broken(type(reference.network)):
        def forward(self, images):
            features, probabilities = super().forward(images)
            return features * math.inf, probabilities

    broken = Broken(1, 8, 4).eval()
    found = score(
        torch.zeros(100, 1, 8, 8, dtype=torch.uint8), Reference(broken, reference.moments, reference.features)
    )
    assert found.failed
    assert (found.inception, found.distance) == (1.0, 1e9)


@pytest.fixture(scope="module")
def judged():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    images = (60 * labels.view(-1, 1, 1, 1) + torch.randint(0, 60, (400, 1, 8, 8), generator=generator)).to(torch.uint8)
    return images, Reference.of(images, train_stand_in(images, labels, epochs=8))


def test_scores_carry_what_they_depend_on_and_refuse_other_ones(judged):
    images, reference = judged
    one = score(images[:200], reference, kernel=True)
    assert one.names == ("CS", "FCD", "KCD")
    assert one.kernel is not None
    assert one.fingerprint.weights == reference.network.digest
    assert (one.fingerprint.samples, one.fingerprint.real_samples) == (200, 400)
    with pytest.raises(UsageError, match="different samples cannot be compared: 200 and 100"):
        one.better_than(score(images[:100], reference))
    other = Reference.of(images, train_stand_in(images, torch.arange(400) % 4, epochs=1, seed=1))
    with pytest.raises(UsageError, match="different weights cannot be compared"):
        one.better_than(score(images[:200], other))


def test_the_stand_in_follows_from_its_seed_and_leaves_the_generator_alone(judged):
    images, _ = judged
    before = torch.get_rng_state()
    digests = {train_stand_in(images, torch.arange(400) % 4, epochs=1).digest for _ in range(2)}
    assert len(digests) == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_few_samples_are_refused_or_warned_about():
    with pytest.raises(UsageError, match="N of at least 2"):
        moments(torch.zeros(1, 3))
    with pytest.raises(UsageError, match="number must be at least 2"):
        generate(lambda z: z, 1, 6, seed=0)
    with pytest.warns(WeightsmithWarning, match="singular covariance"):
        moments(torch.randn(3, 3))
    with pytest.raises(UsageError, match="splits must be between"):
        inception_score(torch.full((3, 2), 0.5))
    with pytest.raises(UsageError, match="must be finite, at least 0"):
        inception_score(torch.randn(10, 3), splits=1)


@pytest.mark.parametrize("number", [2, 100, 150])
def test_exactly_the_number_of_images_is_made(number):
    model = Generator("G*", channels=2, bottom=1, latent=6, image_channels=1).eval()
    images = generate(model, number, 6, seed=3)
    assert images.shape == (number, 1, 8, 8)
    assert torch.equal(images, generate(model, number, 6, seed=3))


def test_bytes_are_cut_off_behind_the_point():
    x = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.9999, 1.0, 2.0])
    assert to_bytes(x).tolist() == [0, 0, 0, 127, 254, 255, 255]


def test_images_that_are_not_finite_are_not_scored():
    with pytest.raises(NotFinite):
        generate(lambda z: torch.full((len(z), 1, 8, 8), math.nan), 10, 6, seed=0)


def test_recalibration_takes_the_statistics_of_this_generator_alone():
    model = Generator("G*", channels=4, bottom=1, latent=6)
    model.bn.running_mean.fill_(100.0)
    recalibrate_(model, 6, seed=0)
    assert not model.training
    assert model.bn.running_mean.abs().max() < 10
    assert model.bn.momentum == 0.1
    seen = []
    hook = model.bn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    torch.manual_seed(5)
    model(torch.randn(2000, 6))
    hook.remove()
    assert torch.allclose(model.bn.running_mean, seen[0].mean((0, 2, 3)), atol=0.1)


def test_inception_needs_its_file_and_its_package(tmp_path):
    with pytest.raises(UsageError, match="is not a file"):
        Inception(tmp_path / "weights.pth")
    (tmp_path / "weights.pth").write_bytes(b"")
    try:
        import torch_fidelity  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtra, match="torch_fidelity is needed for Inception features"):
            Inception(tmp_path / "weights.pth")


def test_the_stand_in_is_a_module_that_is_frozen(judged):
    _, reference = judged
    assert isinstance(reference.network, nn.Module)
    assert not any(parameter.requires_grad for parameter in reference.network.parameters())
