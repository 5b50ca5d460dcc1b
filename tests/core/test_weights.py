import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from weightsmith.core.errors import UsageError
from weightsmith.core.fold import fold_
from weightsmith.core.weights import (
    Layout,
    check_plain,
    classifiers,
    is_linear,
    is_plain,
    layouts,
    output_axis,
    output_head,
    output_layers,
    owners,
    why_computed,
)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


class Conv1D(nn.Module):  # as transformers has it
    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))


class Experts(nn.Module):
    def __init__(self, is_transposed: bool | None = None) -> None:
        super().__init__()
        if is_transposed is not None:
            self.is_transposed = is_transposed
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 4))
        self.bias = nn.Parameter(torch.zeros(3, 8))
        self.scale = nn.Parameter(torch.ones(3, 1, 4))


def names(model: nn.Module, weight: torch.Tensor) -> list[str]:
    return [slot.name for slot in owners(model)[id(weight)]]


def test_a_tied_weight_has_several_owners_and_the_first_is_the_one_of_named_parameters():
    model = Tied()
    assert names(model, model.head.weight) == ["embed.weight", "head.weight"]
    assert [slots[0].name for slots in owners(model).values()] == [name for name, _ in model.named_parameters()]


def test_a_shared_module_owns_its_weight_once():
    layer = nn.Linear(2, 2)
    assert names(nn.Sequential(layer, nn.ReLU(), layer), layer.weight) == ["0.weight"]


def test_the_root_module_owns_its_parameters_under_their_own_names_and_missing_ones_have_no_owner():
    layer = nn.Linear(2, 2, bias=False)
    assert [slot.name for slots in owners(layer).values() for slot in slots] == ["weight"]


def test_a_parametrized_weight_is_owned_by_its_parametrization_and_buffers_count_when_asked():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 3)))
    held = model[0].parametrizations.weight
    assert names(model, held.original) == ["0.parametrizations.weight.original"]
    vector = held[0]._u
    assert id(vector) not in owners(model)
    assert owners(model, buffers=True)[id(vector)][0].name == "0.parametrizations.weight.0._u"


@pytest.mark.parametrize(
    ("module", "axis", "size"),
    [
        (nn.Linear(3, 7), 0, 7),
        (nn.Linear(3, 1), 0, 1),
        (nn.Conv2d(4, 6, 3, groups=2), 0, 6),
        (nn.ConvTranspose1d(4, 6, 3), 1, 6),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), 1, 3),
        (Conv1D(7, 3), 1, 7),
        (parametrizations.spectral_norm(Conv1D(7, 3)), 1, 7),
        (parametrizations.spectral_norm(nn.ConvTranspose2d(4, 6, 3), dim=1), 1, 6),
        (nn.Embedding(9, 4), 0, 9),
    ],
)
def test_the_output_axis_counts_the_outputs(module, axis, size):
    assert output_axis(module) == axis
    assert module.weight.shape[axis] == size
    assert is_linear("", module) is not isinstance(module, nn.Embedding)


def test_transformers_conv1d_is_known():
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(7, 3)
    assert is_linear("", conv)
    assert list(layouts(conv)) == [Layout("weight", 1)]


def test_layouts_of_packed_projections_and_experts():
    assert list(layouts(nn.MultiheadAttention(4, 2))) == [Layout("in_proj_weight", 0)]
    apart = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
    assert [layout.attribute for layout in layouts(apart)] == ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    assert list(layouts(Experts())) == [Layout("gate_up_proj", 1, stacked=True)]
    assert list(layouts(Experts(is_transposed=True))) == [Layout("gate_up_proj", 2, stacked=True)]
    assert not list(layouts(nn.Embedding(3, 2)))
    assert not list(layouts(nn.LayerNorm(3)))


def test_the_output_head_is_found_inside_wrappers_and_layers_tied_to_a_table_count_as_output():
    class Language(Tied):
        def get_output_embeddings(self) -> nn.Module:
            return self.head

    model = Language()
    assert output_head(nn.Sequential(model)) is model.head
    assert output_layers(model) == {"head": model.head}
    assert output_head(Tied()) is None
    assert list(output_layers(Tied())) == ["head"]
    assert not output_layers(nn.Sequential(nn.Linear(2, 2)))


