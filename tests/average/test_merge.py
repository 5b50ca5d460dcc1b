import json

import pytest
import torch
from runs import LORA, adapter_run, factors, log_of, lora_delta, write_adapter, write_model, write_state
from safetensors.torch import load_file, save_file

from weightsmith.average import greedy_members, greedy_soup, merge_checkpoints
from weightsmith.core.checkpoint import Checkpoint, write_checkpoint
from weightsmith.core.errors import UsageError, WeightsmithWarning

MODULES = [f"base_model.model.layer.{module}" for module in "qv"]
quiet = pytest.mark.filterwarnings("ignore:averaging factors loses")


def layers(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {f"layer.{i}.weight": torch.randn(7, 5, generator=generator).to(dtype) for i in range(4)}


def model_run(folder, count=3, dtype=torch.float32, **config):
    for i in range(count):
        write_model(folder / f"checkpoint-{i + 1}", layers(i, dtype), **config)
    write_state(folder / f"checkpoint-{count}", log_of([1.0, 0.9, 0.8][:count]))
    return folder


def folders(run):
    return sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def merged_adapter(out):
    state = load_file(out / "adapter_model.safetensors")
    return state, json.loads((out / "adapter_config.json").read_text())


# what comes out


@pytest.mark.parametrize("chunk_mb", [1e-5, 3e-4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_full_models_are_averaged_and_rounded_once_whatever_the_piece(tmp_path, chunk_mb, dtype):
    run = model_run(tmp_path / "run", dtype=dtype)
    weights = [0.1234567, 0.2345678, 0.6419755]  # round ones would bring ties
    merge_checkpoints(folders(run), tmp_path / "out", weights=weights, chunk_mb=chunk_mb)
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        exact = sum(w * layers(i, dtype)[name].double() for i, w in enumerate(weights))
        assert torch.equal(tensor, exact.to(dtype))


def test_the_newest_checkpoints_shards_are_kept_and_others_may_be_sharded_differently(tmp_path):
    write_checkpoint(layers(0), tmp_path / "checkpoint-1")
    write_checkpoint(layers(1), tmp_path / "checkpoint-2", max_shard_bytes=280)
    merge_checkpoints(folders(tmp_path), tmp_path / "out", scheme="uniform")
    names = sorted(path.name for path in (tmp_path / "out").glob("model*"))
    assert names == sorted(path.name for path in (tmp_path / "checkpoint-2").glob("model*"))
    index = [json.loads((tmp_path / f / "model.safetensors.index.json").read_text()) for f in ("out", "checkpoint-2")]
    assert index[0] == index[1]
    merged = Checkpoint(tmp_path / "out")
    for name, tensor in layers(0).items():
        torch.testing.assert_close(merged[name], (tensor + layers(1)[name]) / 2)


def test_everything_but_weights_comes_from_the_newest_and_nothing_of_the_run(tmp_path):
    run = model_run(tmp_path / "run", model_type="tiny")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (run / "checkpoint-3" / name).write_text(name)
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth"):
        (run / "checkpoint-3" / name).write_bytes(b"x")
    (run / "checkpoint-2" / "vocab.txt").write_text("old")
    merge_checkpoints(folders(run), tmp_path / "out")
    kept = {"tokenizer.json", "chat_template.jinja", "generation_config.json", "config.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == kept | {"model.safetensors", "merge_report.json"}


def test_the_report_tells_what_was_done(tmp_path):
    run = model_run(tmp_path / "run")
    report = merge_checkpoints(folders(run), tmp_path / "out", scheme="linear", penalty=0.5)
    assert [share.value for share in report.shares] == [1.0, 0.9, 0.8]
    away = [(layers(i)["layer.0.weight"] - layers(2)["layer.0.weight"]).norm() for i in range(3)]
    assert report.distances[2] == 0
    assert away[0] > 0
    flat = [torch.cat([t.flatten() for t in layers(i).values()]) for i in range(3)]
    expected = [float((x - flat[2]).norm() / flat[2].norm()) for x in flat]
    assert report.distances == pytest.approx(expected)
    written = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert written["settings"]["scheme"] == "linear"
    assert [share["weight"] for share in written["shares"]] == [share.weight for share in report.shares]
    assert written["shares"][0]["checkpoint"]["path"] == str(run / "checkpoint-1")


@pytest.mark.parametrize("mode", ["factors", "svd", "cat"])
@pytest.mark.parametrize("count", [1, 4])
def test_identical_adapters_average_to_themselves(tmp_path, mode, count):
    state = factors(0)
    for i in range(count):
        write_adapter(tmp_path / f"checkpoint-{i + 1}", state)
    merge_checkpoints(folders(tmp_path), tmp_path / "out", scheme="uniform", lora_mode=mode)
    merged, config = merged_adapter(tmp_path / "out")
    for module in MODULES:
        torch.testing.assert_close(
            lora_delta(merged, config, module), lora_delta(state, LORA, module), rtol=1e-5, atol=1e-6
        )
    if mode == "factors":
        assert all(torch.equal(merged[name], tensor) for name, tensor in state.items())
        assert config == LORA


def test_one_full_checkpoint_comes_back_bit_for_bit(tmp_path):
    run = model_run(tmp_path / "run", count=1, dtype=torch.bfloat16)
    report = merge_checkpoints(folders(run), tmp_path / "out")
    assert report.shares[0].weight == 1.0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(merged[name], tensor) for name, tensor in layers(0, torch.bfloat16).items())


def exact_update(run, weights, module):
    total = 0
    for w, folder in zip(weights, folders(run), strict=True):
        total = total + w * lora_delta(*merged_adapter(folder), module)
    return total


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_and_scalings_may_differ_where_updates_are_averaged(tmp_path, use_rslora):
    run = tmp_path / "run"
    plain = {**LORA, "r": 3, "lora_alpha": 7, "alpha_pattern": {"q": 5}}
    write_adapter(run / "checkpoint-1", factors(1, rank=3), plain)
    write_adapter(run / "checkpoint-2", factors(2, rank=2), {**LORA, "use_rslora": use_rslora})
    merge_checkpoints(folders(run), tmp_path / "cat", weights=[0.3, 0.7], lora_mode="cat")
    report = merge_checkpoints(folders(run), tmp_path / "svd", weights=[0.3, 0.7], rank=5)
    for out, rank in (("cat", 5), ("svd", 5)):
        state, config = merged_adapter(tmp_path / out)
        expected = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
        assert expected.items() <= config.items()
        for module in MODULES:
            torch.testing.assert_close(
                lora_delta(state, config, module), exact_update(run, [0.3, 0.7], module), rtol=1e-5, atol=1e-5
            )
    assert max(report.discarded.values()) < 1e-6
    with pytest.raises(UsageError, match=r"differ in r: 3 and 2; lora_mode 'svd' or 'cat' allows that"):
        merge_checkpoints(folders(run), tmp_path / "factors", lora_mode="factors", weights=[0.3, 0.7])


def test_svd_is_the_best_of_its_rank_and_says_what_it_discards(tmp_path):
    run = adapter_run(tmp_path / "run")
    report = merge_checkpoints(run, tmp_path / "out", scheme="uniform")
    state, config = merged_adapter(tmp_path / "out")
    for module in MODULES:
        exact = exact_update(run, [0.25] * 4, module)
        u, s, v = torch.linalg.svd(exact)
        torch.testing.assert_close(lora_delta(state, config, module), (u[:, :2] * s[:2]) @ v[:2], rtol=1e-4, atol=1e-5)
        lost = float(s[2:].norm() / s.norm())
        assert report.discarded[module.removeprefix("base_model.model.")] == pytest.approx(lost, rel=1e-3)


def test_a_rank_beyond_what_the_product_has_is_padded_with_zeros(tmp_path):
    run = adapter_run(tmp_path / "run", count=2)
    merge_checkpoints(folders(run), tmp_path / "out", scheme="uniform", rank=9)
    state, config = merged_adapter(tmp_path / "out")
    assert state[f"{MODULES[0]}.lora_A.weight"].shape == (9, 5)
    torch.testing.assert_close(
        lora_delta(state, config, MODULES[0]), exact_update(run, [0.5, 0.5], MODULES[0]), rtol=1e-5, atol=1e-5
    )


@quiet
def test_half_precision_adapters_stay_half_precision(tmp_path):
    run = adapter_run(tmp_path / "run", count=2, dtype=torch.bfloat16)
    for mode in ("factors", "svd", "cat"):
        merge_checkpoints(folders(run), tmp_path / mode, scheme="uniform", lora_mode=mode)
        assert {t.dtype for t in merged_adapter(tmp_path / mode)[0].values()} == {torch.bfloat16}


def test_other_adapters_are_averaged_as_they_are(tmp_path):
    for i in (1, 2):
        block = {"base_model.model.q.miss_block": torch.full((2, 3), float(i))}
        write_adapter(tmp_path / f"checkpoint-{i}", block, {"peft_type": "MISS", "r": 2})
    merge_checkpoints(folders(tmp_path), tmp_path / "out", scheme="uniform")
    assert (merged_adapter(tmp_path / "out")[0]["base_model.model.q.miss_block"] == 1.5).all()


# pitfalls


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"base_model_name_or_path": "other"}, "base_model_name_or_path"),
        ({"use_dora": True}, "use_dora"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"target_modules": ["q"]}, "target_modules"),
        ({"target_modules": "q|v"}, "target_modules"),
    ],
)
def test_adapters_of_different_configuration_are_refused(tmp_path, change, key):
    write_adapter(tmp_path / "checkpoint-1", factors(1), {**LORA, **change})
    write_adapter(tmp_path / "checkpoint-2", factors(2))
    with pytest.raises(UsageError, match=f"differ in {key}"):
        merge_checkpoints(folders(tmp_path), tmp_path / "out", scheme="uniform")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [{"r": 3}, {"lora_alpha": 5}, {"use_rslora": True}, {"rank_pattern": {"q": 2}}, {"alpha_pattern": {"q": 2}}],
)
def test_factors_need_equal_scalings(tmp_path, change):
    write_adapter(tmp_path / "checkpoint-1", factors(1), {**LORA, **change})
    write_adapter(tmp_path / "checkpoint-2", factors(2))
    with pytest.raises(UsageError, match=f"differ in {next(iter(change))}"):
        merge_checkpoints(folders(tmp_path), tmp_path / "out", scheme="uniform", lora_mode="factors")


