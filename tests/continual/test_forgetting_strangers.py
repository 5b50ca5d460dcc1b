"""The meter in other people's training: TRL, PEFT, several callbacks, kills, and sets that hold nothing."""

import pytest
import torch
from torch import nn

from weightsmith.continual import DynamicEMA, ForgettingMeter, prediction_accuracy
from weightsmith.core.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*pin_memory.*")
TASKS = ("up", "down")


def rows(task, n=16):
    step = 1 if task == "up" else -1
    return [{"input_ids": [(start + step * at) % 24 + 4 for at in range(6)]} for start in range(n)]


def held_out(n=8):
    batches = {}
    for task in TASKS:
        ids = torch.tensor([row["input_ids"] for row in rows(task, n)])
        batches[task] = [{"input_ids": ids, "labels": ids}]
    return batches


def language_model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config)


def lora():
    return pytest.importorskip("peft").LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, **{str(i): i for i in range(2, 32)}}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def sft(model, task, folder, callbacks, steps=4, **options):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    args = trl.SFTConfig(
        str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True,
        bf16=False, disable_tqdm=True, logging_strategy="no", gradient_checkpointing=False,
        **{"save_strategy": "no", **options},
    )  # fmt: skip
    return trl.SFTTrainer(
        model, args, train_dataset=Dataset.from_list(rows(task)), processing_class=tokenizer(), callbacks=callbacks,
        peft_config=None if hasattr(model, "peft_config") else lora(),
    )  # fmt: skip


def test_trl_with_an_adapter_and_the_average_in_either_order(tmp_path):
    pytest.importorskip("trl")
    from weightsmith.integrations.continual import ForgettingCallback, LCIACallback

    found = []
    for reverse in (False, True):
        meter, model = ForgettingMeter(held_out(), path=tmp_path / f"{reverse}.csv"), language_model()
        for task in TASKS:
            callbacks = [LCIACallback(kappa=0.01), ForgettingCallback(meter, task, show=None)]
            made = sft(model, task, tmp_path, callbacks[::-1] if reverse else callbacks)
            made.train()
            model = made.model
            scores = [prediction_accuracy(model, batches) for batches in meter.held_out.values()]
            assert meter.matrix()[-1].tolist() == scores  # of the model that training ended with
        found.append(meter.matrix())
    assert torch.equal(*found)


def test_a_task_that_was_killed_resumes_and_is_recorded_once(tmp_path):
    pytest.importorskip("trl")
    from transformers import TrainerCallback

    from weightsmith.integrations.continual import ForgettingCallback

    class Kill(TrainerCallback):
        def on_step_end(self, _args, state, *_, **__):
            if state.global_step == 3:
                raise KeyboardInterrupt

    file, saved = tmp_path / "f.csv", {"save_strategy": "steps", "save_steps": 2}
    meter = ForgettingMeter(held_out(), path=file)
    with pytest.raises(KeyboardInterrupt):
        sft(language_model(), "up", tmp_path, [ForgettingCallback(meter, "up", show=None), Kill()], **saved).train()
    assert meter.tasks == []
    again = ForgettingMeter(held_out(), path=file)  # another process
    made = sft(language_model(), "up", tmp_path, [ForgettingCallback(again, "up", show=None)], **saved)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.tasks == ["up"]
    assert [name for name, _ in ForgettingMeter(held_out(), path=file).report().rows] == ["(before)", "up"]


def test_two_meters_in_one_trainer_see_the_same(tmp_path):
    pytest.importorskip("trl")
    from weightsmith.integrations.continual import ForgettingCallback

    meters = [ForgettingMeter(held_out()), ForgettingMeter(held_out(), lambda *_: 1.0)]
    sft(language_model(), "up", tmp_path, [ForgettingCallback(meter, "up", show=None) for meter in meters]).train()
    assert [len(meter.report().rows) for meter in meters] == [2, 2]
    assert meters[1].matrix().tolist() == [[1.0, 1.0]]


