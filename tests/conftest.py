import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# everything that tests load is on disk: without this, libraries ask the hub first, and wait where there is no network
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# how long an example takes says how busy the machine is
settings.register_profile("weightsmith", deadline=None)
settings.load_profile("weightsmith")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # the models here are tiny: more threads only wait for each other, and tests run side by side
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_model():
    """Give the folder of a model that ``make models`` has fetched."""

    def find(name):
        folder = Path(__file__).parents[1] / ".models" / name
        if not folder.is_dir():
            pytest.skip(f"{name} is not there: run `make models`")
        return folder

    return find


@pytest.fixture(scope="session")
def tiny_language_model(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    words = ["<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789?+-#.:()*="]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=1, bos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)
