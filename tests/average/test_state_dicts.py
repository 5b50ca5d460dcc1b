import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from weightsmith.average import LAWA, average_state_dicts, ema, swa
from weightsmith.core.errors import UsageError


def states(count, dtype=torch.float32):
    made = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(dtype) for _ in range(count)]
    for index, model in enumerate(made):
        model[1].num_batches_tracked += index
    return [model.state_dict() for model in made]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_single_state_and_equal_states_come_back_bit_for_bit(dtype):
    (state,) = states(1, dtype)
    for several in ([state], [state] * 5):
        average = average_state_dicts(several, [0.1] * len(several))
        assert all(torch.equal(average[name], tensor) for name, tensor in state.items())
        assert all(average[name].dtype == tensor.dtype for name, tensor in state.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_averages_are_rounded_once(dtype):
    torch.manual_seed(0)
    several = states(4, dtype)
    weights = torch.rand(4, dtype=torch.float64).softmax(0).tolist()  # round ones would bring ties
    average = average_state_dicts(several, weights)
    exact = sum(w * state["0.weight"].double() for w, state in zip(weights, several, strict=True))
    assert torch.equal(average["0.weight"], exact.to(dtype))


def test_integers_are_the_newests_and_arguments_are_left_alone():
    several = states(3)
    before = several[2]["0.weight"].clone()
    average = average_state_dicts(several)
    assert average["1.num_batches_tracked"] == 2
    average["0.weight"].zero_()
    assert torch.equal(several[2]["0.weight"], before)


def test_what_is_no_tensor_is_the_newests():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"seen": self.in_features}

        def set_extra_state(self, state):
            assert state == {"seen": self.in_features}

    model = Extra(2, 2)
    averaged = average_state_dicts([model.state_dict(), model.state_dict()])
    assert averaged["_extra_state"] == {"seen": 2}
    latest = LAWA(model, k=2)
    latest.update_parameters(model)
    assert torch.equal(latest.module.weight, model.weight)
    with pytest.raises(UsageError, match=r"as no tensor, the newest as torch\.float32"):
        average_state_dicts([{"a": None}, {"a": torch.zeros(1)}])


def test_complex_tensors_are_averaged():
    states = [{"w": torch.tensor([1 + 2j, 3j])}, {"w": torch.tensor([3 + 4j, 1j])}]
    assert torch.equal(average_state_dicts(states)["w"], torch.tensor([2 + 3j, 2j]))


def test_an_infinite_mask_that_all_states_have_stays():
    mask = torch.tensor([[0.0, -torch.inf], [0.0, 0.0]])
    states = [{"mask": mask, "w": torch.tensor([1.0])}, {"mask": mask.clone(), "w": torch.tensor([3.0])}]
    averaged = average_state_dicts(states)
    assert torch.equal(averaged["mask"], mask)
    assert averaged["w"] == 2


def test_states_that_do_not_match_are_refused():
    first, second = states(2)
    with pytest.raises(UsageError, match=r"differs from the newest in the names 0\.bias"):
        average_state_dicts([{k: v for k, v in first.items() if k != "0.bias"}, second])
    with pytest.raises(UsageError, match=r"'0\.bias' as torch.float16 \(4,\)"):
        average_state_dicts([{**first, "0.bias": first["0.bias"].half()}, second])
    with pytest.raises(UsageError, match="nothing to average"):
        average_state_dicts([])


def train(model, averages, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    seen = []
    for _ in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        for average in averages:
            average.update_parameters(model)
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return seen


def test_running_averages_are_the_means_that_they_say():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    mean, latest, moving = swa(model), LAWA(model, k=3), ema(model, decay=0.5)
    seen = train(model, [mean, latest, moving], 5)
    weights = [0.5**4, *(0.5 ** (5 - i) for i in range(1, 5))]
    for average, expected in (
        (mean, average_state_dicts(seen)),
        (latest, average_state_dicts(seen[-3:])),
        (moving, average_state_dicts(seen, weights)),
    ):
        assert isinstance(average, AveragedModel)
        torch.testing.assert_close(average.module.state_dict(), expected)


@pytest.mark.parametrize("make", [swa, lambda model: LAWA(model, k=2), lambda model: ema(model, 0.9)])
def test_save_load_continue_equals_never_having_stopped(make, tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    average = make(model)
    train(model, [average], 3)
    torch.save({"model": model.state_dict(), "average": average.state_dict()}, tmp_path / "saved.pt")
    train(model, [average], 2, seed=1)

    resumed = nn.Linear(3, 2)
    again = make(resumed)
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["average"])
    train(resumed, [again], 2, seed=1)
    assert all(torch.equal(again.module.state_dict()[k], v) for k, v in average.module.state_dict().items())


def test_settings_out_of_range_are_refused():
    model = nn.Linear(1, 1)
    with pytest.raises(UsageError, match="decay must be at least 0 and below 1, got 1"):
        ema(model, 1)
    with pytest.raises(UsageError, match="k must be at least 1, got 0"):
        LAWA(model, 0)


@pytest.mark.parametrize("average", [ema, swa, LAWA])
def test_a_pruned_model_in_the_middle_of_training_is_averaged(average):
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    loss = model(x).sum()
    averaged = average(model)
    loss.backward()
    averaged.update_parameters(model)
    assert torch.equal(averaged(x), model(x))
    assert int((averaged.module[0].weight == 0).sum()) == 8
