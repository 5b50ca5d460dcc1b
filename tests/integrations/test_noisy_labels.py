import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from weightsmith.core.errors import UsageError
from weightsmith.reweight import LossRescaler, RescalingSettings

transformers = pytest.importorskip("transformers")
from weightsmith.integrations.noisy_labels import MetaRescalingTrainer  # noqa: E402

SHAPE = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 2}
ROWS = 96


def model():
    torch.manual_seed(0)
    config = transformers.BertConfig(**SHAPE, intermediate_size=32, max_position_embeddings=16)
    return transformers.BertForSequenceClassification(config)


def rows(wrong=0.3, count=ROWS):
    """Texts whose class is the half of the vocabulary that they use; some labels are wrong."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(count) % 2
    ids = torch.randint(1, 15, (count, 6), generator=generator) + 14 * y[:, None]
    flipped = torch.rand(count, generator=generator) < wrong
    found = [
        {"input_ids": row.tolist(), "attention_mask": [1] * 6, "labels": int(label), "unused": "text"}
        for row, label in zip(ids, torch.where(flipped, 1 - y, y), strict=True)
    ]
    return found, flipped


def trainer(folder, data=None, *, rescaling=None, rescaler=None, callbacks=None, **options):
    defaults = {
        "per_device_train_batch_size": 16, "learning_rate": 2e-3, "num_train_epochs": 2, "logging_steps": 3,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "seed": 5,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(str(folder), **(defaults | options))
    return MetaRescalingTrainer(
        model(), arguments, train_dataset=rows()[0] if data is None else data, rescaling=rescaling, rescaler=rescaler,
        callbacks=callbacks,
    )  # fmt: skip


def weights_of(run):
    return [p.detach().clone() for p in [*run.model.parameters(), *run.meta.rescaler.parameters()]]


def equal(left, right):
    return all(torch.equal(*pair) for pair in zip(left, right, strict=True))


def test_it_trains_logs_and_finds_the_wrong_labels(tmp_path):
    data, flipped = rows(count=320)
    run = trainer(
        tmp_path,
        data,
        rescaling=RescalingSettings(passes=2, meta_grad="head"),
        num_train_epochs=15,
        rescaler=LossRescaler(2, class_separation=False),
    )
    run.train()
    logged = [row["mean_weight"] for row in run.state.log_history if "loss" in row]
    assert logged
    assert all(0 < value < 1 for value in logged)
    table = run.audit()
    assert sorted(table.index) == list(range(320))
    worst = torch.tensor(table.index[:20])
    assert flipped[worst].float().mean() > 0.7
    saved = list(csv.DictReader(table.to_csv(tmp_path / "audit.csv").open()))
    assert {row["given_label"] for row in saved} == {"LABEL_0", "LABEL_1"}


@pytest.mark.parametrize("meta_grad", ["finite_difference", "none"])
def test_evaluation_and_prediction_are_trainers_own(tmp_path, meta_grad):
    run = trainer(tmp_path, rescaling=RescalingSettings(passes=1, meta_grad=meta_grad), max_steps=2)
    run.train()
    metrics = run.evaluate(eval_dataset=rows(0.0)[0])
    assert metrics["eval_loss"] > 0
    assert run.predict(rows(0.0)[0]).predictions.shape == (ROWS, 2)


class Stop(transformers.TrainerCallback):
    """Ends a run after a step, as a kill would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step >= self.step


@pytest.mark.parametrize("stop", [4, 6])
def test_a_run_resumes_from_its_checkpoint_to_the_bit(tmp_path, stop):
    options = {"save_strategy": "steps", "save_steps": 2, "rescaling": RescalingSettings(passes=2, meta_every=2)}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    cut = trainer(tmp_path / "cut", callbacks=[Stop(stop)], **options)
    cut.train()
    assert cut.state.global_step == stop
    resumed = trainer(tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 12
    assert equal(weights_of(whole), weights_of(resumed))
    assert whole.meta.weights_by_id == resumed.meta.weights_by_id
    assert whole.audit().epoch == resumed.audit().epoch


def test_accumulated_batches_make_one_step_of_the_rescaler(tmp_path):
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 3}
    run = trainer(tmp_path, rescaling=RescalingSettings(passes=1), **options)
    run.train()
    assert run.meta._steps == 3
    assert len(run.meta.weights_by_id) == 48


