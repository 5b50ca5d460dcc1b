import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from weightsmith.continual import (
    AligningOptions,
    ExemplarMemory,
    WeightAligning,
    align_weights_,
    distillation_loss,
    incremental_loss,
)
from weightsmith.core.errors import UsageError, WeightsmithWarning

CENTERS = torch.randn(6, 8, generator=torch.Generator().manual_seed(3)) * 2


def data(labels, count=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.tensor(labels).repeat_interleave(count)
    return CENTERS[y] + torch.randn(len(y), 8, generator=generator), y


def network(*, norm=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), *([nn.BatchNorm1d(16)] if norm else []), nn.ReLU(), nn.Linear(16, 2))


def train_step(wa, labels, *, epochs=15, seed=0, begin=True, end=True):
    if begin:
        wa.begin_step(len(labels))
    x, y = data(labels)
    old = wa.memory.tensors() if wa.memory is not None and len(wa.memory) else (x[:0], y[:0])
    all_x, all_y = torch.cat([x, old[0]]), torch.cat([y, old[1]])
    optimizer = torch.optim.SGD(wa.model.parameters(), lr=0.05, momentum=0.9)
    wa.attach(optimizer)
    generator = torch.Generator().manual_seed(seed)
    wa.model.train()
    for _ in range(epochs):
        for part in torch.randperm(len(all_x), generator=generator).split(32):
            if len(part) == 1:
                continue  # batch normalization needs two
            optimizer.zero_grad()
            wa.loss(all_x[part], all_y[part]).backward()
            optimizer.step()
    return wa.end_step(x, y) if end else None


def old_accuracy(wa, classes):
    x, y = data(classes, seed=9)
    with torch.no_grad():
        return (wa.aligned(wa.model.eval()(x)).argmax(1) == y).float().mean().item()


def test_aligning_helps_old_classes_and_new_rows_were_longer():
    options = AligningOptions(distill=False)
    wa = WeightAligning(network(norm=False), "2", options, memory=ExemplarMemory(12))
    plain = WeightAligning(network(norm=False), "2", replace(options, align=False), memory=ExemplarMemory(12))
    for labels in ([0, 1], [2, 3], [4, 5]):
        done = train_step(wa, labels)
        assert train_step(plain, labels) is None
    assert done.gamma < 1
    assert [row["step"] for row in wa.history] == [1, 2]
    assert plain.history == []
    assert old_accuracy(wa, [0, 1, 2, 3]) > old_accuracy(plain, [0, 1, 2, 3]) + 0.05


def test_the_teacher_is_the_aligned_model_frozen():
    wa = WeightAligning(network(), "3", memory=ExemplarMemory(12))
    train_step(wa, [0, 1])
    train_step(wa, [2, 3])
    expected = copy.deepcopy(wa.model).eval()
    wa.begin_step(2)
    x, _ = data([0, 4])
    assert torch.equal(wa.teacher_logits(x), expected(x))
    assert wa.head.out_features == 6
    assert not any(parameter.requires_grad for parameter in wa.teacher.parameters())
    wa.model.train()
    assert not wa.teacher.training


def test_scaled_logits_give_the_folded_run():
    runs = []
    for apply in ("fold", "logits"):
        wa = WeightAligning(network(), "3", AligningOptions(apply=apply), memory=ExemplarMemory(12))
        for labels in ([0, 1], [2, 3], [4, 5]):
            train_step(wa, labels, epochs=3)
        x, _ = data([0, 1, 2, 3, 4, 5])
        runs.append(wa.aligned(wa.model.eval()(x)))
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-4)


def test_a_run_resumes_in_the_middle_of_a_step():
    def start():
        return WeightAligning(network(), "3", memory=ExemplarMemory(12))

    whole = start()
    train_step(whole, [0, 1], epochs=2)
    train_step(whole, [2, 3], epochs=2)
    whole.begin_step(2)
    state, weights = copy.deepcopy(whole.state_dict()), copy.deepcopy(whole.model.state_dict())
    train_step(whole, [4, 5], epochs=2, begin=False)
    resumed = start()
    resumed.load_state_dict(state)
    resumed.model.load_state_dict(weights)
    train_step(resumed, [4, 5], epochs=2, begin=False)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value), key
    assert resumed.history == whole.history
    assert torch.equal(resumed.memory.tensors()[0], whole.memory.tensors()[0])


