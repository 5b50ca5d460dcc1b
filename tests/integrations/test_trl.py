"""Token rules and reward weights inside real runs of TRL's GRPO trainer, on a model of a few thousand weights."""

import warnings
from collections import defaultdict

import pytest
import torch

trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from weightsmith.core.errors import UsageError, WeightsmithWarning  # noqa: E402
from weightsmith.integrations._trl_rewards import middle_blocks, trl_advantages  # noqa: E402
from weightsmith.integrations.trl import HOOKS, STATE, Reweighting, check_trl  # noqa: E402
from weightsmith.reweight import (  # noqa: E402
    ClipCov,
    ClipHigher,
    EntropyAdvantage,
    EntropyBonus,
    FixedWeights,
    ForkTokens,
    GradientWeights,
    HypervolumeWeights,
    KLCov,
    Steer,
    WReinforce,
    entropy_change,
    policy_loss,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*pin_memory.*"),
]


class Trainer(Reweighting, trl.GRPOTrainer):
    """The mixin in front of TRL's trainer."""


def tokenizer():
    words = {word: index for index, word in enumerate(["<pad>", "<eos>", *[f"w{i}" for i in range(22)]])}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def network():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=24, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=1, eos_token_id=1, pad_token_id=0,
        tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def even(completion_ids, **_):
    return [float(sum(i % 2 == 0 for i in ids)) for ids in completion_ids]


def short(completion_ids, **_):
    return [-float(len(ids)) for ids in completion_ids]


def right(completion_ids, **_):
    return [float(ids[0] % 2) for ids in completion_ids]


def trainer(folder, functions=(even,), model=None, peft_config=None, make=Trainer, eval_rows=None, **options):
    own = {name: options.pop(name) for name in (
        "token_weighting", "reward_weighting", "scope", "max_grad_norm_of_influence", "influence_where", "point"
    ) if name in options}  # fmt: skip
    if "max_grad_norm_of_influence" in own:
        own["max_grad_norm"] = own.pop("max_grad_norm_of_influence")
    defaults = {
        "output_dir": str(folder), "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 6,
        "max_steps": 2, "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "logging_steps": 1, "seed": 3,
        "save_strategy": "no", "loss_type": "dapo", "lr_scheduler_type": "constant", "disable_tqdm": True,
        "bf16": False, "gradient_checkpointing": False, "max_grad_norm": 1e9, "optim": "sgd",
    }  # fmt: skip
    prompts = [{"prompt": f"w{i} w{i + 1}"} for i in range(16)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(
            model=model or network(), reward_funcs=list(functions), args=trl.GRPOConfig(**defaults | options),
            train_dataset=Dataset.from_list(prompts), processing_class=tokenizer(), peft_config=peft_config,
            eval_dataset=Dataset.from_list(prompts[:eval_rows]) if eval_rows else None, **own,
        )  # fmt: skip


def weights(made):
    return torch.cat([p.detach().flatten() for p in made.model.parameters()])


def logged(made, name):
    return [row[name] for row in made.state.log_history if name in row]


def test_what_the_mixin_stands_on_is_in_the_installed_trl():
    check_trl()
    assert set(HOOKS) <= set(dir(trl.GRPOTrainer))


def test_a_trl_that_has_moved_is_named_with_its_version():
    class Moved(trl.GRPOTrainer):
        def _compute_loss(self, model, batch):
            return super()._compute_loss(model, batch)

    with pytest.raises(
        UsageError, match=rf"TRL {trl.__version__} has moved: Moved _compute_loss has no argument inputs"
    ):
        check_trl(Moved)


def test_attributes_that_the_mixin_reads_are_there(tmp_path):
    made = trainer(tmp_path)
    for name in (
        "_buffered_inputs", "_step", "_metrics", "epsilon_low", "epsilon_high",
        "loss_type", "num_iterations", "temperature", "max_completion_length", "reward_weights", "reward_func_names",
        "scale_rewards", "multi_objective_aggregation", "num_generations",
    ):  # fmt: skip
        assert hasattr(made, name), f"TRL {trl.__version__} no longer has {name}"


def test_weights_and_loss_are_those_of_the_reference_over_a_real_run(tmp_path):
    seen = []

    class Watching(Trainer):
        def _compute_loss(self, model, inputs):
            found = super()._compute_loss(model, inputs)
            score = super(Reweighting, self)._get_per_token_logps_and_entropies
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
            logps, entropies, _ = score(model, ids, attention, inputs["completion_ids"].shape[1], compute_entropy=True)
            expected = policy_loss(
                logps, inputs["advantages"], inputs["completion_mask"], old_logp=inputs["old_per_token_logps"],
                rule=Steer(lambda_min=0.5), entropy=entropies, old_entropy=inputs["weightsmith_old_entropy"],
                clip=(0.2, 0.28), dual_clip=None,
            )  # fmt: skip
            seen.append((found.detach(), expected.loss.detach(), expected.weights, inputs["advantages"].dim()))
            return found

    made = trainer(
        tmp_path, make=Watching, token_weighting=Steer(lambda_min=0.5), loss_type="bnpo", epsilon=0.2,
        epsilon_high=0.28, num_iterations=2, steps_per_generation=2, gradient_accumulation_steps=1, max_steps=8,
    )  # fmt: skip
    made.train()
    assert len(seen) == 8
    for found, expected, factors, dimensions in seen:
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-7)
        assert dimensions == 1, "the buffered batch must stay as it was"
        assert factors.max() > factors[factors > 0].min()
    assert logged(made, "steer/weight_min")[0] < 1


