import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")
from weightsmith.continual import AligningOptions, WeightAligning  # noqa: E402
from weightsmith.core.errors import UsageError  # noqa: E402
from weightsmith.integrations.new_classes import WeightAligningTrainer  # noqa: E402
from weightsmith.integrations.pruning import PruningCallback  # noqa: E402
from weightsmith.optim import AdamP  # noqa: E402
from weightsmith.prune import MagnitudePruner  # noqa: E402


def model(labels=2):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20,
        num_labels=labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def rows(labels, count=16):
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(0, 20, (5,), generator=generator), "labels": labels[i % len(labels)]}
        for i in range(count)
    ]


def arguments(folder, **more):
    options = {"per_device_train_batch_size": 4, "max_steps": 4, "report_to": [], "learning_rate": 1e-2,
               "disable_tqdm": True, "use_cpu": True, "save_steps": 2, **more}  # fmt: skip
    return transformers.TrainingArguments(output_dir=str(folder), **options)


@pytest.mark.parametrize("optimizer", [None, AdamP])
def test_pruned_weights_stay_at_zero_and_masks_come_back_on_resuming(tmp_path, optimizer):
    network = model()
    pruner = MagnitudePruner(network)
    pruner.prune_(0.5)
    optimizers = (optimizer(network.parameters(), lr=1e-2), None) if optimizer else (None, None)
    transformers.Trainer(network, arguments(tmp_path), train_dataset=rows([0, 1]), optimizers=optimizers,
                         callbacks=[PruningCallback(pruner)]).train()  # fmt: skip
    for name, mask in pruner.masks.items():
        weight = network.get_parameter(name)
        assert not weight[~mask].any()
        assert weight[mask].any()
    if optimizer is None:
        other = model()
        fresh = MagnitudePruner(other)
        transformers.Trainer(other, arguments(tmp_path, max_steps=6), train_dataset=rows([0, 1]),
                             callbacks=[PruningCallback(fresh)]).train(resume_from_checkpoint=True)  # fmt: skip
        assert all(torch.equal(fresh.masks[name], mask) for name, mask in pruner.masks.items())


def test_an_incremental_step_under_trainer_is_that_of_ones_own_loop(tmp_path):
    runs = []
    for trained in (True, False):
        wa = WeightAligning(model(), "classifier", AligningOptions(restrict=False))
        wa.begin_step(2)
        torch.manual_seed(3)
        wa.begin_step(1)
        data = rows([0, 1, 2], 12)
        if trained:
            options = arguments(tmp_path, max_steps=3, lr_scheduler_type="constant", max_grad_norm=0.0, optim="sgd")
            WeightAligningTrainer(wa, options, train_dataset=data[:4]).train()
        else:
            optimizer = torch.optim.SGD(wa.model.parameters(), lr=1e-2)
            batch = {"input_ids": torch.stack([row["input_ids"] for row in data[:4]])}
            labels = torch.tensor([row["labels"] for row in data[:4]])
            for _ in range(3):
                optimizer.zero_grad()
                wa.loss(batch, labels).backward()
                optimizer.step()
        assert wa.end_step().gamma <= 1
        runs.append(wa.model.state_dict())
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-4, atol=1e-6)


def test_a_trainer_before_any_step_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no step has begun"):
        WeightAligningTrainer(WeightAligning(model(), "classifier"), arguments(tmp_path))


def test_an_incremental_step_that_was_killed_goes_on_from_its_checkpoint(tmp_path):
    def begun():
        return WeightAligning(model(), "classifier", AligningOptions(restrict=True, bias=False))

    def train(wa, folder, resume=None, **more):
        args = arguments(folder, max_steps=4, **more)
        WeightAligningTrainer(wa, args, train_dataset=rows([0, 1, 2], 12)).train(resume_from_checkpoint=resume)
        return wa.model.state_dict()

    whole = begun()
    whole.begin_step(2)
    whole.begin_step(1)
    state = copy.deepcopy(whole.state_dict())
    expected = train(whole, tmp_path)
    again = begun()  # another process
    again.load_state_dict(state)
    found = train(again, tmp_path / "more", str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert torch.equal(again.teacher.classifier.weight, whole.teacher.classifier.weight)
