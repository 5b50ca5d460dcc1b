from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from weightsmith import cli
from weightsmith.core.errors import UsageError
from weightsmith.lab.tasks.restoration import network
from weightsmith.prune import MagnitudePruner, save_sparse
from weightsmith.tools.restore import load_network, restore_tiled, similarity

Image = pytest.importorskip("PIL.Image")


def trained():
    torch.manual_seed(0)
    return network("promptir-4")()


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_an_image_is_restored_and_shown_beside_the_original(tmp_path, capsys, mode):
    image = np.random.default_rng(0).integers(0, 256, (23, 31, 3), np.uint8)
    Image.fromarray(image).convert(mode).save(tmp_path / "in.png")
    save_file(trained().state_dict(), tmp_path / "m.safetensors")
    with pytest.raises(SystemExit) as ended:
        options = {"checkpoint": tmp_path / "m.safetensors", "out": tmp_path / "out.png", "model": "promptir-4"}
        options["side-by-side"] = tmp_path / "two.png"
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        cli.main(["restore", str(tmp_path / "in.png"), *words])
    assert ended.value.code == 0
    assert "Restored" in capsys.readouterr().out
    before, after = pixels(tmp_path / "in.png"), pixels(tmp_path / "out.png")
    x = torch.from_numpy(before.copy()).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        expected = (trained().eval()(x).clamp(0, 1)[0].permute(1, 2, 0) * 255).round().byte().numpy()
    assert np.array_equal(after, expected)
    both = pixels(tmp_path / "two.png")
    assert both.shape == (23 + 16, 62, 3)
    assert np.array_equal(both[16:], np.concatenate([before, after], 1))


def test_dense_network_ticket_and_clean_image_are_drawn_side_by_side(tmp_path, capsys):
    image = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "in.png")
    Image.fromarray(255 - image).save(tmp_path / "clean.png")
    model = trained()
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    pruner = MagnitudePruner(model)
    pruner.prune_(0.9)
    save_sparse(model, tmp_path / "t.safetensors", masks=pruner.masks)
    with pytest.raises(SystemExit) as ended:
        options = {"checkpoint": "m.safetensors", "ticket": "t.safetensors", "clean": "clean.png", "out": "out.png"}
        words = [word for name, value in options.items() for word in (f"--{name}", str(tmp_path / value))]
        cli.main(["restore", str(tmp_path / "in.png"), "--model", "promptir-4", *words])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert all(f"{name}: PSNR" in told for name in ("before", "restored", "ticket"))
    assert "SSIM" in told
    drawn = pixels(tmp_path / "out.compared.png")[16:]
    first, second, third, last = np.split(drawn, 4, axis=1)
    assert np.array_equal(first, image)
    assert np.array_equal(last, 255 - image)
    assert np.array_equal(second, pixels(tmp_path / "out.png"))
    assert not np.array_equal(second, third)


def test_weights_of_every_kind_of_file(tmp_path):
    model = trained()
    pruner = MagnitudePruner(model)
    pruner.prune_(0.5)
    save_sparse(model, tmp_path / "sparse.safetensors", masks=pruner.masks)
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    published = {f"net.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": published}, tmp_path / "published.ckpt")
    for name in ("sparse.safetensors", "dense.safetensors", "published.ckpt"):
        found = load_network("promptir-4", tmp_path / name)
        for key, value in model.state_dict().items():
            assert torch.equal(found.state_dict()[key], value)


def test_tiles_of_a_local_network_give_the_whole():
    model = torch.nn.Conv2d(3, 3, 1)
    images = torch.rand(1, 3, 37, 50)
    with torch.no_grad():
        torch.testing.assert_close(restore_tiled(model, images, tile=16, overlap=4), model(images))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.png", "--checkpoint", "m.safetensors", "--out", "o.png"], "cannot be read"),
        (["in.png", "--out", "o.png"], "--checkpoint names"),
        (["in.png", "--checkpoint", "none.pt", "--out", "o.png"], "no such file"),
        (["in.png", "--checkpoint", "m.safetensors", "--out", "o.txt"], "must end like an image"),
        (["in.png", "--checkpoint", "m.safetensors", "--out", "o.png"], "does not fit promptir"),
        (["in.png", "--checkpoint", "m.safetensors", "--out", "in.png"], "is a file that is read"),
        (["in.png", "--checkpoint", "m.safetensors", "--out", "o.png", "--side-by-side", "o.png"], "another file"),
        (["in.png", "--checkpoint", "m.safetensors", "--out", "o.png", "--clean", "large.png"], "size of the image"),
        (["in.png", "--checkpoint", "m.safetensors", "--out", "o.png", "--model", "promptir-4", "--tile", "8",
          "--overlap", "4"], "overlap below half"),
    ],
)  # fmt: skip
def test_bad_use_exits_with_2_and_writes_nothing(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save("in.png")
    Image.fromarray(np.zeros((9, 12, 3), np.uint8)).save("large.png")
    save_file(trained().state_dict(), "m.safetensors")
    with pytest.raises(SystemExit) as ended:
        cli.main(["restore", *words])
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "o.png").exists()


def test_a_file_that_is_no_weights_is_said(tmp_path):
    (tmp_path / "m.pt").write_text("hello")
    with pytest.raises(UsageError, match="cannot be read"):
        load_network("promptir-4", tmp_path / "m.pt")


def test_structural_similarity_is_that_of_the_authors_code():
    golden = load_file(Path(__file__).parents[1] / "golden/mir-l.safetensors")
    pairs = zip(golden["met32.clean"], golden["met32.restored"], strict=True)
    found = [similarity(*(side.clamp(0, 1).permute(1, 2, 0).numpy() for side in pair)) for pair in pairs]
    assert np.mean(found) == pytest.approx(golden["met32.psnr_ssim"][1].item(), abs=1e-5)
