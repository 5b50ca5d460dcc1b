import sys
import types

import huggingface_hub
import pytest
import torch
from torch import nn

from weightsmith.core.errors import MissingExtra, UsageError
from weightsmith.lab.models import build_model
from weightsmith.lab.models.lookup import MODELS


@pytest.fixture
def my_models(monkeypatch):
    """A module of the user's, importable as ``my_models``."""
    module = types.ModuleType("my_models")
    module.shaped = lambda channels, size, classes: nn.Sequential(nn.Flatten(), nn.Linear(channels * size**2, classes))
    module.any_keywords = lambda **shape: module.shaped(**shape)
    module.fixed = lambda: nn.Linear(3, 2)
    module.nothing = lambda: "no module"
    monkeypatch.setitem(sys.modules, "my_models", module)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_gives_logits_and_gradients(name):
    model = build_model(name, channels=1, size=8, classes=5)
    logits = model(torch.randn(2, 1, 8, 8))
    assert logits.shape == (2, 5)
    logits.logsumexp(1).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("size", [1, 28, 32, 64, 224])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_takes_every_size(name, size):
    with torch.device("meta"):
        model = build_model(name, channels=3, size=size, classes=7)
        assert model(torch.empty(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "size", "classes", "count"),
    [
        ("resnet20", 32, 10, 269_722),
        ("resnet32", 32, 10, 464_154),
        ("resnet18", 224, 1000, 11_689_512),
        ("resnet34", 224, 1000, 21_797_672),
        ("resnet50", 224, 1000, 25_557_032),
        ("vgg16_bn", 224, 1000, 138_365_992),
        ("vgg19_bn", 224, 1000, 143_678_248),
    ],
)
def test_published_architectures_have_their_published_size(name, size, classes, count):
    with torch.device("meta"):
        model = build_model(name, channels=3, size=size, classes=classes)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_the_convnet_starts_with_the_weight_norms_of_torch_defaults():
    torch.manual_seed(0)
    model = build_model("convnet", channels=1, size=28, classes=10)
    norms = [module.weight.norm() for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert torch.stack(norms).mean().item() == pytest.approx(3.35, abs=0.1)


def test_zero_padding_shortcuts_hold_no_weights():
    names = [name for name, _ in build_model("resnet20", channels=3, size=32, classes=10).named_parameters()]
    assert not any("shortcut" in name for name in names)


def test_the_vision_transformer_fuses_query_key_and_value():
    model = build_model("vit_tiny", channels=1, size=8, classes=10)
    qkv = [module for name, module in model.named_modules() if name.endswith("attn.qkv")]
    assert len(qkv) == 4
    assert all(module.out_features == 3 * module.in_features for module in qkv)


@pytest.mark.parametrize("function", ["shaped", "any_keywords"])
def test_a_function_is_given_the_shape_it_asks_for(my_models, function):
    build_model(f"my_models:{function}", channels=1, size=8, classes=3)
    model = build_model(f"my_models:{function}", channels=2, size=4, classes=3)
    assert model(torch.randn(5, 2, 4, 4)).shape == (5, 3)


def test_a_function_without_arguments_is_called_without(my_models):
    assert isinstance(build_model("my_models:fixed", channels=1, size=1, classes=1), nn.Linear)


def test_wrong_functions_are_explained(my_models):
    with pytest.raises(UsageError, match=r"no module 'no_such\.module'; give a module"):
        build_model("no_such.module:build", channels=1, size=8, classes=3)
    with pytest.raises(UsageError, match=r"my_models has no 'shape'; did you mean 'shaped'"):
        build_model("my_models:shape", channels=1, size=8, classes=3)
    with pytest.raises(UsageError, match=r"must return a torch\.nn\.Module, got str"):
        build_model("my_models:nothing", channels=1, size=1, classes=1)
    with pytest.raises(UsageError, match="model must be module:name"):
        build_model(":build", channels=1, size=8, classes=3)


def test_an_import_error_within_the_users_module_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import surely_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
        build_model("needs_more:build", channels=1, size=8, classes=3)


def test_an_unknown_name_lists_near_ones():
    with pytest.raises(UsageError, match=r"model 'resnet21' is not known: did you mean .*'resnet20'"):
        build_model("resnet21", channels=1, size=8, classes=3)
    with pytest.raises(UsageError, match="model 'resnet21' is not known"):
        build_model("resnet21", channels=1, size=8, classes=2)


def test_our_own_models_have_no_trained_weights():
    with pytest.raises(UsageError, match="pretrained must be False for 'mlp'"):
        build_model("mlp", channels=1, size=8, classes=2, pretrained=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a tiny trained Hugging Face classifier of three classes on 16 pixels."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vit")
    ViTForImageClassification(config).save_pretrained(folder)
    return folder


def test_a_hugging_face_folder_is_built_for_the_data(saved):
    build_model(str(saved), channels=1, size=8, classes=3)
    model = build_model(str(saved), channels=1, size=8, classes=5)
    assert model(torch.randn(2, 1, 8, 8)).logits.shape == (2, 5)


def test_pretrained_weights_are_loaded_and_a_head_of_another_size_is_new(saved):
    from transformers import ViTForImageClassification

    x, trained = torch.randn(2, 3, 16, 16), ViTForImageClassification.from_pretrained(saved).eval()
    same = build_model(str(saved), channels=3, size=16, classes=3, pretrained=True).eval()
    assert torch.equal(same(x).logits, trained(x).logits)
    other = build_model(str(saved), channels=3, size=16, classes=5, pretrained=True)
    assert other(x).logits.shape == (2, 5)
    assert torch.equal(other.vit.embeddings.cls_token, trained.vit.embeddings.cls_token)


def test_trained_weights_that_are_not_there_are_an_error(saved, tmp_path):
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    with pytest.raises(UsageError, match="cannot be built as an image classifier"):
        build_model(str(tmp_path), channels=3, size=16, classes=3, pretrained=True)


def test_patches_larger_than_the_images_are_an_error(saved):
    with pytest.raises(UsageError, match="cuts patches of 4 pixels, images have 2"):
        build_model(str(saved), channels=1, size=2, classes=5)


def test_a_model_of_another_kind_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UsageError, match=r"cannot be built as an image classifier: .*GPT2Config"):
        build_model(str(tmp_path), channels=1, size=8, classes=5)


def test_a_configuration_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="no configuration that transformers can read"):
        build_model(str(tmp_path), channels=1, size=8, classes=3)


@pytest.mark.parametrize("offline", [False, True])
def test_without_network_a_hub_model_fails_at_once(monkeypatch, offline):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(UsageError, match="someone/some-model"):
        build_model("someone/some-model", channels=1, size=8, classes=3)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match="transformers is needed for the model 'someone/some-model'"):
        build_model("someone/some-model", channels=1, size=8, classes=3)
