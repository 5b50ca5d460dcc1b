import copy
import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.lab.models import build_model
from weightsmith.quantize import (
    Grid,
    LearningOptions,
    adaquant_,
    adaround_,
    flexround_,
    quantized_weights,
    round_to_nearest_,
)

LEARN = [flexround_, adaround_, adaquant_]
W3 = Grid(3, search="minmax")
LAST = LearningOptions(keep_best=False)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(rows):
    """Inputs of rank 3: independent ones would leave nothing to gain over round-to-nearest in the first layer."""
    return draw(rows, 3) @ draw(3, 8, seed=1)


def tokens(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(17, (length,), generator=generator) for length in lengths]


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def vit():
    torch.manual_seed(0)
    return build_model("vit_tiny", channels=1, size=8, classes=10)


def llama(**options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 17,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 32,
            "tie_word_embeddings": True,
            **options,
        }
    )
    return transformers.LlamaForCausalLM(config)


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@given(
    seed=st.integers(0, 20),
    bits=st.integers(2, 4),
    lr=st.sampled_from([1e-3, 3e-2, 0.3]),
    verb=st.sampled_from(LEARN),
    granularity=st.sampled_from(["channel", "tensor", 4]),
)
@settings(max_examples=15, deadline=None)
@pytest.mark.filterwarnings("ignore::weightsmith.core.errors.WeightsmithWarning")
def test_what_is_kept_is_never_worse_than_round_to_nearest(seed, bits, lr, verb, granularity):
    report = verb(
        mlp(),
        draw(24, 8, seed=seed),
        Grid(bits, granularity=granularity),
        blocks="layers",
        iterations=12,
        lr=lr,
        batch_size=8,
    )
    assert all(block.error <= block.error_rtn for block in report.blocks)


@pytest.mark.parametrize("verb", LEARN)
@pytest.mark.parametrize("blocks", ["layers", "whole", ["0", "2"]])
def test_learning_beats_round_to_nearest_and_leaves_plain_weights_on_their_grid(verb, blocks):
    model, x = mlp().train(), correlated(64)
    keys, trained = list(model.state_dict()), copy.deepcopy(model)
    model[0].bias.requires_grad_(False)
    rng = torch.get_rng_state()
    report = verb(model, x, W3, blocks=blocks, iterations=150, lr=1e-2)
    assert torch.equal(torch.get_rng_state(), rng)
    assert list(model.state_dict()) == keys
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, False, True, True, True, True]
    assert torch.equal(model[0].bias, trained[0].bias)
    for block in report.blocks:
        assert block.error < 0.9 * block.error_rtn
    for name, quantized in quantized_weights(model).items():
        assert torch.equal(model.get_parameter(name), quantized.dequantize())
        assert len(quantized.codes.unique()) <= 8
    moved = {layer.name: layer.moved for layer in report.layers}
    assert moved.keys() == quantized_weights(model).keys()
    assert any(moved.values())


def test_the_student_sees_what_the_quantized_blocks_before_it_give():
    x = draw(64, 8)
    model, trained = mlp(), mlp()
    report = round_to_nearest_(model, x, W3, blocks="layers")
    with torch.no_grad():
        for index, block in zip((0, 2, 4), report.blocks, strict=True):
            got, wanted = model[: index + 1](x), trained[: index + 1](x)
            assert block.error == pytest.approx(
                ((got - wanted).square().sum() / wanted.square().sum()).item(), rel=1e-4
            )


@pytest.mark.parametrize("verb", LEARN)
def test_the_same_seed_gives_the_same_weights_and_another_one_others(verb):
    finals = []
    for seed in (0, 0, 1):
        model = mlp()
        verb(
            model,
            draw(64, 8),
            W3,
            blocks="layers",
            batch_size=8,
            iterations=40,
            lr=1e-2,
            seed=seed,
            options=LAST,
        )
        finals.append(state(model))
    assert same(finals[0], finals[1])
    assert not same(finals[0], finals[2])


def test_a_run_resumes_after_any_block():
    x, finished = draw(64, 8), {}
    options = {"blocks": "layers", "iterations": 30, "lr": 1e-2, "batch_size": 8}
    whole = mlp()
    report = flexround_(whole, x, W3, **options, on_block=lambda name, found, block: finished.update({name: found}))
    assert list(finished) == ["0", "2", "4"]
    resumed = mlp()
    again = flexround_(resumed, x, W3, **options, done={name: finished[name] for name in ("0", "2")})
    assert same(state(whole), state(resumed))
    assert [block.kept for block in again.blocks][:2] == ["done", "done"]
    assert [block.error for block in again.blocks] == pytest.approx([block.error for block in report.blocks])
    with pytest.raises(UsageError, match="block in done '1' is not known"):
        flexround_(mlp(), x, W3, **options, done={"1": {}})
    with pytest.raises(UsageError, match=r"done holds no 0\.weight"):
        flexround_(mlp(), x, W3, **options, done={"0": {}})