def test_bfloat16_keeps_weights_in_full_precision_and_trains(tmp_path):
    run = trainer(tmp_path, rescaling=RescalingSettings(passes=2), bf16=True, max_steps=3)
    before = [p.detach().clone() for p in run.model.parameters()]
    run.train()
    assert not equal(before, list(run.model.parameters()))
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in run.model.parameters())


def test_hugging_face_datasets_and_own_collators_work(tmp_path):
    datasets = pytest.importorskip("datasets")
    run = trainer(tmp_path, datasets.Dataset.from_list(rows()[0]), max_steps=2)

    def collate(items):
        assert all(set(item) == {"input_ids", "attention_mask", "labels"} for item in items)
        return {name: torch.tensor([item[name] for item in items]) for name in items[0]}

    run.data_collator.collate = collate
    run.train()
    assert len(run.meta.weights_by_id) == 32


def test_adapters_of_peft_train_and_frozen_weights_stay(tmp_path):
    peft = pytest.importorskip("peft")
    run = trainer(tmp_path, rescaling=RescalingSettings(passes=1, meta_grad="head"), max_steps=2)
    adapted = peft.get_peft_model(model(), peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query"]))
    frozen = {name: p.clone() for name, p in adapted.named_parameters() if not p.requires_grad}
    run = MetaRescalingTrainer(adapted, run.args, train_dataset=rows()[0], rescaling=RescalingSettings(passes=1))
    run.train()
    after = dict(adapted.named_parameters())
    assert frozen
    assert all(torch.equal(value, after[name]) for name, value in frozen.items())


def test_what_it_cannot_do_is_refused(tmp_path):
    with pytest.raises(UsageError, match="give loss_fn instead"):
        trainer(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(UsageError, match="in a loop of your own"):
        trainer(tmp_path, rescaling=RescalingSettings(mode="official", meta_grad="none"))
    with pytest.raises(UsageError, match="call train"):
        trainer(tmp_path).audit()
    wrong = trainer(tmp_path, rescaler=LossRescaler(5))
    with pytest.raises(UsageError, match="num_classes is 5, but the logits have 2"):
        wrong.train()


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(rows()[0])


def test_a_stream_has_no_numbers_and_validates_on_the_batch_before(tmp_path):
    run = trainer(tmp_path, Stream(), max_steps=4, save_strategy="steps", save_steps=2)
    run.train()
    assert run.meta.val_sampler is None
    assert run.meta.steps == 4
    with pytest.raises(UsageError, match="give ids"):
        run.audit()
    again = trainer(tmp_path, Stream(), max_steps=6, save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.meta.steps == 6


@pytest.mark.slow
def test_two_processes_train_to_the_same_weights(tmp_path):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch, torch.distributed as dist\n"
        "from test_noisy_labels import trainer, RescalingSettings\n"
        "run = trainer('out', rescaling=RescalingSettings(passes=2), max_steps=3)\n"
        "run.train()\n"
        "for p in [*run.model.parameters(), *run.meta.rescaler.parameters()]:\n"
        "    both = [torch.zeros_like(p) for _ in range(2)]\n"
        "    dist.all_gather(both, p.detach().contiguous())\n"
        "    assert torch.equal(*both)\n"
        "print(f'seen {len(run.meta.weights_by_id)}\\n', end='')\n"
    )
    (tmp_path / "script.py").write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
    done = subprocess.run(
        [*launch, str(Path(__file__).parent)], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("seen 48") == 2


def test_a_new_model_of_model_init_gets_a_new_rescaler(tmp_path):
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=16, max_steps=1, report_to=[], use_cpu=True, save_strategy="no"
    )
    run = MetaRescalingTrainer(
        None, arguments, model_init=model, train_dataset=rows()[0], rescaler=LossRescaler(2),
        rescaling=RescalingSettings(passes=1),
    )  # fmt: skip
    ends = []
    for _ in range(2):
        run.train()
        assert run.meta.module is run.model
        ends.append(weights_of(run))
    assert run.meta.steps == 1
    assert equal(*ends)


def test_batches_without_labels_have_no_mean_weight(tmp_path):
    data = rows(count=32)[0]
    for row in data[:28]:
        row["labels"] = -100
    run = trainer(tmp_path, data, per_device_train_batch_size=4, num_train_epochs=1, logging_steps=1)
    run.train()
    found = [row["mean_weight"] for row in run.state.log_history if "mean_weight" in row]
    assert found == pytest.approx(found)  # not NaN
    assert 0 < len(found) < 8