def test_target_modules_are_compared_as_a_set(tmp_path):
    write_adapter(tmp_path / "checkpoint-1", factors(1), {**LORA, "target_modules": ["v", "q"]})
    write_adapter(tmp_path / "checkpoint-2", factors(2))
    merge_checkpoints(folders(tmp_path), tmp_path / "out", scheme="uniform")


def test_adapters_of_different_runs_bring_a_warning(tmp_path):
    for i in (1, 2):
        write_adapter(tmp_path / f"checkpoint-{i}", factors(i))
    with pytest.warns(WeightsmithWarning, match="too different; lora_mode 'svd' or 'cat' keeps it"):
        report = merge_checkpoints(folders(tmp_path), tmp_path / "out", scheme="uniform", lora_mode="factors")
    assert min(report.gaps.values()) > 0.1


@pytest.mark.parametrize(
    ("config", "name"), [({"use_dora": True}, "DoRA"), ({"peft_type": "LOKR"}, "LOKR"), ({"peft_type": "VERA"}, "VERA")]
)
def test_adapters_that_are_not_linear_need_factors_or_dense(tmp_path, config, name):
    for i in (1, 2):
        write_adapter(tmp_path / f"checkpoint-{i}", factors(i), {**LORA, **config})
    for mode in ("svd", "cat"):
        with pytest.raises(UsageError, match=f"lora_mode must be 'factors' .* for '{name}' adapters, got '{mode}'"):
            merge_checkpoints(folders(tmp_path), tmp_path / "out", scheme="uniform", lora_mode=mode)
    with pytest.warns(WeightsmithWarning, match="approximate"):
        merge_checkpoints(folders(tmp_path), tmp_path / "out", scheme="uniform", lora_mode="factors")


