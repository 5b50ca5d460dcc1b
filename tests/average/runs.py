"""Run folders as a Trainer leaves them, in miniature."""

import json
import re

import torch
from safetensors.torch import save_file

LORA = {
    "peft_type": "LORA",
    "base_model_name_or_path": "tiny",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q", "v"],
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "bias": "none",
    "init_lora_weights": True,
}


def write_adapter(folder, tensors, config=LORA):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_model(folder, tensors, **config):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_state(folder, log_history, **more):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({**more, "log_history": log_history}))


def log_of(losses, every=1):
    return [{"step": every * (i + 1), "loss": loss} for i, loss in enumerate(losses)]


def factors(seed, rank=2, width=5, height=6, modules=("q", "v"), dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for module in modules:
        stem = f"base_model.model.layer.{module}"
        state[f"{stem}.lora_A.weight"] = torch.randn(rank, width, generator=generator).to(dtype)
        state[f"{stem}.lora_B.weight"] = torch.randn(height, rank, generator=generator).to(dtype)
    return state


def lora_delta(state, config, module):
    """``s B A`` of one module, in float64, from the definition."""
    a, b = (state[f"{module}.lora_{side}.weight"].double().flatten(1) for side in "AB")
    patterns = config.get("alpha_pattern", {})
    alpha = next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)), config["lora_alpha"])
    return alpha / (len(a) ** 0.5 if config.get("use_rslora") else len(a)) * b @ a


def adapter_run(folder, count=4, config=LORA, **options):
    """Adapters of steps 10, 20, ... that drift away from a common start, with their log."""
    start = factors(0, **options)
    for i in range(count):
        noise = factors(i + 1, **options)
        state = {name: tensor + 0.1 * noise[name] for name, tensor in start.items()}
        write_adapter(folder / f"checkpoint-{10 * (i + 1)}", state, config)
    write_state(folder / f"checkpoint-{10 * count}", log_of([1.0 - 0.1 * i for i in range(count)], every=10))
    return folder