def test_the_loss_is_cross_entropy_alone_at_first_and_mixed_by_old_classes_later():
    wa = WeightAligning(network(), "3")
    wa.begin_step(2)
    x, y = data([0, 1])
    torch.testing.assert_close(wa.loss(x, y), F.cross_entropy(wa.model(x), y))
    wa.begin_step(1)
    logits, teacher = wa.model(x), wa.teacher_logits(x)
    expected = F.cross_entropy(logits, y) / 3 + 2 / 3 * distillation_loss(logits, teacher, 2)
    torch.testing.assert_close(wa.loss(x, y), expected)
    torch.testing.assert_close(wa.loss(x, y, teacher_logits=teacher), expected)


def test_the_authors_settings_keep_the_head_positive_and_without_bias():
    wa = WeightAligning(network(), "3", "official", memory=ExemplarMemory(12))
    for labels in ([0, 1], [2, 3]):
        train_step(wa, labels, epochs=2)
        assert wa.head.bias is None
        assert wa.head.weight.min() >= 0


def test_the_first_head_may_have_other_rows():
    model = network()
    wa = WeightAligning(model, "3")
    wa.begin_step(4)
    assert model[3].out_features == 4
    wa.begin_step(1)
    assert model[3].out_features == 5


class Strange(nn.Module):
    """Keyword inputs, logits in a dictionary, a convolution as head."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, pixels):
        return {"logits": self.head(self.body(pixels).relu().mean((2, 3), keepdim=True)).flatten(1)}


def test_a_model_with_keyword_inputs_and_a_convolution_as_head():
    wa = WeightAligning(Strange(), "head")
    wa.begin_step(2)
    x = {"pixels": torch.randn(3, 1, 5, 5)}
    wa.loss(x, torch.tensor([0, 1, 1])).backward()
    wa.begin_step(2)
    wa.loss(x, torch.tensor([0, 3, 1])).backward()
    assert wa.features(x).shape == (3, 4)
    assert wa.end_step().n_old == 2


def test_negative_features_with_a_restricted_head_get_a_warning():
    wa = WeightAligning(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), "1", AligningOptions(restrict=True))
    wa.begin_step(2)
    with pytest.warns(WeightsmithWarning, match="negative entries"):
        wa.loss(*data([0, 1]))


def test_an_optimizer_made_too_early_is_refused():
    wa = WeightAligning(network(), "3")
    wa.begin_step(2)
    optimizer = torch.optim.SGD(wa.model.parameters(), lr=0.1)
    wa.begin_step(1)
    with pytest.raises(UsageError, match="make a new optimizer"):
        wa.attach(optimizer)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda wa: wa.loss(*data([0])), "no step has begun"),
        (lambda wa: wa.end_step(), "no step has begun"),
        (lambda wa: wa.begin_step(0), "n_new must be"),
        (lambda wa: (wa.begin_step(2), wa.loss(*data([4]))), "label 4 is none of the head's 2 classes"),
        (lambda wa: (wa.begin_step(2), wa.end_step()), "end_step needs inputs"),
        (lambda wa: AligningOptions(apply="logits", head_init="grow"), "apply must be 'fold'"),
        (lambda wa: AligningOptions(apply="logits", scale_bias=False), "scale_bias must be True"),
        (lambda wa: AligningOptions(head_init="copy"), "head_init"),
        (lambda wa: AligningOptions(temperature=0), "temperature"),
        (lambda wa: WeightAligning(network(), "fc"), "head 'fc' is not known"),
        (lambda wa: WeightAligning(network(), "3", "official "), "options"),
        (lambda wa: WeightAligning(network(), "3").load_state_dict(wa.state_dict()), "memory must be given"),
    ],
)
def test_bad_use(call, message):
    with pytest.raises(UsageError, match=message):
        call(WeightAligning(network(), "3", memory=ExemplarMemory(12)))


@pytest.mark.parametrize(
    ("shapes", "n_old", "message"),
    [(((3, 4), (3, 3)), 2, "teacher_logits must be"), (((3, 4), (3, 2)), 5, "n_old must be between")],
)
def test_distillation_refuses(shapes, n_old, message):
    with pytest.raises(UsageError, match=message):
        distillation_loss(*map(torch.zeros, shapes), n_old)


def test_single_classes():
    loss = incremental_loss(torch.randn(2, 2), torch.tensor([0, 1]), torch.randn(2, 1), 1)
    assert loss.isfinite()
    assert align_weights_(nn.Linear(3, 2), 1).n_old == 1