def test_a_run_that_is_cut_off_leaves_whole_blocks_and_all_flags():
    def stop(name, found, block):
        raise KeyboardInterrupt

    model, trained = mlp().train(), mlp()
    with pytest.raises(KeyboardInterrupt):
        flexround_(model, draw(64, 8), W3, blocks="layers", iterations=5, on_block=stop)
    assert list(quantized_weights(model)) == ["0.weight"]
    assert torch.equal(model[2].weight, trained[2].weight)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(draw(2, 8)), model(draw(2, 8)))


def test_measuring_on_fewer_batches_changes_neither_the_steps_nor_what_they_give():
    x, calls, finals = correlated(96), {}, {}
    for measured in (None, 8, 1):
        model = finals[measured] = mlp()
        hook = model[4].register_forward_hook(lambda *_, key=measured: calls.update({key: calls.get(key, 0) + 1}))
        options = {"blocks": "layers", "batch_size": 4, "iterations": 40, "lr": 1e-2}
        report = flexround_(
            model, x, W3, **options, options=LearningOptions(keep_best=False, measured_batches=measured)
        )
        hook.remove()
        if measured is None:
            wanted, got = mlp()(x), model(x)
            exact = ((got - wanted).square().sum() / wanted.square().sum()).item()
            assert report.blocks[-1].error == pytest.approx(exact, rel=1e-4)
        else:
            assert report.blocks[-1].error == pytest.approx(exact, rel=0.5)
    assert same(state(finals[None]), state(finals[8]))
    assert same(state(finals[None]), state(finals[1]))
    # round-to-nearest and the last iterate are measured
    assert calls[None] - calls[8] == 2 * (24 - 8)
    assert calls[None] - calls[1] == 2 * (24 - 1)


def test_options_reach_the_optimization():
    x = correlated(64)
    for options in (
        {"lr": "auto"},
        {"options": LearningOptions(loss_reduction="mean")},
        {"options": LearningOptions(input_drop=0.5)},
        {"options": LearningOptions(last_block="logits")},
        {"options": LearningOptions(autocast=torch.bfloat16)},
        {"device": "cpu"},
        {"safe": True},
        {"parametrization": "direct"},
        {"learn_s1": False, "use_s3": False},
    ):
        report = flexround_(mlp(), x, W3, blocks="layers", **{"iterations": 60, "lr": 1e-2, **options})
        assert report.blocks[0].error < report.blocks[0].error_rtn, options


def test_first_and_last_layers_can_have_another_grid():
    model = mlp()
    flexround_(model, draw(32, 8), Grid(2), blocks="layers", iterations=3, overrides={"0": Grid(8), "4": Grid(8)})
    assert [found.bits for found in quantized_weights(model).values()] == [8, 2, 8]
    with pytest.raises(UsageError, match="glob in overrides 'head' is not known"):
        flexround_(mlp(), draw(32, 8), blocks="layers", overrides={"head": Grid(8)})


def test_low_rank_factors_where_they_save_and_full_ones_elsewhere():
    report = flexround_(mlp(), correlated(64), W3, blocks="layers", iterations=60, lr=1e-2, lrq=2)
    assert report.method == "lrq"
    assert report.blocks[0].error < report.blocks[0].error_rtn
    with pytest.warns(WeightsmithWarning, match="lrq=4 saves nothing for 4:"):
        flexround_(mlp(), draw(64, 8), W3, blocks="layers", iterations=2, lrq=4)


# models


def test_a_vit_is_found_block_by_block_and_other_layers_are_left_alone():
    model, trained = vit(), vit()
    report = flexround_(model, draw(32, 1, 8, 8), W3, iterations=30, lr=3e-3)
    assert [block.name for block in report.blocks] == [f"blocks.{index}" for index in range(len(model.blocks))]
    assert report.blocks[-1].error < report.blocks[-1].error_rtn
    assert torch.equal(model.head.weight, trained.head.weight)
    assert all(name.startswith("blocks.") for name in quantized_weights(model))


def test_layers_named_outside_of_the_blocks_are_reconstructed_on_their_own():
    model = vit()
    report = flexround_(model, draw(8, 1, 8, 8), W3, iterations=1, where=["blocks.0.*", "head"])
    assert [block.name for block in report.blocks] == ["blocks.0", "head"]


