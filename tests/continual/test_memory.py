import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightsmith.continual import ClassOrder, ExemplarMemory, correct_bias, fit_bias_correction, herding
from weightsmith.core.errors import UsageError


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(2, 9), st.integers(1, 35), st.integers(0, 99))
def test_herding_is_the_printed_rule(n, d, m, seed):
    """Every choice brings the mean of the chosen ones as close to the class's mean as any other could."""
    features = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    v = features / (features.norm(dim=1, keepdim=True) + 1e-8)
    chosen = herding(features, m).tolist()
    assert len(set(chosen)) == min(m, n)
    for k, index in enumerate(chosen):
        gaps = (v.mean(0) - (v + v[chosen[:k]].sum(0)) / (k + 1)).norm(dim=1)
        left = [i for i in range(n) if i not in chosen[:k]]
        assert gaps[index] <= gaps[left].min() + 1e-7


def test_herding_takes_every_example_once_also_equal_and_zero_ones():
    features = torch.tensor([[1.0, 0], [1, 0], [0, 0], [0, 0]])
    assert sorted(herding(features, 9).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("features", "m", "message"),
    [
        (torch.ones(3), 1, "features must be"),
        (torch.ones(3, 2, dtype=torch.int64), 1, "features must be"),
        (torch.full((3, 2), torch.nan), 1, "features must be"),
        (torch.ones(3, 2), 0, "m must be"),
    ],
)
def test_herding_refuses(features, m, message):
    with pytest.raises(UsageError, match=message):
        herding(features, m)


def add(memory, labels, count=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.tensor(labels).repeat_interleave(count)
    x = torch.randint(0, 255, (len(y), 3), generator=generator, dtype=torch.uint8)
    memory.add(x, y, torch.randn(len(y), 4, generator=generator))
    return x, y


@pytest.mark.parametrize("selection", ["herding", "random"])
def test_a_total_budget_shortens_earlier_classes_to_their_first_choices(selection):
    memory = ExemplarMemory(12, selection=selection)
    add(memory, [0, 1])
    first, _ = memory.tensors()
    add(memory, [2, 3], seed=1)
    assert memory.counts == {0: 3, 1: 3, 2: 3, 3: 3}
    assert len(memory) == len(memory.dataset()) == 12
    shortened, labels = memory.tensors()
    assert torch.equal(shortened[labels == 0], first[:3])
    assert memory.nbytes == 12 * 3


def test_a_budget_per_class_shortens_nothing_and_small_classes_keep_all():
    memory = ExemplarMemory(per_class=8)
    add(memory, [0], count=5)
    add(memory, [1], count=9)
    assert memory.counts == {0: 5, 1: 8}


def test_a_memory_resumes():
    memory, other = ExemplarMemory(8, selection="random"), ExemplarMemory(8, selection="random", seed=5)
    add(memory, [0, 1])
    other.load_state_dict(memory.state_dict())
    add(memory, [2], seed=2)
    add(other, [2], seed=2)
    assert torch.equal(memory.tensors()[0], other.tensors()[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ExemplarMemory(), "either total= or per_class="),
        (lambda: ExemplarMemory(5, per_class=5), "either total= or per_class="),
        (lambda: ExemplarMemory(0), "total must be"),
        (lambda: ExemplarMemory(5, selection="best"), "selection"),
        (lambda: add(ExemplarMemory(3), [0, 1, 2, 3]), "total must be at least the 4 classes"),
        (lambda: ExemplarMemory(3).tensors(), "empty"),
        (lambda: ExemplarMemory(3).add(torch.ones(3, 1), torch.zeros(2)), "equally many"),
        (lambda: ExemplarMemory(3).add(torch.ones(2, 1), torch.zeros(2)), "herding needs features"),
    ],
)
def test_a_memory_refuses(call, message):
    with pytest.raises(UsageError, match=message):
        call()


def test_a_class_is_stored_once():
    memory = ExemplarMemory(8)
    add(memory, [0])
    with pytest.raises(UsageError, match="class 0 is stored already"):
        add(memory, [0])


def test_classes_arrive_in_order():
    order = ClassOrder([3, 0, 5, 1], [1, 3])
    assert [order.arriving(step) for step in range(order.steps)] == [(3,), (0, 5, 1)]
    assert (order.n_old(1), order.n_seen(1)) == (1, 4)
    labels = torch.tensor([5, 5, 3, 1])
    assert order.to_rows(labels).tolist() == [2, 2, 0, 3]
    assert torch.equal(order.to_labels(order.to_rows(labels)), labels)


def test_published_orders_are_numpys():
    expected = np.arange(100)
    np.random.RandomState(1993).shuffle(expected)
    assert ClassOrder.shuffled(100, 20).order == tuple(expected)
    assert ClassOrder.shuffled(100, 20).order[:3] == (68, 56, 78)  # the order that papers print


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ClassOrder([0, 0], 1), "every label once"),
        (lambda: ClassOrder([0, 1, 2], 2), "sizes must divide"),
        (lambda: ClassOrder([0, 1, 2], [1, 1]), "sizes must add up"),
        (lambda: ClassOrder([0, 2], 1).to_rows(torch.tensor([0, 1])), "label 1 is not in the order"),
        (lambda: ClassOrder([0, 2], 1).to_rows(torch.tensor([7])), "label 7 is not in the order"),
        (lambda: ClassOrder([0, 2], 1).n_old(2), "step must be"),
    ],
)
def test_an_order_refuses(call, message):
    with pytest.raises(UsageError, match=message):
        call()


def test_bias_correction_finds_the_line():
    torch.manual_seed(0)
    true = torch.randn(4000, 6) * 2
    labels = torch.distributions.Categorical(logits=true).sample()
    seen = torch.cat([true[:, :4], (true[:, 4:] - 0.7) / 0.5], dim=1)
    alpha, beta = fit_bias_correction(seen, labels, 4)
    assert alpha == pytest.approx(0.5, abs=0.06)
    assert beta == pytest.approx(0.7, abs=0.15)
    torch.testing.assert_close(correct_bias(seen, 4, 0.5, 0.7), true)
    with pytest.raises(UsageError, match="n_old"):
        fit_bias_correction(seen, labels, 6)


def test_labels_that_would_be_rounded_are_refused():
    with pytest.raises(TypeError, match=r"labels must be integers, got torch\.float32"):
        ClassOrder([3, 1], 1).to_rows(torch.tensor([3.7, 1.0]))
    memory = ExemplarMemory(4)
    with pytest.raises(TypeError, match="labels must be integers"):
        memory.add(torch.arange(2), torch.tensor([0.5, 1.0]), torch.randn(2, 3))
    with pytest.raises(TypeError, match="inputs must be a tensor, got list: store indices"):
        memory.add(["a", "b"], torch.tensor([0, 1]), torch.randn(2, 3))
    assert not len(memory)
