import pytest
import torch
from safetensors.torch import load_file, save_file

from weightsmith import cli
from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.prune import load_sparse
from weightsmith.prune.folders import prune_folder


@pytest.fixture
def model(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**shape, num_attention_heads=4, tie_word_embeddings=False)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model", max_shard_size="40KB")
    return tmp_path / "model"


def test_a_model_folder_is_pruned_and_loads(model, tmp_path, capsys):
    import transformers

    with pytest.raises(SystemExit) as ended:
        cli.main(["prune", str(model), "--out", str(tmp_path / "out"), "--sparsity", "0.8",
                  "--sparse", str(tmp_path / "m.safetensors")])  # fmt: skip
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "20.0" in text
    assert "Sparse file" in text
    before = transformers.LlamaForCausalLM.from_pretrained(model)
    after = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    pruned = [n for n, p in after.named_parameters() if not torch.equal(p, before.get_parameter(n))]
    assert len(pruned) == 14  # 7 projections in 2 layers: neither embeddings nor head
    zeros = sum(int((after.get_parameter(n) == 0).sum()) for n in pruned)
    assert zeros / sum(after.get_parameter(n).numel() for n in pruned) == pytest.approx(0.8, abs=0.01)
    state = load_sparse(tmp_path / "m.safetensors")
    for name, parameter in after.named_parameters():
        assert torch.equal(state[name], parameter)


def test_tensors_without_a_configuration(tmp_path):
    torch.manual_seed(0)
    tensors = {"a.weight": torch.randn(16, 8).bfloat16(), "b.weight": 9 * torch.randn(4, 8), "a.bias": torch.randn(16),
               "count": torch.tensor([[1, 2]])}  # fmt: skip
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in/model.safetensors")
    (tmp_path / "in/notes.txt").write_text("kept")
    report = prune_folder(tmp_path / "in", tmp_path / "out", 0.5, scope="layerwise")
    found = load_file(tmp_path / "out/model.safetensors")
    assert (tmp_path / "out/notes.txt").read_text() == "kept"
    assert found["a.weight"].dtype == torch.bfloat16
    for name in ("a.weight", "b.weight"):
        assert (found[name] == 0).float().mean() == pytest.approx(0.5, abs=0.05)
    assert torch.equal(found["a.bias"], tensors["a.bias"])
    assert report.density == pytest.approx(0.5, abs=0.05)
    only = prune_folder(tmp_path / "in", tmp_path / "out", pattern="2:4", names=["!b*"], overwrite=True)
    assert {t.name for t in only.tensors if t.prunable} == {"a.weight"}
    assert only.density == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amount": 90}, "amount must be a fraction"),
        ({"names": ["nothing"]}, "match no matrix"),
        ({"scope": ["nothing"]}, "matches none"),
        ({"pattern": "1:2"}, "pattern must be"),
        ({"out": "in/inside"}, "out must be neither in"),
        ({"out": "in"}, "out must be neither in"),
        ({"out": "taken"}, "exists"),
        ({"folder": "nowhere"}, "nowhere"),
    ],
)
def test_bad_use_writes_nothing(tmp_path, options, message):
    (tmp_path / "in").mkdir()
    (tmp_path / "taken").mkdir()
    save_file({"a": torch.randn(4, 8)}, tmp_path / "in/model.safetensors")
    folder, out = tmp_path / options.pop("folder", "in"), tmp_path / options.pop("out", "out")
    with pytest.raises(UsageError, match=message):
        prune_folder(folder, out, **options)
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_are_refused(tmp_path):
    save_file({"a": torch.full((4, 8), torch.nan)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="a holds NaN"):
        prune_folder(tmp_path / "model.safetensors", tmp_path / "out")


@pytest.mark.parametrize("place", ["model/model.safetensors", "model/new.safetensors", "out/m.safetensors", "model"])
def test_a_sparse_file_never_replaces_what_is_read_or_made(tmp_path, place):
    (tmp_path / "model").mkdir()
    save_file({"w": torch.randn(8, 8)}, tmp_path / "model/model.safetensors")
    before = (tmp_path / "model/model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="sparse must be neither in"):
        prune_folder(tmp_path / "model", tmp_path / "out", 0.5, sparse=tmp_path / place)
    assert (tmp_path / "model/model.safetensors").read_bytes() == before
    assert not (tmp_path / "out").exists()


def test_experts_that_are_stored_one_by_one_are_pruned_and_what_is_unknown_is_said(tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.MixtralConfig(**shape, num_attention_heads=2, num_key_value_heads=1, num_local_experts=2)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "in")
    with pytest.warns(WeightsmithWarning, match="1 matrices are left as they are"):
        report = prune_folder(tmp_path / "in", tmp_path / "out", 0.5)
    pruned = [tensor.name for tensor in report.tensors if tensor.prunable]
    assert sum("experts." in name for name in pruned) == 6
    assert list(report.left_out) == ["model.layers.0.block_sparse_moe.gate.weight"]


def test_a_pattern_goes_along_the_inputs_of_transposed_weights(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "in")
    prune_folder(tmp_path / "in", tmp_path / "out", pattern="2:4")
    weight = load_file(tmp_path / "out/model.safetensors")["transformer.h.0.attn.c_attn.weight"]  # (in, out)
    assert ((weight.T.reshape(-1, 4) != 0).sum(1) == 2).all()


def test_a_model_that_cannot_be_built_is_said(tmp_path):
    (tmp_path / "in").mkdir()
    save_file({"a.weight": torch.randn(8, 8)}, tmp_path / "in/model.safetensors")
    (tmp_path / "in/config.json").write_text('{"architectures": ["MyOwnModel"]}')
    with pytest.warns(WeightsmithWarning, match="names no model that can be built here"):
        prune_folder(tmp_path / "in", tmp_path / "out", 0.5)
    with pytest.raises(UsageError, match="min_density must be a fraction"):
        prune_folder(tmp_path / "in", tmp_path / "out2", 0.5, min_density=2.0)
