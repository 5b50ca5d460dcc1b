import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from weightsmith.core.checkpoint import Checkpoint, copy_other_files, write_checkpoint, write_pieces
from weightsmith.core.errors import UsageError, WeightsmithWarning


def tensors():
    return {f"layer.{i}.weight": torch.randn(4, 5, generator=torch.Generator().manual_seed(i)) for i in range(5)}


def test_a_small_checkpoint_is_one_file_that_others_read(tmp_path):
    state = tensors()
    write_checkpoint(state, tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["model.safetensors"]
    loaded = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("shard_bytes", [1, 80, 160, 10**6])
def test_a_checkpoint_comes_back_whatever_the_shard_size(tmp_path, shard_bytes):
    state = tensors()
    write_checkpoint(iter(state.items()), tmp_path / "model", max_shard_bytes=shard_bytes)
    back = Checkpoint(tmp_path / "model")
    assert list(back) == list(state)
    assert back.shapes() == dict.fromkeys(state, (4, 5))
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_the_index_is_as_transformers_writes_it(tmp_path):
    write_checkpoint(tensors(), tmp_path / "model", max_shard_bytes=160)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 80
    assert sorted(set(index["weight_map"].values())) == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]


def test_transformers_loads_a_sharded_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "theirs")
    write_checkpoint(model.state_dict(), tmp_path / "ours", max_shard_bytes=1000)
    copy_other_files(tmp_path / "theirs", tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_other_files_are_copied_but_no_weights_no_index_and_nothing_that_is_there(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for name in ("config.json", "vocab.txt", "log.json", "model.safetensors", "x.bin", "model.safetensors.index.json"):
        (source / name).write_text("theirs")
    (source / "folder").mkdir()
    (source / "vocab.txt").chmod(0o444)
    (target / "config.json").write_text("ours")
    copy_other_files(source, target, but={"log.json"})
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "vocab.txt"]
    assert (target / "config.json").read_text() == "ours"
    (target / "vocab.txt").write_text("can be written")


def test_tied_weights_are_written_under_every_name(tmp_path):
    model = nn.ModuleDict({"embedding": nn.Embedding(6, 3), "head": nn.Linear(3, 6, bias=False)})
    model["head"].weight = model["embedding"].weight
    back = Checkpoint(write_checkpoint(model.state_dict(), tmp_path / "model"))
    assert torch.equal(back["embedding.weight"], back["head.weight"])


def test_a_failure_half_way_leaves_the_old_folder_as_it_was(tmp_path):
    write_checkpoint({"old": torch.ones(2)}, tmp_path / "model")

    def pairs():
        yield "new", torch.zeros(2)
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_checkpoint(pairs(), tmp_path / "model", max_shard_bytes=1)
    assert list(Checkpoint(tmp_path / "model")) == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_replacing_a_folder_leaves_nothing_of_the_old_one(tmp_path):
    write_checkpoint(tensors(), tmp_path / "model", max_shard_bytes=1)
    write_checkpoint({"only": torch.ones(1)}, tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["model.safetensors"]


def test_an_unknown_tensor_name_brings_near_names(tmp_path):
    write_checkpoint(tensors(), tmp_path / "model")
    with pytest.raises(KeyError, match=r"layer\.1\.weight"):
        Checkpoint(tmp_path / "model")["layer.1.wieght"]


def test_what_is_no_checkpoint_says_so(tmp_path):
    with pytest.raises(UsageError, match="neither a folder nor a file"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"no \.safetensors"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"convert pytorch_model\.bin"):
        Checkpoint(tmp_path)


def test_a_damaged_file_and_a_missing_shard_are_named(tmp_path):
    write_checkpoint(tensors(), tmp_path / "model", max_shard_bytes=160)
    (tmp_path / "model" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UsageError, match="lacks model-00002"):
        Checkpoint(tmp_path / "model")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(UsageError, match="damaged"):
        Checkpoint(tmp_path / "cut.safetensors")


def test_a_name_that_comes_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="comes twice"):
        write_checkpoint([("a", torch.ones(1)), ("a", torch.ones(1))], tmp_path / "model")


def test_a_file_written_in_pieces_is_read_by_safetensors_and_in_pieces(tmp_path):
    state = {
        "half": torch.randn(3, 5).bfloat16(),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 4),
        "flags": torch.tensor([True, False]),
    }
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    flat = state["half"].flatten()
    rest = [state[name] for name in ("scalar", "empty", "flags")]
    write_pieces(tmp_path / "model.safetensors", layout, [flat[:4], flat[4:], *rest])
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    stored = Checkpoint(tmp_path).stored()
    assert [(stored[name].dtype, stored[name].shape) for name in state] == list(layout.values())
    piece = torch.empty(6, dtype=torch.bfloat16)
    stored["half"].read(piece, 7)
    assert torch.equal(piece, flat[7:13])


