"""Tests of predict.py: images of every kind and size, bad files, tiles, export, slim weights."""

from pathlib import Path

from common import ROOT, UserError

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from config import load_config
from model import build_model, save_checkpoint

NOISE = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 129, 417), np.uint8))
COLOURS = {"background": [0, 0, 0], "square": [255, 0, 0], "circle": [0, 0, 255]}
USE = """
import torch, sys
program = torch.export.load(f"{sys.argv[1]}/m.pt2").module()
shapes = [(1, 3, 16, 16), (2, 3, 33, 97), (3, 3, 128, 128), (1, 3, 1, 7)]
images = [torch.randint(0, 256, shape, dtype=torch.uint8) for shape in shapes]
torch.save([(i, program(i).detach()) for i in images], f"{sys.argv[1]}/out.pt")
assert not {"model", "config", "predict", "torchvision"} & set(sys.modules)
"""


def make_checkpoint(path: Path, *overrides: str) -> Path:
    config = load_config([ROOT / "configs/best.yaml"], ["precision=float32", *overrides])
    config["classes"] = COLOURS
    torch.manual_seed(0)
    model = build_model(config)
    model(torch.rand(4, 3, 32, 32))  # untrained, but its batch norm has statistics
    save_checkpoint(path, {"config": config, "model": model.state_dict(), "optimizer": {}})
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "best.pt")


def save_noise(path: Path, height: int, width: int, mode: str = "RGB", **how: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 4), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **how)
    return path


def test_every_kind_of_image(checkpoint: Path, tmp_path: Path, script) -> None:
    """Folders are mirrored, earlier results left out; Python does what the script does."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90°
    sizes = {"grey": (20, 31), "palette": (17, 16), "deep/rgba": (40, 9), "tiny": (1, 1)}
    for (name, size), mode in zip(sizes.items(), ("L", "P", "RGBA", "1"), strict=True):
        save_noise(tmp_path / f"{name}.png", *size, mode=mode)
    save_noise(tmp_path / "turned.PNG", 12, 30, exif=exif)
    (tmp_path / "notes.txt").write_text("no image")
    out, model = tmp_path / "out", predict.load_model(checkpoint)
    save_noise(out / "grey_mask.png", 4, 4)
    options = ("--checkpoint", checkpoint, "--out", out, "--probabilities")
    done = script("predict.py", *options, tmp_path)
    assert done.returncode == 0, done.stderr
    assert len([path for path in out.rglob("*") if path.is_file()]) == 3 * 5 + 1
    for name, size in (sizes | {"turned": (30, 12)}).items():
        [path] = tmp_path.glob(f"{name}.*")
        mask, overlay = (Image.open(out / f"{name}_{kind}.png") for kind in ("mask", "overlay"))
        indices = np.array(mask)
        assert indices.shape == size == overlay.size[::-1]
        assert (np.array(mask.convert("RGB")) == np.array([*COLOURS.values()])[indices]).all()
        assert (predict.predict_mask(*model, path).numpy() == indices).all()
        with np.load(out / f"{name}_probabilities.npz") as stored:
            assert stored["classes"].tolist() == list(COLOURS)
            assert np.abs(stored["probabilities"].sum(axis=0) - 1).max() < 1e-5
            assert (stored["probabilities"].argmax(axis=0) == indices).all()
        assert f"{path}  {size[1]}×{size[0]}  background {(indices == 0).mean():.1%}" in done.stdout


def test_bad_images_among_batches(checkpoint: Path, tmp_path: Path, call) -> None:
    bad, out = tmp_path / "in/bad.png", tmp_path / "out"
    paths = [save_noise(tmp_path / f"in/{i}.png", 16 + i % 3, 20) for i in range(70)]
    bad.write_bytes(b"\x89PNG no more")
    options = ("--checkpoint", checkpoint, "--out", out)
    code, text, errors = call(predict.main, *options, tmp_path / "in", "none.png")
    assert code == 2 and errors == "error: 2 of 72 images could not be read, listed above\n"
    assert f"problem: {bad}: cannot be read" in text and "problem: none.png: cannot be" in text
    for path in paths:
        mask = predict.predict_mask(*predict.load_model(checkpoint), path).numpy()
        assert (np.array(Image.open(out / f"{path.stem}_mask.png")) == mask).mean() > 0.99


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path, lost = save_noise(tmp_path / "a.png", 8, 8), "mask would overwrite"
    for other, says in {"a_mask": lost, "a_overlay": lost, "b/a": "has its name"}.items():
        with pytest.raises(UserError, match=says):
            predict.find_images([path, save_noise(tmp_path / f"{other}.png", 8, 8)], tmp_path)


def test_tiles_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ("encoder=[[4, 7], [4, 3], [8, 7]]", "decoder=[[8, 3], [4, 3], [4, 3], [4, 3]]")
    model, config = predict.load_model(make_checkpoint(tmp_path / "a.pt", *sizes), "cpu")
    whole = predict.predict(model, config, NOISE)
    monkeypatch.setattr(predict, "TILE", 128)
    assert (predict.predict(model, config, NOISE) - whole).abs().max() < 1e-5
    model.receptive_radius = 0  # what is seen around a tile does it
    assert (predict.predict(model, config, NOISE) - whole).abs().max() > 1e-3


def test_a_model_of_resized_images_sees_resized_ones(tmp_path: Path) -> None:
    model = predict.load_model(make_checkpoint(tmp_path / "best.pt", "resize=[32, 48]"))
    seen: list[tuple] = []
    model[0].register_forward_pre_hook(lambda _module, args: seen.append(tuple(args[0].shape)))
    assert predict.predict(*model, NOISE).shape[2:] == (129, 417) and seen == [(1, 3, 32, 48)]


def test_export_needs_torch_alone(checkpoint: Path, tmp_path: Path, call, script) -> None:
    assert call(predict.main, "--checkpoint", checkpoint, "--export", tmp_path / "m.pt2")[0] == 0
    assert script("-I", "-c", USE, tmp_path).returncode == 0  # isolated: without the project
    model, _ = predict.load_model(checkpoint, "cpu")
    for images, logits in torch.load(tmp_path / "out.pt"):
        assert (logits - model(images / 255).detach()).abs().max() < 1e-4


def test_slim_weights_predict_alike(checkpoint: Path, tmp_path: Path, call) -> None:
    slim = tmp_path / "slim.pt"
    assert call(predict.main, "--checkpoint", checkpoint, "--slim", slim)[0] == 0
    assert slim.stat().st_size < 0.55 * checkpoint.stat().st_size
    models = [predict.load_model(path, "cpu") for path in (checkpoint, slim)]
    first, second = (predict.predict(*model, NOISE) for model in models)
    assert models[0][1] == models[1][1] and (first - second).abs().max() < 0.01
