"""Groups of parameters from task to task, in a plain loop, with PEFT and under Trainer."""

import copy
import json
import shutil

import pytest
import torch
from torch import nn

from weightsmith.continual import ContinualTuner, DynamicEMA, InstructionRouter
from weightsmith.core.errors import UsageError

ADD, SUM, REVERSE = "Add the two numbers", "Add these two numbers", "Reverse the letters of the word"


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def train(tuner, seed=0, steps=3, each=lambda: None):
    torch.manual_seed(seed)
    parameters = [p for p in tuner.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(steps):
        tuner.model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        tuner.step()
        optimizer.zero_grad()
        each()


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def run(tuner, *instructions):
    found = []
    for seed, text in enumerate(instructions):
        with tuner.task([text]) as assignment:
            train(tuner, seed)
        found.append(assignment.group)
    return found


def router():
    return InstructionRouter(threshold=0.5)


def test_similar_tasks_share_a_group_and_only_they_are_averaged():
    tuner = ContinualTuner(network(), router(), kappa=0.01)
    averaged = []
    for text in (ADD, REVERSE, SUM):
        with tuner.task([text]) as found:
            averaged.append(tuner.ema is not None)
            train(tuner)
            if tuner.ema is not None:
                expected = {name: tensor.clone() for name, tensor in tuner.ema.average.items()}
    assert averaged == [False, False, True]
    assert found.group == 1
    assert same(weights(tuner.model), expected)
    assert tuner.router.groups == [[ADD, SUM], [REVERSE]]
    assert tuner.nbytes == 2 * sum(p.nbytes for p in tuner.model.parameters())


def test_a_group_goes_on_from_its_own_parameters_and_not_from_the_last_task():
    tuner = ContinualTuner(network(), router(), kappa=0.01)
    run(tuner, ADD)
    first = weights(tuner.model)
    run(tuner, REVERSE)
    second = weights(tuner.model)
    assert not same(first, second)
    tuner.begin([SUM])
    assert same(weights(tuner.model), first)
    tuner.cancel()
    assert [tuner.use(REVERSE), same(weights(tuner.model), second)] == [2, True]
    assert [tuner.use([ADD, SUM]), same(weights(tuner.model), first)] == [1, True]
    assert tuner.predict_group("Reverse this word").group == 2


@pytest.mark.parametrize("begin", ["previous", "base", "random"])
def test_where_a_new_group_starts(begin):
    model = network()
    base = weights(model)
    tuner = ContinualTuner(model, router(), new_group_init=begin)
    run(tuner, ADD)
    last = weights(model)
    tuner.begin([REVERSE])
    now = weights(model)
    assert same(now, last) == (begin == "previous")
    assert same(now, base) == (begin == "base")


def test_an_error_in_a_task_leaves_the_groups_as_they_were(tmp_path):
    tuner = ContinualTuner(network(), router(), tmp_path)
    run(tuner, ADD)
    kept = json.loads((tmp_path / "continual.json").read_text())
    first = weights(tuner.model)
    with pytest.raises(KeyError), tuner.task([SUM]):
        train(tuner)
        raise KeyError
    assert json.loads((tmp_path / "continual.json").read_text()) == kept
    assert tuner.tasks == 1
    assert tuner.router.groups == [[ADD]]
    tuner.use(1)
    assert same(weights(tuner.model), first)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_new_tuner_goes_on_after_every_task(tmp_path, stop):
    texts = (ADD, REVERSE, SUM, "Reverse the word")
    whole = ContinualTuner(network(), router(), kappa=0.01)
    first = ContinualTuner(network(), router(), tmp_path, kappa=0.01)
    for seed, text in enumerate(texts):
        if seed == stop:
            first = ContinualTuner(network(seed=9), router(), tmp_path, kappa=0.01)
            assert first.tasks == stop
        for tuner in (whole, first):
            with tuner.task([text]):
                train(tuner, seed)
    assert first.router.groups == whole.router.groups
    for group in (1, 2):
        assert whole.use(group) == first.use(group)
        assert same(weights(whole.model), weights(first.model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["continual.json", "group_1-task_3", "group_2-task_4"]


def test_the_step_of_a_group_is_that_of_the_average():
    model, twin = network(), network()
    tuner = ContinualTuner(model, router(), kappa=0.05)
    run(tuner, ADD)
    twin.load_state_dict(model.state_dict())
    ema = DynamicEMA(twin, kappa=0.05)
    other = ContinualTuner(twin, router())
    other.begin([ADD])  # a new group of its own, so that its steps leave the average to us
    train(other, each=lambda: None, steps=0)
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(3):
        twin(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        ema.step()
        optimizer.zero_grad()
    ema.copy_to_model()
    tuner.fit([SUM], lambda _: train(tuner))
    assert same(weights(model), weights(twin))


def test_frozen_parameters_belong_to_no_group(tmp_path):
    model = network()
    model[0].requires_grad_(False)
    tuner = ContinualTuner(model, router(), tmp_path)
    run(tuner, ADD)
    model[0].weight.data += 1
    moved = model[0].weight.detach().clone()
    tuner.use(1)
    assert torch.equal(model[0].weight, moved)
    assert tuner.nbytes == sum(p.nbytes for p in model[2].parameters())


def test_what_is_done_out_of_order_is_refused():
    tuner = ContinualTuner(network(), router())
    for call in (tuner.step, tuner.end):
        with pytest.raises(UsageError, match="no task in progress"):
            call()
    with pytest.raises(UsageError, match="no groups"):
        tuner.use(ADD)
    run(tuner, ADD)
    with pytest.raises(UsageError, match="group must be between 1 and 1, got 2"):
        tuner.use(2)
    tuner.begin([SUM])
    with pytest.raises(UsageError, match="in progress"):
        tuner.begin([ADD])
    with pytest.raises(UsageError, match="in progress"):
        tuner.use(1)
    with pytest.raises(UsageError, match="step was never called"):
        tuner.end()


def test_bad_settings_are_refused(tmp_path):
    used = router()
    used.commit(1, [ADD])
    for arguments, message in (
        ({"new_group_init": "zero"}, "new_group_init"),
        ({"kappa": -1}, "kappa"),
        ({"router": used}, "router has 1 groups"),
    ):
        with pytest.raises(UsageError, match=message):
            ContinualTuner(network(), **arguments)
    with pytest.raises(UsageError, match="no trainable"):
        ContinualTuner(network().requires_grad_(False))
    run(ContinualTuner(network(), router(), tmp_path), ADD)
    with pytest.raises(UsageError, match="holds groups already"):
        ContinualTuner(network(), router(), tmp_path, resume=False)


def test_a_damaged_folder_or_one_of_another_model_is_refused(tmp_path):
    run(ContinualTuner(network(), router(), tmp_path / "a"), ADD)
    with pytest.raises(UsageError, match=r"0\.weight"):
        ContinualTuner(nn.Sequential(nn.Linear(4, 9)), router(), tmp_path / "a")
    model = network()
    before = weights(model)
    for at, (file, content) in enumerate(
        [
            ("continual.json", b'{"tasks": 1}'),
            ("continual.json", b'{"tasks": 1, "groups": [{"folder": "../a", "instructions": ["x"]}]}'),
            ("continual.json", b'{"tasks": 1, "groups": [{"folder": "a", "instructions": []}]}'),
            ("group_1-task_1/model.safetensors", b"damaged"),
        ]
    ):
        folder = tmp_path / f"copy{at}"
        shutil.copytree(tmp_path / "a", folder)
        (folder / file).write_bytes(content)
        with pytest.raises(UsageError):
            ContinualTuner(model, router(), folder)
    assert same(weights(model), before)


# with PEFT


def language_model(seed=0):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def with_lora(seed=0, name="default", **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    base = language_model()
    torch.manual_seed(seed)
    return peft.get_peft_model(base, config, adapter_name=name)


def examples(seed=0, n=16):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(32, (n, 6), generator=generator)]


def train_language(model, step, seed=0):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.stack([row["input_ids"] for row in examples(seed)])
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("default", {}),
        ("mine", {}),
        ("default", {"modules_to_save": ["lm_head"]}),
        ("default", {"use_dora": True}),
        ("default", {"bias": "all"}),
    ],
)
def test_groups_are_peft_adapters_that_peft_reads(tmp_path, name, options):
    peft = pytest.importorskip("peft")
    tuner = ContinualTuner(with_lora(name=name, **options), router(), tmp_path, kappa=0.01)
    for seed, text in enumerate((ADD, REVERSE, SUM)):
        with tuner.task([text]):
            train_language(tuner.model, tuner.step, seed)
    ids = torch.stack([row["input_ids"] for row in examples(7)])
    for group, folder in ((1, "group_1-task_3"), (2, "group_2-task_2")):
        tuner.use(group)
        expected = tuner.model.eval()(input_ids=ids).logits
        loaded = peft.PeftModel.from_pretrained(language_model(), tmp_path / folder).eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected)
    resumed = ContinualTuner(with_lora(seed=5, name=name, **options), router(), tmp_path, kappa=0.01)
    for group in (1, 2):
        tuner.use(group)
        resumed.use(group)
        assert same(weights(tuner.model), weights(resumed.model))


def test_a_trained_part_outside_the_adapter_is_kept_too(tmp_path):
    model = with_lora()
    model.base_model.model.lm_head.weight.requires_grad_(True)
    tuner = ContinualTuner(model, router(), tmp_path)
    with tuner.task([ADD]):
        train_language(model, tuner.step)
    other = with_lora(seed=3)
    other.base_model.model.lm_head.weight.requires_grad_(True)
    ContinualTuner(other, router(), tmp_path)
    assert same(weights(model), weights(other))


def test_random_new_groups_reset_the_adapter():
    tuner = ContinualTuner(with_lora(), router(), new_group_init="random")
    with tuner.task([ADD]):
        train_language(tuner.model, tuner.step)
    before = weights(tuner.model)
    tuner.begin([REVERSE])
    after = weights(tuner.model)
    assert all(not after[name].any() for name in after if "lora_B" in name)
    assert all(not torch.equal(before[name], after[name]) for name in after)


# under Trainer


def trainer(model, folder, *callbacks, **arguments):
    transformers = pytest.importorskip("transformers")
    settings = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": [], "use_cpu": True,
        "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "seed": 0,
    }  # fmt: skip
    args = transformers.TrainingArguments(output_dir=str(folder), **(settings | arguments))
    return transformers.Trainer(
        model, args, train_dataset=examples(), eval_dataset=examples(1), callbacks=list(callbacks)
    )