@quiet
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "loftq"])
def test_initialisations_that_change_the_base_only_allow_what_keeps_rank_and_scaling(tmp_path, start):
    run = adapter_run(tmp_path / "run", count=2, config={**LORA, "init_lora_weights": start})
    with pytest.raises(UsageError, match="PEFT changes the base weights by their rank and scaling"):
        merge_checkpoints(folders(run), tmp_path / "out", scheme="uniform")
    with pytest.warns(WeightsmithWarning, match="only fit the base weights that this initialization has changed"):
        merge_checkpoints(folders(run), tmp_path / "out", scheme="uniform", lora_mode="factors")


def test_grouped_convolutions_allow_factors_only(tmp_path):
    stem = "base_model.model.conv"
    for i in (1, 2):
        state = {f"{stem}.lora_A.weight": torch.randn(4, 2, 3, 3), f"{stem}.lora_B.weight": torch.randn(8, 2, 1, 1)}
        write_adapter(tmp_path / f"checkpoint-{i}", state)
    with pytest.raises(UsageError, match="must be 'factors' for 'conv', a grouped convolution"):
        merge_checkpoints(folders(tmp_path), tmp_path / "out", scheme="uniform")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layer.0.weight"), r"'layer\.0\.weight' is only in the newest"),
        (lambda s: s.update(extra=torch.ones(1)), "'extra' is only in one"),
        (lambda s: s.update({"layer.0.weight": torch.ones(5, 7)}), r"has shapes \(5, 7\) and \(7, 5\)"),
        (
            lambda s: s.update({"layer.0.weight": torch.ones(7, 5).half()}),
            r"float16 and torch.float32 \(dtype= converts",
        ),
        (lambda s: s.update({"layer.0.weight": torch.ones(7, 5).int()}), "int32 and torch.float32"),
    ],
)
def test_checkpoints_that_do_not_match_are_refused_with_the_first_differences(tmp_path, change, message):
    state = layers(0)
    change(state)
    write_model(tmp_path / "checkpoint-1", state)
    write_model(tmp_path / "checkpoint-2", layers(1))
    with pytest.raises(UsageError, match=message):
        merge_checkpoints(folders(tmp_path), tmp_path / "out", scheme="uniform")
    assert not (tmp_path / "out").exists()


