"""Tasks on data and models as strangers would bring them."""

import pytest
import torch
from torch import nn

from weightsmith.core.checkpoint import write_checkpoint
from weightsmith.core.errors import UsageError
from weightsmith.lab.probe import probe
from weightsmith.lab.tasks import TaskConfig, TrainConfig, make_task
from weightsmith.lab.tasks.scoring import load_weights


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("WEIGHTSMITH_CACHE", str(tmp_path / "decoded"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def works(config):
    """Check a task, train it and evaluate it; the outcome."""
    task = make_task(config)
    probe(task)
    model = config.network(task, 0)
    config.fit(model, torch.optim.AdamW(model.parameters(), lr=0.01), task, seed=0)
    outcome = task.evaluate(model, "test")
    assert all(tuple(scores.shape) == (task.rows["test"],) for scores in outcome.scores.values())
    return outcome


SMALL = {"train_examples": 100, "test_examples": 20, "steps": 2}


@pytest.mark.parametrize(
    "source",
    [
        "def make(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).to(torch.bfloat16)",
        "def make(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()",
        "class Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__(); self.layer = nn.Linear(64, 1000)\n"
        "    def forward(self, x): return (self.layer(x.flatten(1)), x)\n"
        "def make(): return Net()",
        "class Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__(); self.layer = nn.Linear(64, 10)\n"
        "    def forward(self, x): return {'logits': self.layer(x.flatten(1))}\n"
        "def make(classes, **others): return Net()",
        "from transformers import ViTConfig, ViTForImageClassification\n"
        "def make(channels, size, classes): return ViTForImageClassification(ViTConfig(hidden_size=8,"
        " num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=size, patch_size=4,"
        " num_channels=channels, num_labels=classes))",
        "from transformers import ViTConfig, ViTForImageClassification\n"
        "class Net(ViTForImageClassification):\n"
        "    def forward(self, x): return super().forward(x, return_dict=False)\n"
        "def make(channels, size, classes): return Net(ViTConfig(hidden_size=8,"
        " num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=size, patch_size=4,"
        " num_channels=channels, num_labels=classes))",
    ],
    ids=["bfloat16", "float64", "tuple and more outputs", "mapping", "transformers", "transformers tuple"],
)
def test_models_of_many_kinds_classify_images(here, source):
    (here / "net.py").write_text("import torch\nfrom torch import nn\n" + source)
    works(TrainConfig(**SMALL, model=f"{here / 'net.py'}:make"))


def test_a_loss_of_ones_own_is_given_the_logits_of_a_transformers_model(here):
    (here / "hub.py").write_text(
        "import torch\nfrom transformers import ViTConfig, ViTForImageClassification\n"
        "def make(): return ViTForImageClassification(ViTConfig(hidden_size=8, num_hidden_layers=1,"
        " num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4, num_channels=1, num_labels=10))\n"
        "def hinge(logits, targets): return torch.nn.functional.multi_margin_loss(logits, targets, reduction='none')\n"
        "def top3(logits, targets): return (logits.topk(3).indices == targets[:, None]).any(1)\n"
    )
    code = str(here / "hub.py")
    outcome = works(TrainConfig(**SMALL, model=f"{code}:make", loss=f"{code}:hinge", metric=f"{code}:top3"))
    assert set(outcome.metrics) == {"loss", "top3"}


def test_a_loss_or_metric_that_cannot_be_used_is_named_before_training(here):
    (here / "own.py").write_text(
        "import torch\nfrom torch import nn\nNUMBER = 3\n"
        "def mean(o, t): return (o.argmax(1) == t).float().mean()\n"
        "def plain(o, t): return 0.5\n"
        "def one(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 1))\n"
        "def flat(): return nn.Sequential(nn.Flatten(0))\n"
    )
    code = str(here / "own.py")
    for changes, message in (
        ({"metric": f"{code}:mean"}, r"metric 'mean' must give one number per example, \(8,\), got \(\)"),
        ({"metric": f"{code}:plain"}, "one number per example, .* got float"),
        ({"loss": f"{code}:NUMBER"}, "loss .* must be a function"),
        ({"metric": f"{code}:meen"}, "metric: .* has no 'meen'; did you mean 'mean'"),
        ({"loss": "no_such_module:loss"}, "loss: there is no module 'no_such_module'"),
        ({"model": f"{code}:one"}, "1 outputs per example, the data have 10 classes"),
        ({"model": f"{code}:flat"}, r"must return logits \(8, 10\), got \(512,\)"),
    ):
        with pytest.raises(UsageError, match=message):
            probe(make_task(TaskConfig(train_examples=100, **changes)))


# sentences ------------------------------------------------------------------------------------------------------------


def reviews(here, rows=120):
    words = ["plot", "actors", "music", "scene", "ending", "camera"]
    lines = []
    for row in range(rows):
        filler = " ".join(words[(row * k) % 6] for k in range(1, 5))
        lines.append(f'"{filler}, {["dreary", "lovely"][row % 2]} {filler}",{["bad", "good"][row % 2]}\n')
    (here / "reviews.csv").write_text("text,label\n" + "".join(lines))
    return "reviews.csv"


def test_a_bag_of_words_learns_which_word_decides(here):
    outcome = works(TrainConfig(task="sentences", data=reviews(here), epochs=15, batch_size=16, length=32))
    assert outcome.metrics["accuracy"] > 0.9


def test_a_decoder_without_a_padding_token_classifies_a_text_as_it_does_alone(here):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

    words = ["<unk>", "<end>", "plot", "actors", "music", "scene", "ending", "camera", "dreary", "lovely", ","]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>").save_pretrained("gpt")
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    GPT2ForSequenceClassification(GPT2Config(vocab_size=len(words), eos_token_id=1, **sizes)).save_pretrained("gpt")
    rows = [f'"{"plot " * (1 + row % 5)}{["dreary", "lovely"][row % 2]}",{row % 2}\n' for row in range(40)]
    (here / "uneven.csv").write_text("text,label\n" + "".join(rows))
    config = TrainConfig(task="sentences", data="uneven.csv", model="./gpt", steps=1, length=16)
    task = make_task(config)
    model = task.build().eval()
    together = task.train.__getitems__(list(range(8)))
    assert len(set(task.train.lengths[:8].tolist())) > 1
    with torch.no_grad():
        logits = model(**together.inputs).logits
        alone = torch.cat([model(**task.train.__getitems__([row]).inputs).logits for row in range(8)])
    torch.testing.assert_close(logits, alone)
    with pytest.raises(UsageError, match="length must be at most 32"):
        make_task(TaskConfig(task="sentences", data="uneven.csv", model="./gpt", length=64))


def test_data_that_change_between_two_runs_of_one_process_are_read_again(here):
    from dataclasses import replace

    from weightsmith.experiments.adamp import EXPERIMENT
    from weightsmith.lab.run import check

    config = replace(EXPERIMENT.preset("smoke"), task="sentences", data=reviews(here), batch_size=8)
    before, _ = check(EXPERIMENT, config)
    file = here / "reviews.csv"
    file.write_text(file.read_text().replace("plot", "story"))
    after, _ = check(EXPERIMENT, config)
    assert before.fingerprint != after.fingerprint


def test_changed_texts_are_other_data_and_untouched_ones_are_not(here):
    config = TaskConfig(task="sentences", data=reviews(here))
    before = make_task(config).fingerprint
    assert make_task(config).fingerprint == before
    file = here / "reviews.csv"
    file.write_text(file.read_text().replace("plot", "story", 1))
    assert make_task(config).fingerprint != before


# language and questions -----------------------------------------------------------------------------------------------


def test_perplexity_is_the_exponential_of_the_loss_per_token(here):
    (here / "book.txt").write_text("It was a dark and stormy night.\n" * 300)
    metrics = works(TrainConfig(task="language", data="book.txt", length=32, steps=20)).metrics
    assert metrics["perplexity"] == pytest.approx(torch.tensor(metrics["loss"]).exp().item(), rel=1e-4)
    assert metrics["perplexity"] < 60


def test_a_cut_answer_does_not_teach_to_end_there(here):
    lines = ['{"question": "Q?", "answer": "%s"}\n' % ("abc" * n) for n in (1, 30)]
    (here / "qa").mkdir()
    for split in ("train", "test"):
        (here / "qa" / f"{split}.jsonl").write_text("".join(lines * 3))
    task = make_task(TaskConfig(task="questions", data="qa", length=40, validation_fraction=0))
    end = 257
    rows = task.train.__getitems__(list(range(6))).targets
    assert (rows == end).any(1).tolist() == [True, False] * 3


def test_questions_that_are_too_long_are_left_out_and_reported(here):
    lines = ['{"question": "%s", "answer": "4"}\n' % ("Q" * n) for n in (3, 200)]
    (here / "qa").mkdir()
    for split in ("train", "test"):
        (here / "qa" / f"{split}.jsonl").write_text("".join(lines * 3))
    task = make_task(TaskConfig(task="questions", data="qa", length=40, validation_fraction=0))
    assert (task.rows["train"], task.rows["test"]) == (3, 3)
    assert "6 of 12 left out, longer than 40 tokens" in task.facts["data"]


# tasks of one's own ---------------------------------------------------------------------------------------------------

OWN = """
import random, torch
import numpy as np
from torch import nn
from torch.utils.data import TensorDataset
x = torch.arange(60.0).view(60, 1) / 60
y = (x[:, 0] > 0.5).long()
class Noisy(torch.utils.data.Dataset):
    def __len__(self): return 30
    def __getitem__(self, i):
        return x[i] + 0.01 * torch.rand(1) + 0.01 * random.random() + 0.01 * np.random.rand(), int(y[i])
class Keyword(nn.Module):
    def __init__(self):
        super().__init__(); self.layer = nn.Linear(1, 2)
    def forward(self, *, values): return self.layer(values)
def make(): return nn.Linear(1, 2)
def three(): return make, TensorDataset(x, y), TensorDataset(x[:9], y[:9])
def four(): return make, TensorDataset(x, y), TensorDataset(x[:5], y[:5]), TensorDataset(x[:9], y[:9])
def noisy(): return make, Noisy(), Noisy()
def keywords():
    rows = [{"values": a, "label": b} for a, b in zip(x, y)]
    return Keyword, rows[:50], rows[50:]
def settings(config): return make, TensorDataset(x, y), TensorDataset(x[:config.length], y[:config.length])
def trained(): return make(), TensorDataset(x, y), TensorDataset(x, y)
def number(): return 3
def empty(): return make, [], TensorDataset(x, y)
def hits(outputs, targets): return (outputs.argmax(1) == targets).float()
def missing(): return make, [{"values": a} for a in x], TensorDataset(x, y)
"""


@pytest.fixture
def own(here):
    (here / "own.py").write_text(OWN)
    return lambda name, **more: TrainConfig(task=f"{here / 'own.py'}:{name}", **{"steps": 2, **more})


def test_a_model_and_datasets_are_a_task(own):
    works(own("three"))
    task = make_task(own("three", train_examples=20, test_examples=4))
    assert task.rows == {"train": 16, "validation": 4, "test": 4}
    assert (task.name, task.metric.name) == ("three", "accuracy")
    assert make_task(own("four")).rows == {"train": 60, "validation": 5, "test": 9}
    assert make_task(own("settings", length=7)).rows["test"] == 7
    works(own("keywords"))


def test_loss_and_metric_of_the_settings_go_with_datasets_of_ones_own(own, here):
    assert set(works(own("three", metric=f"{here / 'own.py'}:hits")).metrics) == {"loss", "hits"}


def test_random_transforms_follow_from_the_seed_and_do_not_change_what_the_data_are(own):
    first, second = (make_task(own("noisy")) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    before = torch.get_rng_state()
    one, other = (task.train.__getitems__([3, 4]).inputs for task in (first, second))
    assert torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())
    first.train.seed = 1
    assert not torch.equal(first.train.__getitems__([3, 4]).inputs, other)


def test_code_and_data_of_ones_own_make_the_fingerprint(own, here):
    before = make_task(own("three")).fingerprint
    assert make_task(own("three", train_examples=30)).fingerprint != before
    (here / "own.py").write_text(OWN + "# another word\n")
    assert make_task(own("three")).fingerprint != before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("trained", "a function that makes the model, so that every seed has first weights"),
        ("number", "must return a weightsmith.lab.task.Task, or .* got int"),
        ("empty", "map-style dataset with at least one example"),
        ("missing", "needs one of the keys"),
        ("thre", "has no 'thre'; did you mean 'three'"),
    ],
)
def test_what_is_no_task_is_named(own, name, message):
    with pytest.raises(UsageError, match=message):
        make_task(own(name))


# checkpoints ----------------------------------------------------------------------------------------------------------


def test_weights_come_from_files_and_folders_of_many_forms(here):
    torch.manual_seed(1)
    source = nn.Linear(3, 2)
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    write_checkpoint(state, here / "folder")
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, "parallel.pt")
    torch.save({"model": state, "epoch": 3}, "nested.pt")
    for checkpoint in ("folder", "folder/model.safetensors", "parallel.pt", "nested.pt"):
        assert torch.equal(load_weights(nn.Linear(3, 2), checkpoint).weight, source.weight)


def test_a_pickled_model_is_refused_and_not_run(here):
    torch.save(nn.Linear(3, 2), "whole.pt")
    with pytest.raises(UsageError, match=r"'whole\.pt' is not a plain state dict"):
        load_weights(nn.Linear(3, 2), "whole.pt")
    (here / "cut.pt").write_bytes((here / "whole.pt").read_bytes()[:50])
    with pytest.raises(UsageError, match=r"'cut\.pt'"):
        load_weights(nn.Linear(3, 2), "cut.pt")
