"""Two processes: one writes the groups, both end with the same, and a step of new classes is that of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from weightsmith.continual import ContinualTuner, InstructionRouter, WeightAligning
from weightsmith.core.errors import UsageError

TEXTS = ("Add the numbers", "Reverse the letters", "Add the two numbers")


def start():
    torch.manual_seed(0)
    return nn.Linear(4, 2)


def tune(folder, rank):
    """Three tasks on a model that DDP holds while it is trained; then a folder that cannot be written."""
    model = start()
    torch.manual_seed(rank)  # a process draws its own random numbers
    tuner = ContinualTuner(
        model, InstructionRouter(threshold=0.5), folder / "groups", kappa=0.01, new_group_init="random"
    )
    wrapped = nn.parallel.DistributedDataParallel(model)
    for text in TEXTS:
        with tuner.task([text]):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(3):
                wrapped(torch.randn(8, 4)).square().mean().backward()
                optimizer.step()
                tuner.step()
                optimizer.zero_grad()
        listed = sorted(path.name for path in (folder / "groups").iterdir())
        assert len(listed) == 1 + len(tuner.router.groups), listed  # all is there when end returns
    resumed = ContinualTuner(start(), InstructionRouter(threshold=0.5), folder / "groups", kappa=0.01)
    (folder / "file").write_text("in the way") if rank == 0 else None
    distributed.barrier()
    failing = ContinualTuner(start(), folder=folder / "file" / "groups")
    failing.begin(["Add"])
    with pytest.raises(OSError if rank == 0 else UsageError):
        failing.end()
    groups = [(tuner.use(at), {k: v.clone() for k, v in model.state_dict().items()})[1] for at in (1, 2)]
    again = [(resumed.use(at), {k: v.clone() for k, v in resumed.model.state_dict().items()})[1] for at in (1, 2)]
    torch.save((groups, again), folder / f"{rank}.pt")


def classes():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    wa = WeightAligning(transformers.BertForSequenceClassification(config), "classifier")
    wa.begin_step(2)
    wa.begin_step(1)
    return wa


def train_classes(folder, batch):
    transformers = pytest.importorskip("transformers")
    from weightsmith.integrations.new_classes import WeightAligningTrainer

    wa, ids = classes(), torch.randint(20, (8, 5), generator=torch.Generator().manual_seed(1))
    args = transformers.TrainingArguments(
        str(folder / "out"), per_device_train_batch_size=batch, max_steps=1, learning_rate=0.5, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0.0, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": at % 3} for at, row in enumerate(ids)]
    WeightAligningTrainer(wa, args, train_dataset=rows).train()
    return wa.model.state_dict()


def launch(folder, what):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, __file__, str(folder), what], capture_output=True, text=True, timeout=200, env=environment,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
def test_two_processes_end_with_the_same_groups_and_files(tmp_path):
    (first, first_again), (second, second_again) = launch(tmp_path, "tune")
    for one, *others in zip(first, second, first_again, second_again, strict=True):
        assert all(torch.equal(other[name], one[name]) for other in others for name in one)


@pytest.mark.slow
def test_a_step_of_new_classes_in_two_processes_is_that_of_one(tmp_path):
    pytest.importorskip("accelerate")
    expected = train_classes(tmp_path, 8)
    for found in launch(tmp_path, "classes"):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    if sys.argv[2] == "tune":
        distributed.init_process_group("gloo")
        tune(folder, rank)
        distributed.destroy_process_group()
    else:
        torch.save(train_classes(folder, 4), folder / f"{rank}.pt")
