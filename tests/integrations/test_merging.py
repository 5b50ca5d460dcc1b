"""A real Trainer run, merged at its end and by hand."""

import pytest
import torch
from torch.utils.data import Dataset

from weightsmith.average import find_checkpoints, merge_checkpoints
from weightsmith.core.checkpoint import Checkpoint
from weightsmith.core.errors import WeightsmithWarning

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
callbacks = pytest.importorskip("weightsmith.integrations.transformers")


class Words(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = torch.randint(32, (6,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def train(folder, callback, *, adapter=False, **options):
    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    if adapter:
        model.save_pretrained(folder / "base")
        target = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder / "base"), target)
    args = transformers.TrainingArguments(
        output_dir=folder / "run",
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"save_steps": 2, **options},
    )
    transformers.Trainer(model, args, train_dataset=Words(), callbacks=[callback]).train()


def test_a_finished_run_leaves_a_merged_model(tmp_path):
    callback = callbacks.MergeCheckpointsCallback(last=3, metric="steps")
    train(tmp_path, callback)
    assert [share.checkpoint.step for share in callback.report.shares] == [4, 6, 8]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")
    states = [Checkpoint(tmp_path / "run" / f"checkpoint-{step}") for step in (4, 6, 8)]
    for name, tensor in Checkpoint(tmp_path / "run" / "merged").items():
        expected = sum(step / 18 * state[name] for step, state in zip((4, 6, 8), states, strict=True))
        torch.testing.assert_close(tensor, expected)
        torch.testing.assert_close(model.state_dict()[name], tensor)


def test_an_adapter_run_is_merged_by_its_own_log(tmp_path):
    train(tmp_path, callbacks.MergeCheckpointsCallback(last=4, lora_mode="cat"), adapter=True)
    by_hand = merge_checkpoints(find_checkpoints(tmp_path / "run"), tmp_path / "by-hand", lora_mode="cat")
    assert len({share.value for share in by_hand.shares}) == 4
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peft.PeftModel.from_pretrained(base, tmp_path / "run" / "merged")
    merged, expected = (Checkpoint(path) for path in (tmp_path / "run" / "merged", tmp_path / "by-hand"))
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())


def test_a_run_without_checkpoints_brings_a_warning_and_keeps_the_model(tmp_path):
    callback = callbacks.MergeCheckpointsCallback()
    with pytest.warns(WeightsmithWarning, match="the checkpoints were not merged: .* holds no checkpoint"):
        train(tmp_path, callback, save_strategy="no")
    assert callback.report is None