RULES = {
    "steer": lambda: Steer(),
    "steer exact": lambda: Steer("exact"),
    "steer asymmetric": lambda: Steer("theorem", mode="asymmetric", lambda_min=0.3, lambda_max=1.0),
    "fork tokens": lambda: ForkTokens(0.4),
    "clip cov": lambda: ClipCov(0.1, low=0.0, high=50.0),
    "kl cov": lambda: KLCov(0.2),
    "entropy advantage": lambda: EntropyAdvantage(),
    "entropy bonus": lambda: EntropyBonus(0.1),
    "clip higher": lambda: ClipHigher(0.1, 0.4),
    "w-reinforce": lambda: WReinforce(0.1, threshold=2.5),
}


@pytest.mark.parametrize("rule", RULES)
def test_gradient_accumulation_does_not_change_the_result(rule, tmp_path):
    ends = []
    for size, steps in ((8, 1), (4, 2), (2, 4)):
        made = trainer(
            tmp_path, token_weighting=RULES[rule](), per_device_train_batch_size=size,
            gradient_accumulation_steps=steps, steps_per_generation=2 * steps, max_steps=4, num_generations=2,
        )  # fmt: skip
        made.train()
        ends.append(weights(made))
    start = weights(trainer(tmp_path))
    assert (ends[0] - start).abs().max() > 1e-4
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=2e-5)


def test_per_micro_batch_accumulation_does_change_the_result(tmp_path):
    ends = []
    for size, steps in ((8, 1), (2, 4)):
        made = trainer(
            tmp_path, token_weighting=Steer(lambda_min=0.1), scope="micro_batch", per_device_train_batch_size=size,
            gradient_accumulation_steps=steps, num_generations=2, learning_rate=0.1,
        )  # fmt: skip
        made.train()
        ends.append(weights(made))
    assert (ends[0] - ends[1]).abs().max() > 1e-4


def test_a_rule_never_sees_tokens_of_the_next_optimizer_step(tmp_path):
    rows, extras = [], []

    class Watching(EntropyBonus):
        def __call__(self, tokens):
            rows.append(len(tokens.mask))
            return super().__call__(tokens)

    made = trainer(
        tmp_path, token_weighting=Watching(0.5), per_device_train_batch_size=2, num_generations=2, max_steps=3,
        gradient_accumulation_steps=2, steps_per_generation=3,
    )  # fmt: skip
    plan, extra_loss = made._plan, made._plan.extra_loss

    def extra(inputs):
        found, mask = extra_loss(inputs), inputs["completion_mask"]
        extras.append((found.detach(), (plan.entropy * mask).sum().detach() / mask.sum()))
        return found

    plan.extra_loss = extra
    made.train()
    assert rows == [4, 2, 2, 4]  # the second step's two micro-batches are of two generations
    for found, mean in extras[2:4]:
        torch.testing.assert_close(found, -0.5 * mean / 2)


