"""Small configs of many transformers families: what `prepare_ofq_` is tried on, and what the docs' table lists."""

import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from weightsmith.quantize.in_training.preparation import ofq_report
from weightsmith.quantize.in_training.prepare import prepare_ofq_

_TEXT = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_IMAGE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 4,
}
_SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
_PYRAMID = {
    "depths": [1, 1],
    "num_encoder_blocks": 2,
    "hidden_sizes": [8, 16],
    "num_attention_heads": [1, 2],
    "sr_ratios": [2, 1],
    "mlp_ratios": [2, 2],
    "strides": [4, 2],
}
_SEQ2SEQ = {
    "vocab_size": 32,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
}
_LLAMA = {**_TEXT, "num_key_value_heads": 1, "use_cache": False}

# by family: the class and its config; what it is for decides what it is given
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ALBERT": ("AlbertModel", "AlbertConfig", {**_TEXT, "embedding_size": 16}),
    "BART": ("BartModel", "BartConfig", {**_SEQ2SEQ, "max_position_embeddings": 32, "use_cache": False}),
    "BEiT": ("BeitForImageClassification", "BeitConfig", {**_IMAGE, "use_relative_position_bias": True}),
    "BERT": ("BertForSequenceClassification", "BertConfig", _TEXT),
    "CLIP vision": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**_IMAGE, "projection_dim": 8}),
    "DeBERTa": ("DebertaModel", "DebertaConfig", _TEXT),
    "DeiT": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", _IMAGE),
    "DINOv2": ("Dinov2Model", "Dinov2Config", {**_IMAGE, "mlp_ratio": 2}),
    "DistilBERT": ("DistilBertModel", "DistilBertConfig", {"vocab_size": 32, "dim": 16, "n_layers": 2, "n_heads": 2}),
    "ELECTRA": ("ElectraModel", "ElectraConfig", {**_TEXT, "embedding_size": 16}),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", {**_LLAMA, "head_dim": 8}),
    "GPT-2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "use_cache": False}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "GPT-Neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {"vocab_size": 32, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 32}
        | {"attention_types": [[["global", "local"], 1]], "window_size": 4, "use_cache": False}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "MPNet": ("MPNetModel", "MPNetConfig", _TEXT),
    "OPT": (
        "OPTForCausalLM",
        "OPTConfig",
        {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24}
        | {"max_position_embeddings": 32, "word_embed_proj_dim": 16, "use_cache": False}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "PVT": (
        "PvtForImageClassification",
        "PvtConfig",
        {**_PYRAMID, "image_size": 16, "sequence_reduction_ratios": [2, 1]},
    ),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_LLAMA, "head_dim": 8}),
    "RoBERTa": ("RobertaForSequenceClassification", "RobertaConfig", _TEXT),
    "SegFormer": (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {**_PYRAMID, "patch_sizes": [7, 3], "decoder_hidden_size": 16, "num_labels": 3},
    ),
    "SigLIP vision": ("SiglipVisionModel", "SiglipVisionConfig", _IMAGE),
    "Swin": ("SwinForImageClassification", "SwinConfig", _SWIN),
    "Swin-V2": ("Swinv2ForImageClassification", "Swinv2Config", _SWIN),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "use_cache": False}
        | {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0},
    ),
    "ViT": ("ViTForImageClassification", "ViTConfig", _IMAGE),
    "ViT-MAE": ("ViTMAEModel", "ViTMAEConfig", _IMAGE),
    "Whisper": (
        "WhisperModel",
        "WhisperConfig",
        {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16, "use_cache": False},
    ),
    "YOLOS": ("YolosForObjectDetection", "YolosConfig", {**_IMAGE, "image_size": [16, 16], "num_detection_tokens": 3}),
}


def build(family: str) -> tuple[nn.Module, Callable[[], dict[str, torch.Tensor]]]:
    """A small random model in evaluation mode, and what to call it with."""
    import transformers

    architecture, config, settings = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(getattr(transformers, config)(**settings)).eval()
    return model, lambda: _batch(model)


def _batch(model: nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    held: Any = model
    if held.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, 32, (2, 7), generator=generator)
    if held.main_input_name == "input_features":
        return {"input_features": torch.randn(2, 8, 32, generator=generator), "decoder_input_ids": ids}
    hidden = torch.ones_like(ids)
    hidden[1, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": hidden}
    return batch | {"decoder_input_ids": ids} if held.config.is_encoder_decoder else batch


def rows() -> list[str]:
    """The table of the docs, a line each."""
    return [_row(family) for family in FAMILIES]


def _row(family: str) -> str:
    model, batch = build(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepare_ofq_(model, example=batch())
    report = ofq_report(model)
    converted = sum(done == "query-key product" for done in report.attention.values())
    reasons = dict.fromkeys(re.sub(r" by \S+ of their size", "", done) for done in report.attention.values())
    reasons.pop("query-key product", None)
    all_of_them = len(report.attention)
    share = f"{converted} of {all_of_them}" if all_of_them else "none found"
    ends = ", ".join(f"`{name}`" for name in report.ends if "continuous_position_bias" not in name) or "none"
    return f"| {family} | {share} | {'; '.join(reasons)} | {ends} |"


if __name__ == "__main__":
    sys.stdout.write("\n".join(rows()) + "\n")
