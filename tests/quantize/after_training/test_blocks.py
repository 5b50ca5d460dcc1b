import pytest
import torch
from torch import nn

from weightsmith.core.errors import UsageError
from weightsmith.quantize.after_training.blocks import Walk, find_blocks, first_tensor, hollow
from weightsmith.quantize.after_training.calibration import make_batches
from weightsmith.quantize.after_training.targets import choose_targets


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.fc(x).relu()


class Skips(nn.Module):
    """The second convolution's output is changed in place, and the first's is used once more at the end."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 3, 1)

    def forward(self, x):
        early = self.first(x)
        late = self.second(early)
        late += 1
        return self.third(early + late)


class Spoils(nn.Module):
    """Its blocks begin by changing their input in place."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)) for _ in range(2)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x - 0.1)
        return x


def names(model, blocks="auto", where=None):
    return list(find_blocks(model, blocks, choose_targets(model, where), keep_others=where is not None))


def listed(*numbers):
    return nn.ModuleDict({f"part{n}": nn.Sequential(*(Block() for _ in range(n))) for n in numbers})


def test_auto_finds_the_single_longest_list_of_blocks_of_one_class():
    assert names(listed(2, 3)) == ["part3.0", "part3.1", "part3.2"]


def test_lists_inside_of_blocks_do_not_count():
    experts = nn.ModuleList([nn.Sequential(*(Block() for _ in range(5))) for _ in range(2)])
    assert names(experts) == ["0", "1"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), "finds no longest list.*Candidates: '0', '2'"),
        (nn.ModuleDict({"a": listed(2)["part2"], "b": listed(2)["part2"]}), "more than one.*Candidates: 'a', 'b'"),
    ],
)
def test_an_unknown_structure_asks_for_names_and_lists_candidates(model, message):
    with pytest.raises(UsageError, match=message):
        names(model)


def test_blocks_can_be_layers_the_whole_model_or_named():
    model = nn.Sequential(Block(), nn.ReLU(), Block())
    assert names(model, "layers") == ["0.fc", "2.fc"]
    assert names(model, "whole") == [""]
    assert names(model, ["2"]) == ["2"]
    assert names(model, ["2"], where="*") == ["2", "0.fc"]


def test_unknown_and_nested_names_are_refused():
    model = nn.Sequential(Block(), Block())
    with pytest.raises(UsageError, match=r"blocks names '0.f'.*did you mean '0.fc'"):
        names(model, ["0.f"])
    with pytest.raises(UsageError, match=r"'0.fc', which is inside '0'"):
        names(model, ["0", "0.fc"])


def walk(model, blocks="layers", x=None):
    batch = make_batches(torch.randn(3, 1, 2, 2) if x is None else x, None, torch.device("cpu"))[0]
    layers = choose_targets(model, None)
    return Walk(model.eval(), find_blocks(model, blocks, layers, keep_others=False), batch), batch


def test_a_walk_knows_what_each_output_is_still_needed_for():
    found, _ = walk(Skips())
    assert found.last_use == {"first": 2, "second": 2, "third": 3}


@pytest.mark.parametrize(
    ("model", "blocks"), [(Skips(), "layers"), (Spoils(), "auto"), (nn.Sequential(Block()), "whole")]
)
def test_walking_block_by_block_gives_what_the_model_gives(model, blocks):
    x = torch.randn(3, 1, 2, 2) if isinstance(model, Skips) else torch.randn(3, 4)
    found, batch = walk(model, blocks, x)
    with torch.no_grad():
        expected = model(x.clone())
        outputs = {}
        for index, name in enumerate(found.blocks):
            arguments = found.inputs(name, batch, outputs)
            assert torch.equal(first_tensor(found.call(name, arguments)), first_tensor(found.call(name, arguments)))
            outputs[name] = found.call(name, arguments)
            for other in outputs:
                if found.last_use[other] <= index:
                    outputs[other] = hollow(outputs[other])
        assert torch.equal(found.finish(batch, outputs), expected)
        assert torch.equal(model(x.clone()), expected)


def test_a_block_called_twice_or_never_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(self.fc(x)) if x.shape[1] == 4 else self.other(x)

    with pytest.raises(UsageError, match="'fc' is called more than once"):
        walk(Twice(), ["fc"], torch.randn(3, 4))
    with pytest.raises(UsageError, match="'other' is never called"):
        walk(Twice(), ["other"], torch.randn(3, 4))


def test_a_hollow_output_keeps_its_shape_and_takes_no_memory():
    empty = hollow((torch.randn(50, 60), None, "x"))
    assert empty[0].shape == (50, 60)
    assert empty[0].untyped_storage().nbytes() == 4
    assert empty[1:] == (None, "x")