@pytest.mark.parametrize("verb", [*LEARN, round_to_nearest_])
def test_a_causal_language_model_takes_sequences_of_any_length(verb):
    model, trained = llama(), llama()
    options = {} if verb is round_to_nearest_ else {"iterations": 40, "lr": 1e-2}
    report = verb(model, tokens(7, 8, 5, 8, 8, 3), W3, **options)
    assert [block.name for block in report.blocks] == ["model.layers.0", "model.layers.1"]
    assert model.config.use_cache
    assert torch.equal(model.lm_head.weight, trained.lm_head.weight)
    assert all(block.error <= block.error_rtn < 0.1 for block in report.blocks)
    assert report.bytes_after < report.bytes_before / 2


def test_no_logits_are_computed_but_for_a_short_trace():
    model, seen = llama(), []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    flexround_(model, tokens(24, 24, 24, 24), W3, iterations=2)
    assert max(seen) == 8  # for a real vocabulary the logits of a batch outweigh everything else


def test_a_model_of_ones_own_may_have_a_config_and_sequences_of_one_length():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = {"length": 24}
            self.position = nn.Parameter(draw(24, 16))
            self.token = nn.Embedding(17, 16)
            self.layers = mlp()[2:]

        def forward(self, ids):
            return self.layers(self.token(ids) + self.position)

    report = flexround_(Fixed(), tokens(24, 24), W3, blocks="layers", iterations=2)
    assert [block.name for block in report.blocks] == ["layers.2", "layers.4"]


def test_padding_does_not_count():
    """Rows and columns of padding neither change the error nor the rounding."""
    ids = tokens(8, 8, 8, 8)
    padded = {
        "input_ids": torch.cat([torch.stack(ids), torch.full((4, 3), 5)], 1),
        "attention_mask": torch.cat([torch.ones(4, 8, dtype=torch.long), torch.zeros(4, 3, dtype=torch.long)], 1),
    }
    plain = round_to_nearest_(llama(), ids, W3)
    masked = round_to_nearest_(llama(), padded, W3)
    assert [b.error for b in masked.blocks] == pytest.approx([b.error for b in plain.blocks], rel=1e-4)


def test_a_half_precision_model_is_optimized_in_float32_and_stays_half():
    model = llama().bfloat16()
    before = state(model)
    report = flexround_(model, tokens(8, 8, 8, 8), W3, iterations=40, lr=1e-2)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert report.blocks[0].error < report.blocks[0].error_rtn
    found = quantized_weights(model)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == set(found)
    assert all(torch.equal(q.dequantize(torch.bfloat16), model.get_parameter(name)) for name, q in found.items())


def test_an_encoder_and_gpt2_with_its_transposed_weights_work():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=17, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    )
    report = flexround_(gpt2, tokens(8, 8, 6, 8), Grid(3), iterations=40, lr=1e-2)
    assert report.blocks[-1].error < report.blocks[-1].error_rtn
    attention = quantized_weights(gpt2)["transformer.h.0.attn.c_attn.weight"]
    assert attention.axis == 1
    assert attention.scale.shape == (48, 1)
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=17, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
        )
    )
    report = flexround_(bert, tokens(8, 8, 6, 8), Grid(3), iterations=40, lr=1e-2)
    assert [block.name for block in report.blocks] == ["encoder.layer.0", "encoder.layer.1"]
    assert all(block.error < block.error_rtn for block in report.blocks)