def test_places_are_found_in_every_shard(tmp_path):
    state = tensors()
    stored = Checkpoint(write_checkpoint(state, tmp_path / "model", max_shard_bytes=160)).stored()
    assert stored.keys() == state.keys()
    for name, place in stored.items():
        whole = torch.empty(20)
        place.read(whole)
        assert torch.equal(whole, state[name].flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_mapped_tensor_can_be_written_to_and_the_file_stays_as_it_was(tmp_path, dtype):
    state = {"odd": torch.ones(3, dtype=torch.int8), "a": torch.arange(6).reshape(2, 3).to(dtype)}
    stored = Checkpoint(write_checkpoint(state, tmp_path / "model")).stored()
    mapped = stored["a"].map()
    assert mapped.dtype == dtype
    assert torch.equal(mapped, state["a"])
    mapped.zero_()
    assert torch.equal(stored["a"].map(), state["a"])


def test_pieces_that_do_not_fill_the_layout_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must hold 8 bytes, as the layout says, got 4"):
        write_pieces(tmp_path / "short.safetensors", {"a": (torch.float32, (2,))}, [torch.ones(1)])


def test_a_file_that_is_cut_off_after_it_was_opened_is_named(tmp_path):
    path = write_checkpoint({"a": torch.ones(4)}, tmp_path / "model") / "model.safetensors"
    place = Checkpoint(path).stored()["a"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UsageError, match="ends too early"):
        place.read(torch.empty(4))


def sharded(tmp_path):
    return write_checkpoint(tensors(), tmp_path / "model", max_shard_bytes=160)


def change_index(folder, change):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "name", ["../elsewhere.safetensors", "/elsewhere.safetensors", "deep/x.safetensors", "..", "\0"]
)
def test_shards_are_in_the_folder_itself(tmp_path, name):
    folder = sharded(tmp_path)
    write_checkpoint(tensors(), tmp_path / "outside")
    (tmp_path / "outside" / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    name = name.replace("/else", f"{tmp_path}/else") if name[0] == "/" else name
    change_index(folder, lambda index: index["weight_map"].update({"layer.0.weight": name}))
    with pytest.raises(UsageError, match="must be a plain file name in the same folder"):
        Checkpoint(folder)


def test_a_tensor_that_no_shard_holds_is_an_error(tmp_path):
    folder = sharded(tmp_path)
    change_index(folder, lambda index: index["weight_map"].update({"ghost": "model-00001-of-00003.safetensors"}))
    with pytest.raises(UsageError, match=r"model-00001-of-00003.safetensors holds 'ghost', which it does not"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000, "\xe9"]
)
def test_an_index_of_another_shape_is_one_error(tmp_path, content):
    folder = sharded(tmp_path)
    (folder / "model.safetensors.index.json").write_text(content, encoding="latin-1")
    with pytest.raises(UsageError, match=r"index\.json"):
        Checkpoint(folder)


def test_shards_without_their_index_are_not_taken_for_a_model(tmp_path):
    folder = sharded(tmp_path)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(UsageError, match=r"a part of a model, and no model.safetensors.index.json"):
        Checkpoint(folder)


def test_an_index_that_an_earlier_save_has_left_does_not_count(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    for size in ("4KB", "1GB"):  # in shards, then in one file, with other weights
        model = transformers.LlamaForCausalLM(config)
        model.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    name = "model.norm.weight"
    read = transformers.LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    for key, tensor in Checkpoint(tmp_path).items():
        assert torch.equal(tensor, read[key])
    assert name in read


def test_several_files_without_an_index_are_not_one_model(tmp_path):
    for name in ("a", "b"):
        save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UsageError, match=r"a\.safetensors, b\.safetensors: which of them is the model"):
        Checkpoint(tmp_path)
    save_file({"c": torch.ones(2)}, tmp_path / "model.safetensors")
    assert list(Checkpoint(tmp_path)) == ["c"]


def test_links_out_of_the_folder_are_said_and_the_hubs_own_are_not(tmp_path):
    plain = write_checkpoint(tensors(), tmp_path / "plain")
    snapshot = tmp_path / "models--x" / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--x" / "blobs").mkdir()
    (plain / "model.safetensors").rename(tmp_path / "models--x" / "blobs" / "ff00")
    (snapshot / "model.safetensors").symlink_to("../../blobs/ff00")
    assert len(Checkpoint(snapshot).stored()) == 5
    (plain / "model.safetensors").symlink_to(tmp_path / "models--x" / "blobs" / "ff00")
    with pytest.warns(WeightsmithWarning, match="is a link out of its folder"):
        Checkpoint(plain)


def test_pipes_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="must be a file"):
        Checkpoint(tmp_path)
