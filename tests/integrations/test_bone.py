"""Bone under a Trainer, end to end: trained, merged, quantized, and loaded by plain transformers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset

from weightsmith.adapt import BoneConfig, apply_bone_, bone_state_dict, load_bone, merge_bone_, unload_bone_
from weightsmith.average import find_checkpoints, merge_checkpoints
from weightsmith.core.errors import UsageError
from weightsmith.tools.merge import merge as merge_command

transformers = pytest.importorskip("transformers")
bone = pytest.importorskip("weightsmith.integrations.bone")
callbacks = pytest.importorskip("weightsmith.integrations.transformers")

FORMS = {
    "miss": BoneConfig(r=8),
    "row": BoneConfig(r=8, variant="row"),
    "col": BoneConfig(r=8, variant="col", modules_to_save=("lm_head",)),
}
IDS = torch.arange(12).view(2, 6)


class Words(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = torch.randint(32, (6,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def train(folder, config, *callbacks):
    transformers.set_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(shape)
    model.save_pretrained(folder / "base")
    args = transformers.TrainingArguments(
        output_dir=folder / "run", max_steps=8, save_steps=2, per_device_train_batch_size=4, learning_rate=0.02,
        logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    apply_bone_(model, config)
    transformers.Trainer(model, args, train_dataset=Words(), callbacks=list(callbacks)).train()
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def plain(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(params=FORMS)
def trained(request, tmp_path):
    return train(tmp_path, FORMS[request.param], bone.BoneCheckpointCallback()), tmp_path


def test_a_trained_adapter_survives_merge_and_quantize(trained):
    model, folder = trained
    merge_command((folder / "run",), out=folder / "merged", last=3, by="steps", lora_mode="dense")
    states = []
    for checkpoint in find_checkpoints(folder / "run", last=3):
        adapted = load_bone(plain(folder / "base"), checkpoint.path)
        states.append(unload_bone_(adapted, merge=True).state_dict())
    merged = plain(folder / "merged")
    for name, tensor in merged.state_dict().items():
        expected = sum(step / 18 * state[name] for step, state in zip((4, 6, 8), states, strict=True))
        torch.testing.assert_close(tensor, expected)
    gap = (logits(plain(folder / "base")) - logits(model)).norm()
    assert (logits(merged) - logits(model)).norm() < 0.7 * gap
    # the last one alone is the trained model itself, and stays it on eight bits
    merge_command((folder / "run/checkpoint-8",), out=folder / "last", lora_mode="dense", base=folder / "base")
    torch.testing.assert_close(logits(plain(folder / "last")), logits(model), rtol=1e-4, atol=1e-4)
    from weightsmith.tools.quantize import quantize

    quantize(folder / "last", out=folder / "quantized", method="rtn", bits=8)
    assert (logits(plain(folder / "quantized")) - logits(model)).norm() < 0.1 * gap


def test_adapters_are_averaged_into_an_adapter(trained):
    _, folder = trained
    report = merge_checkpoints(folder / "run", folder / "merged", scheme="uniform")
    assert len(report.shares) == 4
    adapted = load_bone(plain(folder / "base"), folder / "merged")
    states = [load_file(folder / f"run/checkpoint-{step}/bone.safetensors") for step in (2, 4, 6, 8)]
    for name, tensor in load_file(folder / "merged/bone.safetensors").items():
        torch.testing.assert_close(tensor, sum(state[name] for state in states) / 4)
    assert any(tensor.any() for tensor in bone_state_dict(adapted).values())
    assert not (folder / "merged/config.json").exists()


def test_the_trainer_merges_them_when_it_has_finished(tmp_path):
    callback = callbacks.MergeCheckpointsCallback(last=1, lora_mode="dense")
    model = train(tmp_path, FORMS["row"], bone.BoneCheckpointCallback(), callback)
    torch.testing.assert_close(logits(plain(tmp_path / "run/merged")), logits(model), rtol=1e-4, atol=1e-4)
    assert callback.report.out == tmp_path / "run/merged"


def test_whole_models_with_an_adapter_beside_their_weights_are_refused(tmp_path):
    train(tmp_path, FORMS["row"])
    with pytest.raises(UsageError, match=r"bone\.default and 6 more tensors.*BoneCheckpointCallback"):
        merge_checkpoints(tmp_path / "run", tmp_path / "merged")
    from weightsmith.tools.quantize import quantize

    with pytest.raises(UsageError, match="Bone adapter beside its base model"):
        quantize(tmp_path / "run/checkpoint-8", out=tmp_path / "quantized", method="rtn")
    assert not (tmp_path / "merged").exists()


def test_a_checkpoint_with_an_adapter_is_no_model_to_quantize(tmp_path):
    train(tmp_path, FORMS["row"], bone.BoneCheckpointCallback())
    from weightsmith.tools.quantize import quantize

    merge_checkpoints(tmp_path / "run", tmp_path / "merged")
    for folder in (tmp_path / "run/checkpoint-8", tmp_path / "merged"):
        with pytest.raises(
            UsageError, match=r"put it into its base first, with weightsmith merge .* --lora-mode dense"
        ):
            quantize(folder, out=tmp_path / "quantized", method="rtn")


def test_what_cannot_be_put_into_a_base_is_refused(tmp_path):
    model = train(tmp_path, FORMS["row"], bone.BoneCheckpointCallback())
    run = tmp_path / "run"
    with pytest.raises(UsageError, match="merge_bone_checkpoints"):
        merge_checkpoints(run, tmp_path / "out", lora_mode="dense")
    with pytest.raises(UsageError, match="exists; overwrite=True"):
        bone.merge_bone_checkpoints(run, tmp_path / "base")
    merge_bone_(model).save_pretrained(tmp_path / "twice")
    with pytest.raises(UsageError, match="has adapters in its weights already"):
        bone.merge_bone_checkpoints(run, tmp_path / "out", base=tmp_path / "twice")
    for name in ("config.json", "model.safetensors"):
        (run / "checkpoint-8" / name).unlink()
    with pytest.raises(UsageError, match="give the base model's folder"):
        bone.merge_bone_checkpoints(run, tmp_path / "out")
    config = json.loads((run / "checkpoint-4/bone_config.json").read_text())
    (run / "checkpoint-4/bone_config.json").write_text(json.dumps({**config, "variant": "col"}))
    with pytest.raises(UsageError, match="differ in variant: 'col' and 'row'"):
        merge_checkpoints(run, tmp_path / "out")
    shutil.rmtree(run / "checkpoint-4")
    bone.merge_bone_checkpoints(
        find_checkpoints(run, last=3), tmp_path / "out", base=tmp_path / "base", scheme="uniform"
    )
    assert not (tmp_path / "out/bone_config.json").exists()


def test_values_that_a_smaller_dtype_cannot_hold_are_refused(tmp_path):
    train(tmp_path, FORMS["miss"], bone.BoneCheckpointCallback())
    path = tmp_path / "run/checkpoint-8/bone.safetensors"
    save_file({name: tensor + 1e6 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(UsageError, match=r"does not fit into torch\.float16"):
        bone.merge_bone_checkpoints(
            [path.parent], tmp_path / "out", base=tmp_path / "base", dtype=torch.float16, scheme="uniform"
        )


def test_a_model_without_the_adapter_fails_before_it_trains(tmp_path):
    with pytest.raises(UsageError, match="adapter 'other' is not known"):
        train(tmp_path, FORMS["miss"], bone.BoneCheckpointCallback("other"))
    assert not (tmp_path / "run/checkpoint-2").exists()