def test_a_plain_loop_with_one_task(tmp_path):
    model, meter = language_model(), ForgettingMeter({"up": held_out()["up"]}, path=tmp_path / "f.csv")
    ids = torch.tensor([row["input_ids"] for row in rows("up")])
    optimizer, before = torch.optim.AdamW(model.parameters(), lr=1e-2), meter.start(model)["up"]
    for _ in range(20):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert meter.record(model, "up")["up"] > before
    report = meter.report()
    assert "final" in str(report)
    assert "forgetting" not in str(report)  # there is nothing to forget yet
    meter.plot(tmp_path / "f.svg")


def test_a_causal_model_is_known_under_wrappers():
    model, batches = language_model().eval(), held_out()["up"]
    expected = prediction_accuracy(model, batches, shift=True)
    assert prediction_accuracy(nn.DataParallel(model, device_ids=[]), batches) == expected
    assert prediction_accuracy(torch.compile(model, backend="eager"), batches) == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "held_out 'a' is empty"),
        (iter([1]), "can be read after every task"),
        (3, "such as a list or a DataLoader, got int"),
    ],
)
def test_a_set_that_cannot_be_measured_is_refused_before_training(data, message):
    with pytest.raises(UsageError, match=message):
        ForgettingMeter({"a": data})


def test_rows_instead_of_batches_are_named_with_their_set():
    meter = ForgettingMeter({"up": [{"input_ids": [1, 2], "labels": [1, 2]}]})
    with pytest.raises(UsageError, match=r"held_out 'up': labels of a batch must be a tensor, got list: give batches"):
        meter.start(language_model())
    assert meter.empty


def test_attached_to_an_optimizer_of_accelerate_accumulation_is_one_step():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Linear(3, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    ema = DynamicEMA(model, kappa=0.01)
    ema.attach(optimizer)
    for _ in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.randn(4, 3)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    assert ema.step_count == 3


def test_within_a_tuners_task_its_average_is_measured(tmp_path):
    pytest.importorskip("trl")
    from weightsmith.continual import ContinualTuner
    from weightsmith.integrations.continual import ForgettingCallback, LCIACallback

    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(language_model(), lora())
    tuner, meter = ContinualTuner(model, kappa=0.01), ForgettingMeter(held_out())
    for task, text in zip(TASKS, ("Count with numbers", "Count with these numbers"), strict=True):
        with tuner.task([text]):
            callbacks = [LCIACallback(tuner), ForgettingCallback(meter, task, show=None)]
            sft(model, task, tmp_path, callbacks).train()
        assert meter.matrix()[-1].tolist() == [prediction_accuracy(model, held) for held in held_out().values()]
    assert len(tuner.router.groups) == 1


def test_an_encoder_decoder_is_scored_from_its_labels():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model, ids = transformers.T5ForConditionalGeneration(config).eval(), torch.randint(2, 30, (4, 6))
    with torch.no_grad():
        right = (model(input_ids=ids, labels=ids).logits.argmax(-1) == ids).double().mean().item()
    assert prediction_accuracy(model, [{"input_ids": ids, "labels": ids}]) == pytest.approx(100 * right)


def test_a_pair_whose_labels_are_no_tensor_is_refused():
    with pytest.raises(UsageError, match="labels of a batch must be a tensor, got list"):
        prediction_accuracy(nn.Linear(4, 2), [(torch.randn(2, 4), [0, 1])])


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
def test_virtual_tokens_of_a_prompt_are_not_scored(kind):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        language_model(), getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ).eval()
    (batch,) = held_out()["up"]
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits[:, -batch["labels"].shape[1] :]
    right = (logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]).double().mean().item()
    assert prediction_accuracy(model, [batch]) == pytest.approx(100 * right)
    assert prediction_accuracy(nn.DataParallel(model, device_ids=[]), [batch]) == pytest.approx(100 * right)


def test_a_prompt_of_an_encoder_decoder_is_not_scored():
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    prompt = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(transformers.T5ForConditionalGeneration(config), prompt).eval()
    ids = torch.randint(2, 30, (4, 6))
    with torch.no_grad():
        logits = model(input_ids=ids, labels=ids).logits[:, -6:]
    right = (logits.argmax(-1) == ids).double().mean().item()
    assert prediction_accuracy(model, [{"input_ids": ids, "labels": ids}]) == pytest.approx(100 * right)
