"""The tuner and its callback in other people's training: TRL, adapters, half precision, kills and stale checkpoints."""

import shutil
from pathlib import Path

import pytest
import torch

from weightsmith.continual import ContinualTuner, ForgettingMeter, InstructionRouter
from weightsmith.core.errors import UsageError

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from weightsmith.integrations.continual import ForgettingCallback, LCIACallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*pin_memory.*")
ADD, SUM, REVERSE = "Add the numbers", "Add the two numbers", "Reverse the letters of the word"


def base(dropout=0.0):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=dropout, embd_pdrop=dropout,
        attn_pdrop=dropout, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def lora(seed=0):
    torch.manual_seed(seed)
    return peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")


def adapted(seed=0, dtype=torch.float32):
    model, config = base().to(dtype), lora()
    torch.manual_seed(seed)
    return peft.get_peft_model(model, config)


def examples(seed=0, n=16):
    ids = torch.randint(32, (n, 6), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(model, folder, *callbacks, evaluate=None, **options):
    settings = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": [], "use_cpu": True,
        "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "seed": 0,
    }  # fmt: skip
    args = transformers.TrainingArguments(str(folder), **(settings | options))
    return transformers.Trainer(model, args, train_dataset=examples(), eval_dataset=evaluate, callbacks=list(callbacks))


def tuner_of(model, folder=None, **options):
    return ContinualTuner(model, InstructionRouter(threshold=0.5), folder, kappa=0.01, **options)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Kill(transformers.TrainerCallback):
    def on_step_end(self, _args, state, *_, **__):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_another_adapter_is_not_trained_in_the_name_of_a_group():
    model = adapted()
    model.add_adapter("other", lora())
    tuner = tuner_of(model)
    model.set_adapter("other")
    with pytest.raises(UsageError, match=r"other.* is trained and belongs to no group"):
        tuner.begin([ADD])
    model.set_adapter("default")
    tuner.begin([ADD])
    model.set_adapter("other")
    with pytest.raises(UsageError, match="belongs to no group"):
        tuner.end()
    model.set_adapter("default")
    tuner.end()


def test_an_adapter_that_was_taken_out_is_named():
    tuner = tuner_of(adapted())
    tuner.model.unload()
    with pytest.raises(UsageError, match=r"lora_A.* is gone from the tuner's model"):
        tuner.begin([ADD])


def test_a_trainer_of_another_model_is_refused(tmp_path):
    tuner = tuner_of(adapted())
    with tuner.task([ADD]), pytest.raises(UsageError, match="give the tuner the model that is trained"):
        trainer(adapted(), tmp_path, LCIACallback(tuner)).train()


