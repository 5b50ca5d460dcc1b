"""What PEFT and transformers write is read here, and what is written here they load unchanged."""

import json

import pytest
import torch
from torch import nn

from weightsmith.average import merge_checkpoints
from weightsmith.core.errors import UsageError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = torch.randint(32, (2, 5), generator=torch.Generator().manual_seed(0))
quiet = pytest.mark.filterwarnings("ignore:averaging factors loses", "ignore:.*adapters are not linear")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        attention_bias=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def adapters(base, folder, config, count=3):
    """Adapter folders that PEFT writes, and the average of the models that PEFT makes of them."""
    torch.manual_seed(1)
    average = None
    for i in range(count):
        model = peft.get_peft_model(load(base), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder / f"checkpoint-{i + 1}")
        merged = model.merge_and_unload().state_dict()
        share = {name: tensor / count for name, tensor in merged.items()}
        average = share if average is None else {name: average[name] + share[name] for name in share}
    expected = load(base)
    expected.load_state_dict(average)
    return [folder / f"checkpoint-{i + 1}" for i in range(count)], expected(IDS).logits


def lora(**options):
    return peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options)


EXACT = {
    "plain": lora(),
    "rslora": lora(use_rslora=True),
    "patterns": lora(rank_pattern={"q_proj": 3}, alpha_pattern={"layers.1.self_attn.q_proj": 5}),
    "whole module": lora(modules_to_save=["lm_head"]),
    "bias": lora(bias="lora_only"),
    "bias of its own": peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], lora_bias=True),
    "embedding": peft.LoraConfig(r=2, lora_alpha=6, target_modules=["embed_tokens", "v_proj"]),
}


def exact_pairs():
    """A third unmarked: every adapter in one mode, every mode with two adapters or three."""
    for i, name in enumerate(EXACT):
        for j, mode in enumerate(("cat", "svd", "dense")):
            yield pytest.param(name, mode, marks=[pytest.mark.slow] if (i + j) % 3 else [])


@pytest.mark.parametrize(("name", "mode"), list(exact_pairs()))
def test_the_exact_modes_give_the_average_of_the_merged_models(base, tmp_path, name, mode):
    checkpoints, expected = adapters(base, tmp_path / "run", EXACT[name])
    rank = 9 if mode == "svd" else None  # all that three adapters can have
    merge_checkpoints(checkpoints, tmp_path / "out", scheme="uniform", lora_mode=mode, rank=rank, base=base)
    if mode == "dense":
        model = load(tmp_path / "out")
    else:
        model = peft.PeftModel.from_pretrained(load(base), tmp_path / "out").eval()
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)


@quiet
@pytest.mark.parametrize("name", EXACT)
def test_one_adapter_merges_to_the_same_function_in_every_mode(base, tmp_path, name):
    checkpoints, expected = adapters(base, tmp_path / "run", EXACT[name], count=1)
    for mode in ("factors", "svd", "cat"):
        merge_checkpoints(checkpoints, tmp_path / mode, scheme="uniform", lora_mode=mode)
        model = peft.PeftModel.from_pretrained(load(base), tmp_path / mode).eval()
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)


@quiet
def test_identical_adapters_keep_their_size_where_pefts_linear_multiplies_it(base, tmp_path):
    (checkpoint,), expected = adapters(base, tmp_path / "run", lora(), count=1)
    for i in range(2, 5):
        (tmp_path / "run" / f"checkpoint-{i}").symlink_to(checkpoint)
    same = [tmp_path / "run" / f"checkpoint-{i}" for i in range(1, 5)]
    for mode in ("factors", "svd", "cat"):
        merge_checkpoints(same, tmp_path / mode, scheme="uniform", lora_mode=mode)
        model = peft.PeftModel.from_pretrained(load(base), tmp_path / mode).eval()
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)


@quiet
@pytest.mark.parametrize(
    "config",
    [
        lora(use_dora=True),
        peft.LoHaConfig(r=2, alpha=4, target_modules=["q_proj"]),
        peft.LoKrConfig(r=2, alpha=4, target_modules=["q_proj"]),
        peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.MissConfig(r=2, target_modules=["q_proj"]),
    ],
    ids=["dora", "loha", "lokr", "ia3", "miss"],
)
def test_every_other_adapter_merges_exactly_into_the_base_and_approximately_by_itself(base, tmp_path, config):
    checkpoints, expected = adapters(base, tmp_path / "run", config)
    merge_checkpoints(checkpoints, tmp_path / "dense", scheme="uniform", lora_mode="dense", base=base)
    torch.testing.assert_close(load(tmp_path / "dense")(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    merge_checkpoints(checkpoints, tmp_path / "out", scheme="uniform", lora_mode="factors")
    logits = peft.PeftModel.from_pretrained(load(base), tmp_path / "out").eval()(IDS).logits
    assert (logits - expected).norm() < 0.05 * expected.norm()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)

    def forward(self, x):
        return self.conv(x).flatten(1)


@torch.no_grad()
def test_convolutions_are_flattened_and_back(tmp_path):
    torch.manual_seed(0)
    start, x = Net(), torch.randn(2, 3, 5, 5)
    outputs = []
    for i in range(2):
        plain = Net()
        plain.load_state_dict(start.state_dict())
        model = peft.get_peft_model(plain, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["conv"]))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / f"checkpoint-{i}")
        outputs.append(model(x))
    for mode, rank in (("cat", None), ("svd", 4)):
        merge_checkpoints(
            [tmp_path / "checkpoint-0", tmp_path / "checkpoint-1"],
            tmp_path / mode,
            scheme="uniform",
            lora_mode=mode,
            rank=rank,
        )
        plain = Net()
        plain.load_state_dict(start.state_dict())
        merged = peft.PeftModel.from_pretrained(plain, tmp_path / mode)
        torch.testing.assert_close(merged(x), (outputs[0] + outputs[1]) / 2, rtol=1e-4, atol=1e-5)


def test_weights_stored_transposed_are_merged_transposed(tmp_path):
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    target = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    checkpoints, expected = adapters(tmp_path / "base", tmp_path / "run", target, count=2)
    merge_checkpoints(checkpoints, tmp_path / "out", scheme="uniform", lora_mode="dense", base=tmp_path / "base")
    torch.testing.assert_close(load(tmp_path / "out")(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_base_that_does_not_fit_is_refused(base, tmp_path):
    checkpoints, _ = adapters(base, tmp_path / "run", lora(), count=2)
    other = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(other).save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match=r"the base model has no tensor 'model\.layers\.0\.mlp\.down_proj\.weight'"):
        merge_checkpoints(checkpoints, tmp_path / "out", scheme="uniform", lora_mode="dense", base=tmp_path / "other")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
@pytest.mark.parametrize("shards", ["1GB", "5KB"])
def test_full_models_load_unchanged_with_tied_weights_under_one_name(tmp_path, shards):
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    states = []
    for i in range(3):
        torch.manual_seed(i)
        model = transformers.LlamaForCausalLM(config)
        model.save_pretrained(tmp_path / f"checkpoint-{i}", max_shard_size=shards)
        states.append(model.state_dict())
    merge_checkpoints([tmp_path / f"checkpoint-{i}" for i in range(3)], tmp_path / "out", scheme="uniform")
    merged = load(tmp_path / "out").state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, sum(state[name] for state in states) / 3)
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert len(report["shares"]) == 3