def callback(*args, **kwargs):
    pytest.importorskip("transformers")
    from weightsmith.integrations.continual import LCIACallback

    return LCIACallback(*args, **kwargs)


def test_trainer_ends_with_the_average(tmp_path):
    model, plain = with_lora(), with_lora()
    lcia = callback(kappa=0.01)
    trainer(model, tmp_path / "a", lcia).train()
    trainer(plain, tmp_path / "b").train()
    assert lcia.ema.step_count == 4
    average = lcia.ema.average
    assert all(torch.equal(p, average[name]) for name, p in model.named_parameters() if p.requires_grad)
    assert not same(weights(model), weights(plain))


def test_accumulated_gradients_count_as_one_step(tmp_path):
    lcia = callback(kappa=0.01)
    trainer(with_lora(), tmp_path, lcia, gradient_accumulation_steps=2, max_steps=2).train()
    assert lcia.ema.step_count == 2


@pytest.mark.parametrize("dropout", [0.0])
def test_a_trainer_that_resumes_goes_on_exactly(tmp_path, dropout):
    whole, parts = with_lora(lora_dropout=dropout), with_lora(lora_dropout=dropout)
    trainer(whole, tmp_path / "a", callback(kappa=0.01)).train()
    saved = {"save_strategy": "steps", "save_steps": 2}
    trainer(parts, tmp_path / "b", callback(kappa=0.01), **saved).train()
    again = with_lora(seed=4, lora_dropout=dropout)
    lcia = callback(kappa=0.01)
    trainer(again, tmp_path / "b", lcia, **saved).train(resume_from_checkpoint=str(tmp_path / "b/checkpoint-2"))
    assert lcia.ema.step_count == 4
    assert same(weights(whole), weights(parts))
    assert same(weights(whole), weights(again))
    (tmp_path / "b/checkpoint-2/lcia.pt").write_bytes(b"damaged")
    with pytest.raises(UsageError, match=r"lcia\.pt cannot be read"):
        trainer(with_lora(), tmp_path / "b", callback(kappa=0.01), **saved).train(
            resume_from_checkpoint=str(tmp_path / "b/checkpoint-2")
        )
    (tmp_path / "b/checkpoint-2/lcia.pt").unlink()
    with pytest.raises(UsageError, match="missing"):
        trainer(with_lora(), tmp_path / "b", callback(kappa=0.01), **saved).train(
            resume_from_checkpoint=str(tmp_path / "b/checkpoint-2")
        )