def test_dtype_converts_and_lets_dtypes_differ(tmp_path):
    write_model(tmp_path / "checkpoint-1", layers(0, torch.bfloat16))
    write_model(tmp_path / "checkpoint-2", layers(1), dtype="float32")
    merge_checkpoints(folders(tmp_path), tmp_path / "out", scheme="uniform", dtype=torch.float16)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    expected = (layers(0, torch.bfloat16)["layer.0.weight"].double() + layers(1)["layer.0.weight"].double()) / 2
    assert torch.equal(merged["layer.0.weight"], expected.half())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("index", [0, 1])
def test_nan_and_infinity_in_a_tensor_are_named_with_their_file(tmp_path, value, index):
    for i in (0, 1):
        state = layers(i)
        if i == index:
            state["layer.2.weight"][3, 3] = value
        write_model(tmp_path / f"checkpoint-{i + 1}", state)
    message = rf"layer\.2\.weight in .*checkpoint-{index + 1}/model\.safetensors holds NaN or infinity"
    with pytest.raises(UsageError, match=message):
        merge_checkpoints(folders(tmp_path), tmp_path / "out", scheme="uniform")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_nan_in_an_adapter_is_refused_too(tmp_path):
    state = factors(1)
    state[f"{MODULES[0]}.lora_A.weight"][0, 0] = float("nan")
    write_adapter(tmp_path / "checkpoint-1", state)
    write_adapter(tmp_path / "checkpoint-2", factors(2))
    with pytest.raises(UsageError, match=r"checkpoint-1/adapter_model\.safetensors holds NaN"):
        merge_checkpoints(folders(tmp_path), tmp_path / "out", scheme="uniform")