def test_classifiers_are_what_the_class_says_is_behind_its_body():
    class Model(nn.Module):
        base_model_prefix = "body"

        def __init__(self) -> None:
            super().__init__()
            self.body, self.score = nn.Linear(2, 2), nn.Linear(2, 1)

        @property
        def base_model(self) -> nn.Module:
            return self.body

    model = Model()
    assert classifiers(model) == {"score": model.score} == output_layers(model)


def test_ordinary_layers_are_plain():
    for module in (nn.Linear(2, 1), nn.Embedding(3, 2), nn.ConvTranspose1d(2, 2, 1), nn.LayerNorm(2), Conv1D(2, 3)):
        assert is_plain(module)
        assert check_plain("w", module, finite=True) is module.weight
    assert is_plain(nn.MultiheadAttention(4, 2), "in_proj_weight")
    assert is_plain(nn.Linear(2, 2).half())


@pytest.mark.parametrize(
    ("put_on", "take_off", "advice"),
    [
        (lambda fc: prune.l1_unstructured(fc, "weight", 0.5), lambda fc: prune.remove(fc, "weight"), "prune.remove"),
        (nn.utils.weight_norm, nn.utils.remove_weight_norm, "remove_weight_norm"),
        (nn.utils.spectral_norm, nn.utils.remove_spectral_norm, "remove_spectral_norm"),
        (parametrizations.weight_norm, fold_, "_WeightNorm: call weightsmith.fold_"),
        (parametrizations.orthogonal, fold_, "_Orthogonal: call weightsmith.fold_"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning")
def test_a_computed_weight_is_refused_with_advice_that_works(put_on, take_off, advice):
    layer = nn.Linear(4, 4)
    put_on(layer)
    assert not is_plain(layer)
    with pytest.raises(UsageError, match=rf"^fc\.weight is .*{advice}"):
        check_plain("fc.weight", layer)
    take_off(layer)
    assert check_plain("fc.weight", layer) is layer.weight


def test_to_ask_does_not_evaluate_a_parametrization():
    class Loud(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            calls.append(w)
            return w

    calls: list[torch.Tensor] = []
    layer = nn.Linear(2, 2)
    parametrize.register_parametrization(layer, "weight", Loud())
    calls.clear()
    assert why_computed(layer) is not None
    assert not is_plain(layer)
    assert not calls


def test_a_weight_that_is_missing_or_no_parameter_is_refused():
    layer = nn.Linear(2, 2)
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight
    for module, attribute in ((layer, "weight"), (nn.ReLU(), "weight"), (nn.Linear(2, 2, bias=False), "bias")):
        with pytest.raises(UsageError, match="is no parameter of its module"):
            check_plain("w", module, attribute)


def test_lazy_and_meta_weights_ask_for_values():
    with pytest.raises(UsageError, match="run one batch through the model first"):
        check_plain("w", nn.LazyLinear(3))
    with pytest.raises(UsageError, match="on the meta device: load"):
        check_plain("w", nn.Linear(2, 3, device="meta"))


def test_integer_complex_sparse_and_packed_weights_are_a_type_error():
    class Packed(torch.Tensor):
        pass

    layer = nn.Linear(2, 3)
    for value, shown in (
        (torch.ones(3, 2, dtype=torch.int8), "int8"),
        (torch.ones(3, 2, dtype=torch.complex64), "complex64"),
        (torch.ones(3, 2, dtype=torch.float8_e4m3fn), "float8"),
        (torch.ones(3, 2).to_sparse(), "sparse_coo"),
        (torch.ones(3, 2).as_subclass(Packed), "Packed"),
    ):
        layer.weight = nn.Parameter(value, requires_grad=False)
        assert not is_plain(layer)
        with pytest.raises(TypeError, match=f"^w must be a dense float16.*{shown}"):
            check_plain("w", layer)


def test_values_that_are_not_finite_are_refused_when_asked():
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    check_plain("w", layer)
    with pytest.raises(UsageError, match=r"^w holds NaN or infinite values"):
        check_plain("w", layer, finite=True)