def test_convolutions_of_every_kind_are_reconstructed():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ConvTranspose2d(8, 6, 2, groups=2),
        nn.Flatten(),
        nn.Linear(150, 3),
    )
    model(draw(16, 1, 8, 8))
    statistics = model[1].running_mean.clone()
    images = draw(64, 1, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    report = flexround_(model, images, Grid(3, granularity="tensor"), blocks="layers", iterations=60, lr=1e-2)
    assert torch.equal(model[1].running_mean, statistics)
    assert model[1].training
    assert all(block.error < block.error_rtn for block in report.blocks)


class Experts(nn.Module):
    """The last expert is never chosen."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x):
        chosen = (x[:, 0] > 0).long()
        return sum(
            expert(x * (chosen == index)[:, None]) if index < 2 else 0 for index, expert in enumerate(self.experts)
        )


def test_experts_that_see_nothing_are_rounded_to_nearest_and_reported():
    torch.manual_seed(0)
    model = nn.Sequential(Experts(), Experts())
    nearest = copy.deepcopy(model)
    round_to_nearest_(nearest, grid=W3)
    report = flexround_(model, draw(64, 8), W3, iterations=30, lr=1e-2)
    assert report.unseen == ("0.experts.2", "1.experts.2")
    assert torch.equal(model[0].experts[2].weight, nearest[0].experts[2].weight)
    assert not torch.equal(model[0].experts[1].weight, nearest[0].experts[1].weight)


def test_a_layer_used_twice_in_a_block_is_quantized_once():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(self.fc(x).relu())

    report = flexround_(Shared(), draw(64, 8), W3, blocks="whole", iterations=40, lr=1e-2)
    assert len(report.layers) == 1
    assert report.blocks[0].error < report.blocks[0].error_rtn


# bad input: nothing has changed when an error is raised


def refused(model, calibration, message, **options):
    before = state(model)
    with pytest.raises(ValueError, match=message):
        flexround_(model, calibration, **{"iterations": 2, **options})
    assert same(state(model), before)
    assert not quantized_weights(model)
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value):
    model = mlp()
    model[2].weight.data[1, 1] = value
    with pytest.raises(UsageError, match=r"2\.weight holds NaN or infinite values"):
        flexround_(model, draw(8, 8), blocks="layers")
    with pytest.raises(UsageError, match=r"2\.weight holds NaN or infinite values"):
        round_to_nearest_(model)
    assert torch.equal(model[0].weight, mlp()[0].weight)


def test_calibration_that_turns_to_nan_inside_names_the_layer():
    class Overflows(nn.Module):
        def forward(self, x):
            return x * float("inf")

    model = nn.Sequential(nn.Linear(8, 4), Overflows(), nn.Linear(4, 4))
    refused(model, draw(8, 8), "the input of 2 holds NaN or infinity", blocks="layers")
    refused(mlp(), draw(8, 8) / 0, "sample 0 holds NaN", blocks="layers")


def test_one_side_of_a_tie_is_refused_and_skipped_by_default():
    model = llama()
    refused(model, tokens(8, 8), "lm_head.weight is tied to that of model.embed_tokens", where="lm_head")
    flexround_(model, tokens(8, 8), W3, iterations=1, blocks="layers")
    assert "lm_head.weight" not in quantized_weights(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied = llama(tie_word_embeddings=False)
    flexround_(untied, tokens(8, 8), W3, iterations=1)
    assert "lm_head.weight" not in quantized_weights(untied)
    flexround_(untied, tokens(8, 8), W3, iterations=1, where="lm_head")
    assert "lm_head.weight" in quantized_weights(untied)


def test_weights_that_are_computed_or_not_there_yet_are_refused():
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    refused(model, draw(8, 8), r"0\.weight is computed by _WeightNorm: call weightsmith.fold_")
    with pytest.raises(UsageError, match=r"0\.weight has no values yet"):
        flexround_(nn.Sequential(nn.LazyLinear(4)), draw(8, 8))
    with pytest.raises(UsageError, match=r"0\.weight has no values yet"):
        round_to_nearest_(nn.Sequential(nn.Linear(4, 4, device="meta")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": "auto"}, "blocks='auto' finds no"),
        ({"blocks": ["0", "9"]}, "blocks names '9'"),
        ({"where": "nothing"}, "where='nothing' matches nothing"),
        ({"iterations": -1}, "iterations must not be negative, got -1"),
        ({"lr": 0}, "lr must be positive or 'auto', got 0"),
        ({"lr": "fast"}, "got 'fast'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"lrq": 0}, "lrq must be a rank"),
        ({"grid": Grid(granularity=3)}, "0: granularity=3 does not divide the 8 inputs"),
        ({"calibration": draw(1, 8)}, "at least 2 samples, got 1"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    calibration = options.pop("calibration", draw(8, 8))
    refused(mlp(), calibration, message, **{"blocks": "layers", **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measured_batches": 0}, "measured_batches must be at least 1"),
        ({"loss_reduction": "sum"}, "loss_reduction 'sum'"),
        ({"last_block": "loss"}, "last_block 'loss'"),
        ({"input_drop": 0.0}, "input_drop must be above 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        LearningOptions(**options)


def test_help_shows_what_a_run_costs_with_its_defaults():
    shown = {name: parameter.default for name, parameter in inspect.signature(flexround_).parameters.items()}
    assert (shown["iterations"], shown["lr"], shown["seed"]) == (5000, 1e-3, 0)
    assert inspect.signature(adaround_).parameters["iterations"].default == 20_000


def test_a_loss_that_diverges_is_stopped_and_the_best_rounding_restored(monkeypatch):
    from weightsmith.quantize import FlexRound

    soft = FlexRound.soft

    def fails(self, units):
        self.calls = getattr(self, "calls", 0) + 1
        return soft(self, units) * (float("nan") if self.calls > 5 else 1.0)

    monkeypatch.setattr(FlexRound, "soft", fails)
    with pytest.warns(WeightsmithWarning, match="not finite at iteration 6"):
        report = flexround_(mlp(), draw(32, 8), W3, blocks="whole", iterations=20)
    assert report.blocks[0].error == report.blocks[0].error_rtn
    assert report.blocks[0].kept == "rtn"


def test_factors_far_from_one_are_warned_of():
    with pytest.warns(WeightsmithWarning, match="lie beyond exp"):
        flexround_(mlp(), draw(32, 8), W3, blocks="whole", iterations=30, lr=1.0)