def test_finite_values_whose_squares_overflow_float32_are_no_error(tmp_path):
    for i in (1, 2):
        write_model(tmp_path / f"checkpoint-{i}", {"w": torch.tensor([1e30 * i]).bfloat16()})
    report = merge_checkpoints(folders(tmp_path), tmp_path / "out", scheme="uniform")
    assert report.distances[0] == pytest.approx(0.5, rel=0.01)


def test_an_existing_folder_is_only_replaced_when_told_so(tmp_path):
    run = model_run(tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(UsageError, match=r"exists; overwrite=True \(--overwrite\) replaces it"):
        merge_checkpoints(folders(run), tmp_path / "out")
    assert (tmp_path / "out" / "mine").is_file()
    merge_checkpoints(folders(run), tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine").exists()


@pytest.mark.parametrize("out", ["run", "run/checkpoint-2", "run/checkpoint-2/merged", "."])
def test_a_source_is_never_written_to(tmp_path, out):
    run = model_run(tmp_path / "run")
    with pytest.raises(UsageError, match="out must be neither in, around nor equal"):
        merge_checkpoints(folders(run), tmp_path / out, overwrite=True)


def test_the_run_folder_may_hold_the_result(tmp_path):
    run = model_run(tmp_path / "run")
    merge_checkpoints(folders(run), run / "merged")
    assert len(folders(run)) == 3


def test_quantized_checkpoints_are_refused(tmp_path):
    run = model_run(tmp_path / "by-config", count=2, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(UsageError, match="is quantized: codes cannot be averaged"):
        merge_checkpoints(folders(run), tmp_path / "out")
    write_model(tmp_path / "checkpoint-1", {"layer.qweight": torch.ones(2, dtype=torch.int32)})
    with pytest.raises(UsageError, match=r"is quantized \(layer\.qweight\)"):
        merge_checkpoints(folders(tmp_path), tmp_path / "out", scheme="uniform")


def test_averaged_batch_norm_statistics_bring_a_warning(tmp_path):
    for i in (1, 2):
        state = {"bn.running_mean": torch.full((3,), float(i)), "bn.num_batches_tracked": torch.tensor(i)}
        write_model(tmp_path / f"checkpoint-{i}", state)
    with pytest.warns(WeightsmithWarning, match="update_bn"):
        merge_checkpoints(folders(tmp_path), tmp_path / "out", scheme="uniform")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged["bn.running_mean"].tolist() == [1.5] * 3
    assert merged["bn.num_batches_tracked"] == 2


def test_pickles_are_read_only_when_told_so(tmp_path):
    for i in (1, 2):
        folder = tmp_path / f"checkpoint-{i}"
        folder.mkdir()
        torch.save(layers(i), folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"a pickle; allow_pickle=True"):
        merge_checkpoints(folders(tmp_path), tmp_path / "out", scheme="uniform")
    merge_checkpoints(folders(tmp_path), tmp_path / "out", scheme="uniform", allow_pickle=True)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(
        merged["layer.1.weight"], (layers(1)["layer.1.weight"] + layers(2)["layer.1.weight"]) / 2
    )


def test_a_pickle_that_holds_more_than_tensors_is_refused(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    torch.save({"f": print}, tmp_path / "checkpoint-1" / "pytorch_model.bin")
    with pytest.raises(UsageError, match="cannot be read as plain tensors"):
        merge_checkpoints(folders(tmp_path), tmp_path / "out", scheme="uniform", allow_pickle=True)


def test_adapters_and_models_do_not_mix(tmp_path):
    write_adapter(tmp_path / "checkpoint-1", factors(1))
    write_model(tmp_path / "checkpoint-2", layers(1))
    with pytest.raises(UsageError, match="all adapters or all models"):
        merge_checkpoints(folders(tmp_path), tmp_path / "out", scheme="uniform")


def test_other_arguments_out_of_range_are_refused(tmp_path):
    run = adapter_run(tmp_path / "run", count=2)
    for wrong, message in (
        ({"lora_mode": "sdv"}, "did you mean 'svd'"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"chunk_mb": 0}, "chunk_mb must be above 0"),
        ({"lora_mode": "dense"}, "needs the base model's folder"),
    ):
        with pytest.raises(UsageError, match=message):
            merge_checkpoints(folders(run), tmp_path / "out", **wrong)


def test_a_failure_while_writing_leaves_what_was_there(tmp_path, monkeypatch):
    run = model_run(tmp_path / "run")
    merge_checkpoints(folders(run), tmp_path / "out", scheme="uniform")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        merge_checkpoints(folders(run), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_a_newest_checkpoint_without_weights_is_incomplete(tmp_path):
    run = model_run(tmp_path / "run")
    (run / "checkpoint-3/model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"checkpoint-3 is incomplete: it has no weights.*--steps 1 2"):
        merge_checkpoints(folders(run), tmp_path / "out")


def test_a_newest_checkpoint_without_the_adapter_is_incomplete(tmp_path):
    for i in (1, 2, 3):
        folder = write_model(tmp_path / f"checkpoint-{i}", {**layers(i), "layer.0.bone.default": torch.ones(2, 7)})
        if i < 3:
            save_file({"bone.layer.0": torch.ones(2, 7)}, folder / "bone.safetensors")
            (folder / "bone_config.json").write_text('{"variant": "miss"}')
    with pytest.raises(UsageError, match=r"checkpoint-3 is incomplete: it has no bone_config\.json"):
        merge_checkpoints(folders(tmp_path), tmp_path / "out", scheme="uniform")


def test_shards_whose_index_is_lost_are_refused(tmp_path):
    for i in (1, 2, 3):
        write_checkpoint(layers(i), tmp_path / f"checkpoint-{i}", max_shard_bytes=150)
        (tmp_path / f"checkpoint-{i}/model.safetensors.index.json").unlink()
    with pytest.raises(
        UsageError, match=r"holds model-00001-of-00004\.safetensors, which is a part of a model, and no"
    ):
        merge_checkpoints(folders(tmp_path), tmp_path / "out", scheme="uniform")


def test_pickled_shards_whose_index_is_lost_are_refused(tmp_path):
    for i in (1, 2):
        (tmp_path / f"checkpoint-{i}").mkdir()
        for part, name in enumerate(sorted(layers(i))[:2], start=1):
            file = tmp_path / f"checkpoint-{i}/pytorch_model-{part:05d}-of-00003.bin"
            torch.save({name: layers(i)[name]}, file)
    with pytest.raises(UsageError, match=r"neither pytorch_model\.bin nor"):
        merge_checkpoints(folders(tmp_path), tmp_path / "out", scheme="uniform", allow_pickle=True)


def test_a_pickle_with_its_tensors_one_level_down_is_one_clear_line(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    torch.save({"state_dict": layers(1), "epoch": 3}, tmp_path / "checkpoint-1/pytorch_model.bin")
    with pytest.raises(UsageError, match=r"must hold tensors by name, got \w+ under 'state_dict'") as caught:
        merge_checkpoints(folders(tmp_path), tmp_path / "out", allow_pickle=True)
    assert "\n" not in str(caught.value)


def test_values_that_a_smaller_dtype_cannot_hold_are_refused(tmp_path):
    for i in (1, 2):
        write_model(tmp_path / f"checkpoint-{i}", {"w": torch.tensor([1.0, -1e6])})
    for dtype in (torch.float32, torch.bfloat16):
        merge_checkpoints(folders(tmp_path), tmp_path / str(dtype), scheme="uniform", dtype=dtype)
    with pytest.raises(UsageError, match=r"w does not fit into torch\.float16: its largest value is 1e\+06"):
        merge_checkpoints(folders(tmp_path), tmp_path / "out", scheme="uniform", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["svd", "cat", "factors"])
def test_factors_that_a_smaller_dtype_cannot_hold_are_refused(tmp_path, mode):
    for i in (1, 2):
        write_adapter(tmp_path / f"checkpoint-{i}", {name: 1e7 * t for name, t in factors(i).items()})
    options = {"scheme": "uniform", "dtype": torch.float16, "lora_mode": mode}
    with pytest.raises(UsageError, match=r"lora_\w\.weight does not fit into torch\.float16"):
        merge_checkpoints(folders(tmp_path), tmp_path / "out", **options)


def test_a_dense_sum_that_the_base_cannot_hold_is_refused(tmp_path):
    stem = "base_model.model.q.lora_"
    for i in (1, 2):
        state = {f"{stem}A.weight": torch.full((1, 2), 300.0), f"{stem}B.weight": torch.full((2, 1), 300.0)}
        write_adapter(tmp_path / f"checkpoint-{i}", state, {**LORA, "r": 1, "lora_alpha": 1})
    base = write_model(tmp_path / "base", {"q.weight": torch.ones(2, 2, dtype=torch.float16)})
    with pytest.raises(UsageError, match=r"q\.weight does not fit into torch\.float16"):
        merge_checkpoints(folders(tmp_path), tmp_path / "out", scheme="uniform", lora_mode="dense", base=base)


def test_a_decay_of_adapters_is_averaged_as_updates(tmp_path):
    run = adapter_run(tmp_path / "run", count=3)
    report = merge_checkpoints(folders(run), tmp_path / "out", decay="linear", lora_mode="cat")
    assert [share.weight for share in report.shares] == pytest.approx([0.25, 0.5, 0.25])
    state, config = merged_adapter(tmp_path / "out")
    for module in MODULES:
        torch.testing.assert_close(
            lora_delta(state, config, module), exact_update(run, [0.25, 0.5, 0.25], module), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("falls", [False, True])
def test_a_decay_of_a_run_that_has_decayed_brings_a_warning(tmp_path, falls):
    run = model_run(tmp_path / "run")
    log = [{"step": i, "loss": 1.0, "learning_rate": 0.1 / i if falls else 0.1} for i in (1, 2, 3)]
    write_state(run / "checkpoint-3", log)
    if falls:
        with pytest.warns(WeightsmithWarning, match=r"from 0\.0333 to 0\.05\): decay is meant for a constant one"):
            merge_checkpoints(folders(run), tmp_path / "out", decay="cosine")
    else:
        assert merge_checkpoints(folders(run), tmp_path / "out", decay="cosine").notes == []


# greedy soup


def test_a_greedy_soup_leaves_out_what_has_diverged():
    scores = {0: float("nan"), 1: 1.0, 2: 2.0}
    score = lambda members: sum(scores[i] for i in members) / len(members) ** 0.5  # noqa: E731
    assert greedy_members(3, score) == [1, 2]
    with pytest.raises(UsageError, match="NaN for each of the 2 models"):
        greedy_members(2, lambda _: float("nan"))


def test_a_greedy_soup_keeps_members_that_do_not_hurt():
    models, target = [1.0, 3.0, 9.0, 2.2], 2.0
    score = lambda members: -abs(sum(models[i] for i in members) / len(members) - target)  # noqa: E731
    assert greedy_members(4, score) == [3]  # every other member takes the mean further from 2
    assert greedy_members(3, score) == [0, 1]


def test_a_greedy_soup_of_folders_merges_what_it_keeps(tmp_path):
    for i, value in enumerate((1.0, 3.0, 9.0)):
        write_model(tmp_path / f"checkpoint-{i + 1}", {"w": torch.tensor([value])})
    score = lambda folder: -abs(load_file(folder / "model.safetensors")["w"].item() - 2.0)  # noqa: E731
    report = greedy_soup(folders(tmp_path), tmp_path / "out", score)
    assert [share.checkpoint.step for share in report.shares] == [1, 2]
    assert score(tmp_path / "out") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "out"]


@pytest.mark.parametrize("mode", ["svd", "cat"])
def test_stacked_factors_of_adapted_parameters_are_not_taken_for_one_matrix(tmp_path, mode):
    config = {**LORA, "target_parameters": ["experts.down_proj"]}
    run = adapter_run(tmp_path / "run", config=config)
    with pytest.raises(UsageError, match="LoRA with target_parameters"):
        merge_checkpoints(run, tmp_path / "out", lora_mode=mode)
    with pytest.warns(WeightsmithWarning, match="approximate"):
        merge_checkpoints(run, tmp_path / "out", lora_mode="factors")


@pytest.mark.parametrize("key", ["layer_replication", "alora_invocation_tokens"])
def test_adapters_that_the_base_files_do_not_show_are_not_merged_into_them(tmp_path, key):
    run = adapter_run(tmp_path / "run", config={**LORA, key: [[0, 1]]})
    base = write_model(tmp_path / "base", {"layer.q.weight": torch.zeros(6, 5), "layer.v.weight": torch.zeros(6, 5)})
    with pytest.raises(UsageError, match=f"'dense' cannot merge adapters with {key}"):
        merge_checkpoints(run, tmp_path / "out", lora_mode="dense", base=base)


def test_a_dtype_without_fractions_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"dtype must be float64.*got torch.int32"):
        merge_checkpoints(adapter_run(tmp_path / "run"), tmp_path / "out", dtype=torch.int32)


def test_pickled_parameters_are_tensors_too(tmp_path):
    for step in (1, 2):
        folder = write_model(tmp_path / "run" / f"checkpoint-{step}", {"w": torch.zeros(1)})
        (folder / "model.safetensors").unlink()
        torch.save({"w": torch.nn.Parameter(torch.full((2,), float(step)))}, folder / "pytorch_model.bin")
    with pytest.warns(WeightsmithWarning, match="fewer than"):
        merge_checkpoints(tmp_path / "run", tmp_path / "out", scheme="uniform", allow_pickle=True)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["w"], torch.full((2,), 1.5))


def test_a_state_dict_in_a_pt_file_is_read_when_told_so(tmp_path):
    for step in (1, 2):
        folder = write_model(tmp_path / "run" / f"checkpoint-{step}", {"w": torch.zeros(1)})
        (folder / "model.safetensors").unlink()
        torch.save({"w": torch.full((2,), float(step))}, folder / "weights.pt")
        torch.save({"state": {}}, folder / "optimizer.pt")
    options = {"scheme": "uniform", "values": [1.0, 1.0]}
    checkpoints = [tmp_path / "run" / f"checkpoint-{step}" for step in (1, 2)]
    with pytest.raises(UsageError, match="allow_pickle=True"):
        merge_checkpoints(checkpoints, tmp_path / "out", **options)
    merge_checkpoints(checkpoints, tmp_path / "out", allow_pickle=True, **options)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["w"], torch.full((2,), 1.5))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "merge_report.json", "model.safetensors"
    ]  # fmt: skip
