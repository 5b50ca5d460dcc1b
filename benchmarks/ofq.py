"""What quantization-aware training costs: StatsQ beside torchao's fake quantization, and annealing beside AdamW.

Run ``OMP_NUM_THREADS=1 python benchmarks/ofq.py`` with torchao installed; all arms of a table are interleaved in one
process, on one thread. Targets: a StatsQ linear layer takes at most the time of torchao's ``FakeQuantizedLinear`` (int4
per channel), the quantizer alone at most 0.6 of the same in plain operations, and a training step under annealing at
most 1.10 of one without.
"""

from collections.abc import Callable
from importlib import metadata

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig

from _timing import interleave, show
from weightsmith.lab.models.vit import ViT
from weightsmith.quantize.in_training.annealing import ConfidenceGuidedAnnealing
from weightsmith.quantize.in_training.lsq import LSQWeight
from weightsmith.quantize.in_training.prepare import calibrate_, prepare_ofq_
from weightsmith.quantize.in_training.statsq import StatsQ, statsq

ROWS = ((8, 198, 384, 384), (8, 198, 384, 1536), (1, 198, 384, 1536), (8, 198, 192, 768))
ROUNDS = 25


def plain_statsq(w: Tensor, bits: int) -> Tensor:
    """The same in plain operations, straight-through by detaching."""
    half = 2 ** (bits - 1)
    scale = 2 * w.detach().abs().mean(1, keepdim=True)
    scaled = torch.clamp(w.detach() / scale, -1, 1 - 1e-6) * half - 0.5
    value = scale * (torch.round(scaled) + 0.5) / half
    return value + w - w.detach()


def quantizer(call: Callable[[Tensor], Tensor], rows: int, columns: int) -> Callable[[], None]:
    """Quantize a weight and go back; whatever is kept between steps is made anew."""
    w = nn.Parameter(torch.randn(rows, columns))
    up = torch.randn(rows, columns)

    def run() -> None:
        w.grad = None
        call(w).backward(up)

    return run


def linear(layer: nn.Module, batch: int, tokens: int, optimizer: bool = True) -> Callable[[], None]:
    """Forward and backward of one layer whose weight has changed since the last time."""
    x = torch.randn(batch, tokens, layer.in_features, requires_grad=True)  # type: ignore[arg-type]
    up = torch.randn(batch, tokens, layer.out_features)  # type: ignore[arg-type]
    parameters = list(layer.parameters())

    def run() -> None:
        for parameter in parameters:
            parameter.grad = None
            if optimizer:
                torch._C._autograd._unsafe_set_version_counter((parameter,), (parameter._version + 1,))
        x.grad = None
        layer(x).backward(up)

    return run


def with_weight(make: Callable[[nn.Linear], nn.Module], wide_in: int, wide_out: int) -> nn.Linear:
    """A linear layer under a parametrization."""
    layer = nn.Linear(wide_in, wide_out)
    parametrize.register_parametrization(layer, "weight", make(layer))
    return layer


def w2a2(wide_in: int, wide_out: int, x: Tensor) -> nn.Module:
    """Two bits for weights and activations."""
    layer = nn.Sequential(nn.Linear(wide_in, wide_out))
    return calibrate_(prepare_ofq_(layer, ends_bits=None), x)[0]


def torchao_linear(wide_in: int, wide_out: int, activations: bool = False) -> nn.Module:
    """The peer."""
    weight = IntxFakeQuantizeConfig(torch.int4, "per_channel", is_symmetric=True)
    inputs = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False) if activations else None
    return FakeQuantizedLinear(wide_in, wide_out, bias=True, activation_config=inputs, weight_config=weight)


def training(annealed: bool, fused: bool, whole: bool) -> Callable[[], None]:
    """A step of AdamW on a vision transformer of DeiT-T's width, the whole of it or the optimizer's alone."""
    torch.manual_seed(0)
    model = ViT(channels=3, size=32, classes=10, width=192, depth=6, heads=3)
    x, y = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    calibrate_(prepare_ofq_(model), x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=fused)
    if annealed:
        ConfidenceGuidedAnnealing(model).attach(optimizer)

    def run() -> None:
        if whole or optimizer.param_groups[0]["params"][0].grad is None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return run


def main() -> None:
    """Time every arm and show the tables."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    Console().print(f"torchao {metadata.version('torchao')}, torch {torch.__version__}")
    for batch, tokens, wide_in, wide_out in ROWS:
        x = torch.randn(batch, tokens, wide_in)
        arms = {
            "torchao w4": linear(torchao_linear(wide_in, wide_out), batch, tokens),
            "nn.Linear": linear(nn.Linear(wide_in, wide_out), batch, tokens),
            "StatsQ w4": linear(with_weight(lambda _: StatsQ(4), wide_in, wide_out), batch, tokens),
            "LSQ w4": linear(with_weight(lambda m: LSQWeight(m.weight, 4), wide_in, wide_out), batch, tokens),
            "StatsQ w4, weight unchanged": linear(
                with_weight(lambda _: StatsQ(4), wide_in, wide_out), batch, tokens, optimizer=False
            ),
            "StatsQ w2a2": linear(w2a2(wide_in, wide_out, x), batch, tokens),
            "torchao w4a8": linear(torchao_linear(wide_in, wide_out, activations=True), batch, tokens),
        }
        title = f"forward and backward, {batch} x {tokens} tokens, {wide_in} to {wide_out}"
        show(title, interleave(arms, rounds=ROUNDS), baseline="torchao w4")

    for rows, columns in ((384, 384), (1536, 384)):
        arms = {
            "plain operations": quantizer(lambda w: plain_statsq(w, 4), rows, columns),
            "statsq": quantizer(lambda w: statsq(w, 4), rows, columns),
        }
        show(f"quantizer alone, {rows} x {columns}", interleave(arms, rounds=4 * ROUNDS), baseline="plain operations")

    for fused in (False, True):
        for whole in (True, False):
            arms = {"AdamW": training(False, fused, whole), "AdamW under CGA": training(True, fused, whole)}
            title = f"{'training step' if whole else 'optimizer step alone'}, fused={fused}"
            show(title, interleave(arms, rounds=ROUNDS), baseline="AdamW")


if __name__ == "__main__":
    main()