def test_a_rule_that_changes_nothing_leaves_the_run_as_it_is(tmp_path):
    ends = []
    for options in ({}, {"token_weighting": Steer(lambda_min=1.0)}, {"token_weighting": ClipHigher(0.2, 0.2)}):
        made = trainer(tmp_path, **options)
        made.train()
        ends.append(weights(made))
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-7)
    assert torch.equal(ends[2], ends[0])


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo"])
def test_every_loss_that_is_linear_in_the_advantage_works(loss_type, tmp_path):
    made = trainer(tmp_path, token_weighting=Steer(), loss_type=loss_type, max_steps=1)
    made.train()
    assert weights(made).isfinite().all()


def test_half_of_the_tokens_without_weight_get_no_gradient(tmp_path):
    sums = defaultdict(list)

    class Watching(Trainer):
        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            sums["count"].append(int(inputs["completion_mask"].sum()))
            return loss

    made = trainer(tmp_path, make=Watching, token_weighting=ForkTokens(0.25), max_steps=1)
    made.train()
    (kept,) = logged(made, "fork_tokens/kept")
    assert kept == pytest.approx(0.25, abs=1 / sums["count"][0])


def test_adapters_are_trained_with_weighted_tokens_and_rewards(tmp_path):
    made = trainer(
        tmp_path, (even, short), token_weighting=Steer("exact"), reward_weighting=GradientWeights(2, step_size=5.0),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), beta=0.1, optim="adamw_torch",
        steps_per_generation=2, gradient_accumulation_steps=1, max_steps=4,
    )  # fmt: skip
    made.train()
    moved = torch.tensor(logged(made, "reward_weights/even"))
    assert len(moved.unique()) > 1
    assert all(p.grad is None for p in made.model.parameters() if not p.requires_grad)


def test_gradient_weights_move_and_leave_no_gradient_behind(tmp_path):
    made = trainer(tmp_path, (even, short), reward_weighting=GradientWeights(2, step_size=5.0), max_steps=3)
    made.train()
    found = torch.tensor([logged(made, f"reward_weights/{name}") for name in ("even", "short")])
    torch.testing.assert_close(found.sum(0), torch.ones(3), rtol=0, atol=1e-6)
    assert not torch.allclose(found[:, 0], found[:, 2])
    torch.testing.assert_close(made.reward_weights.double(), made.reward_weighting.weights, rtol=0, atol=1e-6)


def test_a_warm_up_does_not_enlarge_the_steps_of_gradient_weights(tmp_path):
    made = trainer(
        tmp_path, (even, short), reward_weighting=GradientWeights(2, step_size=5.0), max_steps=2,
        lr_scheduler_type="constant_with_warmup", warmup_steps=10,
    )  # fmt: skip
    made.train()
    influence = torch.tensor([logged(made, f"reward_influence/{name}")[1] for name in ("even", "short")])
    moved = torch.tensor([logged(made, f"reward_weights/{name}")[1] for name in ("even", "short")]).log().diff()
    torch.testing.assert_close(moved, 5 * 0.1 * influence.diff(), rtol=1e-3, atol=1e-5)  # a tenth of the rate so far


