"""Balance weights do not depend on how a batch is divided: over processes, steps of accumulation, or a loss's scale."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from weightsmith.continual import DynamicEMA

STEPS = 5


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(STEPS, 16, 6, generator=generator), torch.randint(3, (STEPS, 16), generator=generator)


def loss_of(model, x, y):
    return nn.functional.cross_entropy(model(x), y)


def one_process():
    """Averaging weights of every step, and the average."""
    model = network()
    optimizer, ema = torch.optim.SGD(model.parameters(), lr=0.5), DynamicEMA(model, kappa=0.01)
    weights = []
    for x, y in zip(*data(), strict=True):
        loss_of(model, x, y).backward()
        optimizer.step()
        ema.step()
        optimizer.zero_grad()
        weights.append(list(ema.last_alpha.values()))
    return torch.tensor(weights), ema.average


def assert_same(found, average, rtol=1e-4):
    weights, expected = one_process()
    assert (weights[1:] != weights[0, 0]).float().mean() > 0.5  # balance weights, not fallbacks
    torch.testing.assert_close(found, weights, rtol=rtol, atol=0)
    for name, tensor in expected.items():
        torch.testing.assert_close(average[name], tensor, rtol=rtol, atol=1e-6)


def on_a_rank(folder, accumulate):
    """What each of two ranks runs: half of every batch, and with ``accumulate`` a quarter at a time, by accelerate."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = network()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    inner = accelerator.unwrap_model(model)
    ema, weights, rank = DynamicEMA(inner, kappa=0.01), [], accelerator.process_index
    for x, y in zip(*data(), strict=True):
        mine = slice(8 * rank, 8 * rank + 8)
        for part in zip(x[mine].chunk(accumulate), y[mine].chunk(accumulate), strict=True):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, *part))
                optimizer.step()
                if accelerator.sync_gradients:
                    ema.step()
                    weights.append(list(ema.last_alpha.values()))
                optimizer.zero_grad()
    torch.save((torch.tensor(weights), ema.average), Path(folder, f"{rank}.pt"))
    accelerator.end_training()


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_find_the_weights_of_one_process(accumulate, tmp_path):
    pytest.importorskip("accelerate")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run([*launch, __file__, tmp_path, str(accumulate)], check=True, timeout=200, env=environment)
    (first, average), (second, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(average[name], other[name]) for name in average)
    assert_same(first, average)


def test_a_gradient_scaler_changes_no_weight_and_its_skipped_steps_do_not_count():
    model = network()
    optimizer, ema = torch.optim.SGD(model.parameters(), lr=0.5), DynamicEMA(model, kappa=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    ema.attach(optimizer)
    weights = []
    for at, (x, y) in enumerate(zip(*data(), strict=True)):
        if at == 2:  # an overflow: the scaler skips this step
            scaler.scale(loss_of(model, x, y)).backward()
            next(model.parameters()).grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        scaler.scale(loss_of(model, x, y)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        weights.append(list(ema.last_alpha.values()))
    assert ema.step_count == STEPS
    assert_same(torch.tensor(weights), ema.average)


def language_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, attention_dropout=0.0,
        )
    )  # fmt: skip


def trained(folder, callback=None, **arguments):
    """Averaging weights of every step of a Trainer, and the callback."""
    transformers = pytest.importorskip("transformers")
    from weightsmith.integrations.continual import LCIACallback

    weights, lcia = [], callback or LCIACallback(kappa=0.01)

    class Look(transformers.TrainerCallback):
        def on_optimizer_step(self, *_, **__):
            weights.append(list(lcia.ema.last_alpha.values()))

    ids = torch.randint(32, (16, 6), generator=torch.Generator().manual_seed(0))
    settings = {
        "max_steps": 4, "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "save_strategy": "no",
        "disable_tqdm": True, "logging_strategy": "no", "per_device_train_batch_size": 8, "max_grad_norm": 0.0,
    }  # fmt: skip
    args = transformers.TrainingArguments(str(folder), **(settings | arguments))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    transformers.Trainer(language_model(), args, train_dataset=rows, callbacks=[lcia, Look()]).train()
    return torch.tensor(weights), lcia


def test_accumulation_and_bf16_under_trainer_find_the_weights_of_whole_batches(tmp_path):
    whole, _ = trained(tmp_path)
    assert (whole[1:] != whole[0, 0]).float().mean() > 0.5
    parts, _ = trained(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    torch.testing.assert_close(parts, whole, rtol=1e-2, atol=0)
    half, lcia = trained(tmp_path, bf16=True)
    torch.testing.assert_close(half.log(), whole.log(), rtol=0, atol=0.7)  # gradients have 8 bits
    assert all(tensor.dtype == torch.float32 for tensor in lcia.ema.average.values())


if __name__ == "__main__":
    on_a_rank(sys.argv[1], int(sys.argv[2]))