def test_evaluation_sees_the_average_where_that_is_asked(tmp_path):
    transformers = pytest.importorskip("transformers")
    losses, lives = {}, {}
    for swap in (True, False):
        model = with_lora()

        class Look(transformers.TrainerCallback):
            def on_evaluate(self, *_, metrics=None, **__):
                losses.setdefault(swap, []).append(metrics["eval_loss"])  # noqa: B023

        trainer(
            model, tmp_path / str(swap), callback(kappa=0.01, swap_on_evaluate=swap), Look(),
            eval_strategy="steps", eval_steps=2,
        ).train()  # fmt: skip
        lives[swap] = weights(model)
    assert same(lives[True], lives[False])  # the run itself is the same
    assert losses[True] != losses[False]


def test_a_tuner_under_trainer_is_the_tuner_in_a_loop(tmp_path):
    tuner = ContinualTuner(with_lora(), router(), tmp_path / "groups", kappa=0.01)
    lcia = callback(tuner)
    for at, text in enumerate((ADD, SUM)):
        before = weights(tuner.model)
        tuner.fit([text], lambda model, at=at: trainer(model, tmp_path / str(at), lcia).train())
        assert (lcia.ema is None) == (at == 0)
        assert not same(weights(tuner.model), before)
    assert tuner.router.groups == [[ADD, SUM]]
    average = lcia.ema.average
    assert all(torch.equal(p, average[name]) for name, p in tuner.model.named_parameters() if p.requires_grad)


def test_what_the_callback_cannot_do_is_refused(tmp_path):
    tuner = ContinualTuner(with_lora(), router())
    with pytest.raises(UsageError, match="no task in progress"):
        trainer(tuner.model, tmp_path, callback(tuner)).train()
    with pytest.raises(UsageError, match="kappa must be given to the tuner"):
        callback(tuner, kappa=1.0)
    with pytest.raises(TypeError, match="unknown argument kapa"):
        callback(kapa=1.0)
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2}
    with pytest.raises(UsageError, match="load_best_model_at_end must be False"):
        trainer(with_lora(), tmp_path, callback(), **best, eval_steps=2).train()


def test_copies_do_not_share_tensors_with_the_model():
    tuner = ContinualTuner(network(), router())
    run(tuner, ADD)
    held = copy.deepcopy(weights(tuner.model))
    for p in tuner.model.parameters():
        p.data.zero_()
    tuner.use(1)
    assert same(weights(tuner.model), held)


def test_a_part_that_cannot_be_made_random_is_refused_before_the_first_task():
    model = with_lora(use_dora=True)
    before = weights(model)
    with pytest.raises(UsageError, match="cannot be reset: take another new_group_init"):
        ContinualTuner(model, new_group_init="random")
    assert same(weights(model), before)