def test_an_adapter_that_trl_puts_in_after_the_tuner_was_made_is_refused(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    model = base()
    tuner = tuner_of(model)
    args = trl.SFTConfig(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True)
    tuner.begin([ADD])
    with pytest.raises(UsageError, match=r"lora_A.* belongs to no group"):
        trl.SFTTrainer(
            model, args, train_dataset=datasets.Dataset.from_list([{"input_ids": [3, 4, 5]}] * 8), peft_config=lora(),
            processing_class=transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>"),
            callbacks=[LCIACallback(tuner)],
        ).train()  # fmt: skip


def test_a_new_group_starts_from_the_task_before_also_when_another_group_was_used_between(tmp_path):
    tuner = tuner_of(adapted(), tmp_path)
    for at, text in enumerate((ADD, REVERSE)):
        tuner.fit([text], lambda model, at=at: trainer(model, tmp_path / f"t{at}", LCIACallback(tuner)).train())
    before = weights(tuner.model)
    tuner.use(1)
    assert not same(weights(tuner.model), before)
    tuner.begin(["Translate into French"])
    assert same(weights(tuner.model), before)
    resumed = tuner_of(adapted(seed=3), tmp_path)
    resumed.use(1)
    resumed.begin(["Translate into French"])
    assert same(weights(resumed.model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tuner_killed_in_the_middle_of_a_task_goes_on_exactly(tmp_path, dtype):
    saved = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}

    def task(tuner, folder, at, text, *more, resume=None):
        made = trainer(tuner.model, folder / f"run{at}", LCIACallback(tuner), *more, **saved)
        with tuner.task([text]):
            made.train(resume_from_checkpoint=resume)

    whole = tuner_of(adapted(dtype=dtype), tmp_path / "a")
    for at, text in enumerate((ADD, SUM, REVERSE)):
        task(whole, tmp_path / "a", at, text)
    parts = tuner_of(adapted(dtype=dtype), tmp_path / "b")
    for at, text in enumerate((ADD, SUM, REVERSE)):  # a joined group, and new ones
        with pytest.raises(KeyboardInterrupt):
            task(parts, tmp_path / "b", at, text, Kill())
        parts = tuner_of(adapted(seed=at + 1, dtype=dtype), tmp_path / "b")  # another process
        task(parts, tmp_path / "b", at, text, resume=True)
    assert parts.router.groups == whole.router.groups
    for group in (1, 2):
        whole.use(group)
        parts.use(group)
        assert same(weights(whole.model), weights(parts.model))


def test_an_average_of_a_finished_run_reaches_parameters_that_were_replaced_by_loading_them(tmp_path):
    class KillAtTheEnd(transformers.TrainerCallback):
        def on_train_end(self, *_, **__):
            raise KeyboardInterrupt

    def tuner(seed):
        return tuner_of(adapted(seed).to(torch.bfloat16), tmp_path / "groups")  # loaded as float32

    def task(tuner, *more, resume=None):
        with tuner.task([SUM]):
            made = trainer(
                tuner.model, tmp_path / "run", LCIACallback(tuner), *more, save_strategy="steps", save_steps=2
            )
            made.train(resume_from_checkpoint=resume)

    first = tuner(0)
    first.fit([ADD], lambda model: trainer(model, tmp_path / "first", LCIACallback(first)).train())
    with pytest.raises(KeyboardInterrupt):
        task(first, KillAtTheEnd())
    again = tuner(1)
    task(again, resume=True)
    average = torch.load(tmp_path / "run" / "checkpoint-4" / "lcia.pt")["tensors"]
    again.use(1)
    assert all(torch.equal(p, average[name]["average"]) for name, p in weights(again.model).items())


@pytest.mark.parametrize("text", [REVERSE, SUM])
def test_a_checkpoint_of_the_task_before_is_not_resumed(tmp_path, text):
    tuner, saved = tuner_of(adapted()), {"save_strategy": "steps", "save_steps": 2}
    tuner.fit([ADD], lambda model: trainer(model, tmp_path, LCIACallback(tuner), **saved).train())
    tuner.begin([text])
    with pytest.raises(UsageError, match="of another task"):
        trainer(tuner.model, tmp_path, LCIACallback(tuner), **saved).train(resume_from_checkpoint=True)


def test_the_average_of_another_run_is_not_taken_for_that_of_the_checkpoint(tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2}
    for name, lr in (("here", 1e-2), ("there", 2e-2)):
        trainer(adapted(), tmp_path / name, LCIACallback(kappa=0.01), learning_rate=lr, **saved).train()
    other = str(tmp_path / "there" / "checkpoint-2")
    with pytest.raises(UsageError, match="not of the weights that training resumes from"):
        trainer(adapted(), tmp_path / "here", LCIACallback(kappa=0.01), **saved).train(resume_from_checkpoint=other)
    lcia = LCIACallback(kappa=0.01)
    made = trainer(adapted(), tmp_path / "here", lcia, resume_from_checkpoint=other, **saved)
    made.train(resume_from_checkpoint=other)
    assert lcia.ema.step_count == 4


def test_two_averages_in_one_trainer_are_refused(tmp_path):
    with pytest.raises(UsageError, match="LCIACallback twice"):
        trainer(adapted(), tmp_path, LCIACallback(kappa=0.01), LCIACallback(kappa=0.1)).train()
    made = trainer(adapted(), tmp_path, LCIACallback(kappa=0.01))
    made.train()
    made.train()  # one callback may serve again


def test_several_evaluation_sets_are_refused_where_the_average_is_evaluated(tmp_path):
    options = {"evaluate": {"a": examples(1), "b": examples(2)}, "eval_strategy": "steps", "eval_steps": 2}
    with pytest.raises(UsageError, match="eval_dataset holds several"):
        trainer(adapted(), tmp_path, LCIACallback(kappa=0.01, swap_on_evaluate=True), **options).train()
    trainer(adapted(), tmp_path, LCIACallback(kappa=0.01), **options).train()
    single = {**options, "evaluate": examples(1)}
    made = trainer(adapted(), tmp_path, LCIACallback(kappa=0.01, swap_on_evaluate=True), **single)
    made.train()
    made.evaluate()


def test_after_an_evaluation_that_failed_the_callback_serves_again(tmp_path):
    lcia = LCIACallback(kappa=0.01, swap_on_evaluate=True)
    options = {"evaluate": [{"input_ids": [40], "labels": [40]}], "eval_strategy": "steps", "eval_steps": 2}
    with pytest.raises(IndexError):
        trainer(adapted(), tmp_path, lcia, **options).train()
    trainer(adapted(), tmp_path, lcia, **{**options, "evaluate": examples(1)}).train()
    assert lcia.ema.step_count == 4


def test_a_meter_does_not_change_the_training_that_it_watches(tmp_path):
    found = []
    for watched in (False, True):
        model = base(dropout=0.2)
        held = torch.utils.data.DataLoader(examples(3), batch_size=4, shuffle=True)
        callbacks = [ForgettingCallback(ForgettingMeter({"a": held}), "a", show=None)] if watched else []
        made = trainer(model, tmp_path, *callbacks)
        made.train()
        found.append(weights(model))
    assert same(*found)


def test_a_set_that_can_be_read_once_is_refused_for_any_score():
    with pytest.raises(UsageError, match="can be read after every task"):
        ForgettingMeter({"a": (row for row in examples())}, score=lambda *_: 1.0)
    assert ForgettingMeter({"a": 3}, score=lambda *_: 1.0).empty


def test_a_stream_without_length_is_scored_again_and_rows_are_named(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(examples(2))

    meter, model = ForgettingMeter({"a": torch.utils.data.DataLoader(Stream(), batch_size=4)}), base()
    assert meter.start(model) == meter.record(model, "a")
    with pytest.raises(UsageError, match=r"held_out 'a': input_ids of a batch must be \(B, T\), got \(6,\)"):
        ForgettingMeter({"a": examples()}).start(model)


def test_checkpoints_before_this_version_are_still_read(tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2}
    trainer(adapted(), tmp_path, LCIACallback(kappa=0.01), **saved).train()
    file = Path(tmp_path, "checkpoint-2", "lcia.pt")
    state = torch.load(file)
    torch.save({key: value for key, value in state.items() if key not in ("live", "task")}, file)
    shutil.rmtree(tmp_path / "checkpoint-4")
    lcia = LCIACallback(kappa=0.01)
    trainer(adapted(), tmp_path, lcia, **saved).train(resume_from_checkpoint=True)
    assert lcia.ema.step_count == 4
