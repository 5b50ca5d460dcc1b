import copy
import warnings
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
    expand_head_,
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


def test_a_decoder_gives_the_features_of_the_token_that_it_reads():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_labels=2, pad_token_id=0,
    )  # fmt: skip
    wa = WeightAligning(transformers.LlamaForSequenceClassification(config), "score")
    wa.begin_step(2)
    ids = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    features = wa.features(batch)
    assert features.shape == (2, 16)
    torch.testing.assert_close(wa.head(features), wa.model.eval()(**batch).logits)


def test_a_head_whose_logits_are_averaged_over_tokens_needs_the_callers_features():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(x).mean(1)

    wa = WeightAligning(Mean(), "fc")
    wa.begin_step(2)
    with pytest.raises(UsageError, match="logits of no single token: compute features"):
        wa.features(torch.randn(3, 5, 4))


def test_what_the_end_of_a_step_refuses_changes_nothing():
    wa = WeightAligning(network(), "3", memory=ExemplarMemory(12))
    train_step(wa, [0, 1], epochs=1)
    wa.begin_step(2)
    x, y = data([2, 3])
    before = copy.deepcopy(wa.model.state_dict())
    for labels, features, error, message in [
        (y + 5, None, UsageError, "label 7 is none of this step's head indices, 2 to 3"),  # labels of the data
        (y - 2, None, UsageError, "label 0 is none of this step's head indices"),  # a class that comes again
        (y.float(), None, TypeError, "labels must be integers"),
        (y, torch.randn(3, 16), UsageError, "herding needs features of all 80 examples, got 3"),
    ]:
        with pytest.raises(error, match=message):
            wa.end_step(x, labels, features=features)
    assert wa.history == []
    assert list(wa.memory.counts) == [0, 1]
    assert all(torch.equal(wa.model.state_dict()[name], value) for name, value in before.items())


def test_a_new_class_without_examples_gets_a_warning():
    wa = WeightAligning(network(), "3", memory=ExemplarMemory(12))
    wa.begin_step(3)
    with pytest.warns(WeightsmithWarning, match="no example of new class 1"):
        wa.end_step(*data([0, 2]))


def test_a_memory_that_will_be_too_small_is_refused_before_the_step():
    wa = WeightAligning(network(), "3", memory=ExemplarMemory(3))
    train_step(wa, [0, 1], epochs=1)
    with pytest.raises(UsageError, match="at least the 4 classes seen, got 3"):
        wa.begin_step(2)
    assert (wa.step, wa.n_classes) == (0, 2)


def test_the_authors_settings_resume_in_the_first_step():
    first, again = (WeightAligning(network(), "3", "official") for _ in range(2))
    first.begin_step(2)
    again.load_state_dict(first.state_dict())
    again.model.load_state_dict(first.model.state_dict())


def test_a_head_under_two_names_is_replaced_under_both():
    model = nn.ModuleDict({"fc": nn.Linear(4, 2)})
    model["classifier"] = model["fc"]
    WeightAligning(model, "fc").begin_step(3)
    assert model["classifier"] is model["fc"]
    assert model["fc"].out_features == 3


def test_without_distillation_no_teacher_is_kept():
    wa = WeightAligning(network(), "3", AligningOptions(distill=False))
    wa.begin_step(2)
    wa.begin_step(2)
    assert wa.teacher is None


def test_a_wrapped_model_is_called_by_the_caller():
    with pytest.raises(UsageError, match="model must be what is inside of DataParallel"):
        WeightAligning(nn.DataParallel(network()), "module.3")
    wa = WeightAligning(network(), "3")
    wa.begin_step(2)
    wa.begin_step(1)
    x, y = data([0, 1])
    wrapped = nn.DataParallel(wa.model, device_ids=[])
    assert torch.equal(
        wa.loss(x, y, logits=2 * wrapped(x)), incremental_loss(2 * wa.model(x), y, wa.teacher_logits(x), 2)
    )


def test_an_adapter_with_one_class_at_first_learns_more():
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    adapter = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    model = peft.get_peft_model(transformers.BertForSequenceClassification(config), adapter).eval()
    wa = WeightAligning(model, "base_model.model.classifier.modules_to_save.default")
    wa.begin_step(1)
    ids, labels = torch.randint(32, (4, 5)), torch.tensor([0, 1, 2, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(input_ids=ids, labels=labels.float())  # with one label transformers takes it for a regression
    wa.begin_step(2)
    found = model(input_ids=ids, labels=labels)
    torch.testing.assert_close(found.loss, F.cross_entropy(found.logits, labels))
    assert model.base_model.model.num_labels == model.config.num_labels == 3


@pytest.mark.parametrize("options", [{}, {"scale_bias": False}, {"apply": "logits"}])
def test_what_aligning_changed_is_measured_and_drawn(options, tmp_path):
    wa = WeightAligning(network(), "3", AligningOptions(**options), memory=ExemplarMemory(12))
    train_step(wa, [0, 1])
    with pytest.raises(UsageError, match="from the second step on"):
        wa.measure(torch.zeros(1, 2), torch.tensor([0]))
    with pytest.raises(UsageError, match="nothing has been aligned"):
        wa.plot(tmp_path / "a.svg")
    train_step(wa, [2, 3], end=False)
    (x, y), (test, labels) = data([2, 3]), data([0, 1, 2, 3], seed=9)
    unaligned = wa.model.eval()(test).argmax(1)
    wa.end_step(x, y)
    logits = wa.model.eval()(test)
    found = wa.measure(logits, labels)
    aligned = wa.aligned(logits).argmax(1)
    expected = {
        "true_share": 50.0, "accuracy_before": 100 * (unaligned == labels).double().mean().item(),
        "accuracy": 100 * (aligned == labels).double().mean().item(),
        "newest_share_before": 100 * (unaligned > 1).double().mean().item(),
        "newest_share": 100 * (aligned > 1).double().mean().item(),
    }  # fmt: skip
    assert found == pytest.approx(expected)
    assert wa.history[-1].items() >= found.items()
    with pytest.raises(UsageError, match=r"logits must be \(N, 4\)"):
        wa.measure(logits[:, :3], labels)
    wa.plot(tmp_path / "a.svg")
    for text in ("true share", "gamma", "mean norm of rows"):
        assert text in (tmp_path / "a.svg").read_text()
    with pytest.raises(UsageError, match=r"path must end in \.html"):
        wa.plot(tmp_path / "a.pdf")


def test_a_head_may_be_given_by_a_function():
    wa = WeightAligning(network(), lambda model: model[3])
    wa.begin_step(2)
    wa.begin_step(1)
    assert wa.model[3].out_features == 3
    assert expand_head_(network(), 5, lambda model: model[3])[3].out_features == 5
    with pytest.raises(UsageError, match="head must return a module of the model"):
        WeightAligning(network(), lambda _: nn.Linear(2, 2))


def test_the_optimizer_of_accelerate_restricts_the_head():
    accelerate = pytest.importorskip("accelerate")
    wa = WeightAligning(network(), "3", "official")
    wa.begin_step(2)
    wrapped = accelerate.Accelerator(cpu=True).prepare(torch.optim.SGD(wa.model.parameters(), lr=0.5))
    wa.attach(wrapped)
    wa.loss(*data([0, 1])).backward()
    wrapped.step()
    assert wa.head.weight.min() >= 0