def test_fixed_gradient_weights_are_trls_own_weights(tmp_path):
    ends = []
    weightings = GradientWeights(2, weights=[0.3, 0.7], step_size=0), FixedWeights([0.3, 0.7])
    for options in ({"reward_weights": [0.3, 0.7]}, *({"reward_weighting": weighting} for weighting in weightings)):
        made = trainer(tmp_path, (even, short), **options)
        made.train()
        ends.append(weights(made))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_computed_as_trl_does(scale, tmp_path):
    found = []

    class Watching(Trainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            found.append((output["advantages"], trl_advantages(self, self._raw_scores, self.reward_weights)))
            return output

    def sometimes(completion_ids, **_):
        return [None if ids[0] % 3 == 0 else float(ids[-1]) for ids in completion_ids]

    weighting = FixedWeights([0.3, 0.7])
    trainer(tmp_path, (even, sometimes), make=Watching, scale_rewards=scale, reward_weighting=weighting).train()
    for theirs, ours in found:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_the_only_rewarded_sample_of_a_group_has_no_advantage_as_in_trl(scale, tmp_path):
    made = trainer(tmp_path, scale_rewards=scale)
    scores = torch.full((8, 1), torch.nan)
    scores[1], scores[4], scores[6] = 5.0, 1.0, 2.0  # one in the first group, two in the second
    found = trl_advantages(made, scores, torch.ones(1))
    assert torch.equal(found[:4], torch.zeros(4))
    assert found[4] == -found[6] < 0


@pytest.mark.parametrize("size", [8, 4, 2])
def test_influence_does_not_depend_on_the_micro_batch(size, tmp_path):
    made = trainer(
        tmp_path, (even, short), reward_weighting=GradientWeights(2), per_device_train_batch_size=size,
        gradient_accumulation_steps=8 // size, num_generations=2, max_steps=1,
    )  # fmt: skip
    made.train()
    found = [logged(made, f"reward_influence/{name}")[0] for name in ("even", "short")]
    kept = test_influence_does_not_depend_on_the_micro_batch.__dict__.setdefault("kept", found)
    assert found == pytest.approx(kept, rel=1e-4)


def test_micro_batches_without_advantages_take_no_pass_for_the_influence(tmp_path):
    passes = []

    class Counting(Trainer):
        def _weigh_rewards(self, weighting, output):
            passes.clear()
            super()._weigh_rewards(weighting, output)
            self.counted = len(passes)

    def first_only(completion_ids, **_):  # the other groups agree
        return [float(at == 0) for at in range(len(completion_ids))]

    made = trainer(
        tmp_path, (first_only,), make=Counting, reward_weighting=GradientWeights(1), num_generations=2,
        per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=1,
    )  # fmt: skip
    made.model.register_forward_pre_hook(lambda *_: passes.append(1))
    made.train()
    assert made.counted == 1


def test_a_validation_point_sets_the_factor_of_the_next_steps(tmp_path):
    points = iter([[0.0, -6.0], [1.0, -3.0], [0.5, -7.0], [9.0, -1.0]])
    made = trainer(
        tmp_path, (even, short), reward_weighting=HypervolumeWeights([0.5, 0.5], [True, True]), eval_rows=4,
        eval_strategy="steps", eval_steps=1, eval_on_start=True, max_steps=3, per_device_eval_batch_size=4,
        point=lambda _: next(points),
    )  # fmt: skip
    made.train()
    metas = logged(made, "reward_weights/meta")
    assert metas[0] == 1.0
    assert metas[1] > 1.5  # the point (1, -3) dominates a volume of 3
    assert metas[2] == 0.5
    assert len(made.reward_weighting.front) == 2


def test_evaluation_gives_the_means_of_the_rewards_as_a_point(tmp_path):
    made = trainer(
        tmp_path, (even, short), reward_weighting=HypervolumeWeights([0.5, 0.5], [True, True]), eval_rows=4,
        per_device_eval_batch_size=4,
    )  # fmt: skip
    made.evaluate()
    found = made.state.log_history[-1]
    assert made.reward_weighting.reference == [found["eval_rewards/even/mean"], found["eval_rewards/short/mean"]]


def test_reward_scaling_that_cancels_says_so(tmp_path):
    rule = HypervolumeWeights([0.5, 0.5], [True, True], apply_to="reward")
    with pytest.raises(WeightsmithWarning, match="does nothing"), warnings.catch_warnings():
        warnings.simplefilter("error", WeightsmithWarning)
        rule.check_estimator("grpo")
    trainer(
        tmp_path, (even, short), reward_weighting=HypervolumeWeights([0.5, 0.5], [True, True]), scale_rewards="none"
    )


def test_state_is_in_the_checkpoint_and_a_resumed_run_goes_on_exactly(tmp_path):
    def make(folder, steps):
        return trainer(
            folder, (even, short), token_weighting=ClipCov(0.2, low=0.0, high=50.0), max_steps=steps,
            reward_weighting=GradientWeights(2, step_size=5.0), save_strategy="steps", save_steps=2,
            optim="adamw_torch",
        )  # fmt: skip

    whole = make(tmp_path / "whole", 4)
    whole.train()
    make(tmp_path / "cut", 2).train()
    assert (tmp_path / "cut/checkpoint-2" / STATE).is_file()
    resumed = make(tmp_path / "cut", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut/checkpoint-2"))
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=1e-6)
    torch.testing.assert_close(resumed.reward_weighting.weights, whole.reward_weighting.weights, rtol=0, atol=1e-9)
    assert resumed.token_weighting.state_dict() == whole.token_weighting.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_weighting": Steer(), "loss_type": "vespo"}, "vespo"),
        ({"token_weighting": ClipHigher(), "loss_type": "cispo"}, "caps the ratio itself"),
        ({"token_weighting": ClipHigher(), "loss_type": "sapo"}, "bounds ratios by itself, not by ClipHigher"),
        ({"token_weighting": KLCov()}, "on-policy"),
        ({"token_weighting": KLCov(), "num_iterations": 2, "delta": 3.0}, "delta"),
        ({"token_weighting": "steer"}, "token_weighting must be a rule"),
        ({"token_weighting": Steer(), "scope": "world"}, "scope must be"),
        ({"reward_weighting": [1.0]}, "reward_weighting must be"),
        ({"reward_weighting": FixedWeights([0.5, 0.5])}, "2 weights, the trainer 1"),
        (
            {"reward_weighting": GradientWeights(1), "multi_objective_aggregation": "normalize_then_sum"},
            "sum_then_normalize",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        trainer(tmp_path, **options)


def test_the_mixin_alone_is_refused():
    with pytest.raises(UsageError, match="is a mixin"):
        Reweighting()


def test_an_output_head_that_cannot_be_followed_is_refused(tmp_path):
    model = network()
    model.config.logit_scale = 0.25
    made = trainer(tmp_path, model=model, token_weighting=Steer("exact"), max_steps=1)
    with pytest.raises(UsageError, match="cannot follow the output head"):
        made.train()


def test_the_middle_half_of_the_blocks_is_chosen():
    names = ["embed.weight", *[f"layers.{i}.q" for i in range(8)], "norm.weight"]
    names = [f"model.{name}" for name in names]
    chosen = middle_blocks(names)
    assert [name for name in names if chosen(name, None)] == [f"model.layers.{i}.q" for i in range(2, 6)]


def test_the_mixin_behind_the_trainer_is_refused():
    with pytest.raises(UsageError, match=r"in front of GRPOTrainer.*class Late\(Reweighting, GRPOTrainer\)"):

        class Late(trl.GRPOTrainer, Reweighting):
            pass


def test_trainers_with_a_loss_of_their_own_are_refused(tmp_path):
    gmpo = pytest.importorskip("trl.experimental.gmpo")

    class OfSequences(Reweighting, trl.RLOOTrainer):
        pass

    class GeometricMean(Reweighting, gmpo.GMPOTrainer):
        pass

    with pytest.raises(UsageError, match="not of RLOOTrainer"):
        trainer(tmp_path, make=OfSequences)
    with pytest.raises(UsageError, match="GMPOTrainer has a loss of its own"):
        trainer(tmp_path, make=GeometricMean, token_weighting=Steer())


@pytest.mark.parametrize("loss_type", ["cispo", "sapo"])
def test_tokens_of_losses_that_do_not_clip_all_count_as_moving(loss_type, tmp_path):
    made = trainer(tmp_path, token_weighting=Steer("theorem"), loss_type=loss_type)
    batch = {"advantages": torch.ones(1), "completion_mask": torch.ones(1, 2), "old_per_token_logps": -torch.ones(1, 2)}
    seen = made._plan.tokens(batch, torch.tensor([[-0.1, -1.0]]), torch.ones(1, 2))
    assert made.token_weighting(seen).metrics["steer/frac_entropy_down"] == 0.5
    assert entropy_change(seen.logp, seen.entropy, seen.advantages, old_logp=seen.old_logp, estimator="theorem",
                          clip=seen.clip)[0, 0] != 0  # fmt: skip


def test_several_validation_sets_are_no_front(tmp_path):
    weighting = HypervolumeWeights([0.5, 0.5], [True, True])
    made = trainer(tmp_path, (even, short), reward_weighting=weighting, eval_rows=4)
    with pytest.raises(UsageError, match="one validation set, eval_dataset has a, b"):
        made.evaluate({"a": made.eval_dataset, "b": made.eval_dataset})
    assert weighting.reference is None


def test_reward_functions_of_one_name_have_no_validation_point_of_their_own(tmp_path):
    functions = [lambda completion_ids, **_: [0.0] * len(completion_ids) for _ in range(2)]
    with pytest.raises(UsageError, match="need different names"):
        trainer(tmp_path, functions, reward_weighting=HypervolumeWeights([0.5, 0.5], [True, True]))
