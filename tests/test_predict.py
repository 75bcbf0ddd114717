"""predict.py: images of every kind and size, names, tiles, probabilities, export."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import predict
from checkpoint import load_checkpoint, save_checkpoint
from config import load_config
from errors import UserError
from images import read_image
from model import build_model

COLOURS = {"background": [0, 0, 0], "square": [255, 0, 0], "circle": [0, 0, 255]}


def make_checkpoint(path: Path, *overrides: str) -> Path:
    """A checkpoint of an untrained model whose batch norm has seen noise."""
    config = load_config([ROOT / "configs/best.yaml"], ["precision=float32", *overrides])
    config["classes"] = COLOURS
    torch.manual_seed(0)
    model = build_model(config)
    with torch.no_grad():
        model(torch.rand(4, config["in_channels"], 32, 32))
    save_checkpoint(path, {"config": config, "model": model.state_dict()})
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "best.pt")


def save_noise(path: Path, height: int, width: int, mode: str = "RGB", **how: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 4), np.uint8)
    Image.fromarray(pixels, mode="RGBA").convert(mode).save(path, **how)
    return path


# ---- the command line


def test_every_kind_of_image(checkpoint: Path, tmp_path: Path, script: Callable) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90°
    folder = tmp_path / "in"
    sizes = {"grey": (20, 31), "palette": (17, 16), "rgba": (40, 9), "tiny": (1, 1), "bits": (5, 8)}
    modes = {"grey": "L", "palette": "P", "rgba": "RGBA", "tiny": "RGB", "bits": "1"}
    for name, mode in modes.items():
        save_noise(folder / "deep" / f"{name}.png", *sizes[name], mode=mode)
    save_noise(folder / "turned.JPG", 12, 30, exif=exif)
    sizes["turned"] = (30, 12)
    (folder / "notes.txt").write_text("no image")
    out = tmp_path / "out"
    done = script("predict.py", "--checkpoint", checkpoint, folder, "--out", out, "--probabilities")
    assert done.returncode == 0, done.stderr
    kinds = ("mask.png", "overlay.png", "probabilities.npz")
    expected = {f"{name}_{kind}" for name in sizes for kind in kinds} | {"contact_sheet.png"}
    assert {path.name for path in out.iterdir()} == expected
    for name, size in sizes.items():
        mask, overlay = (Image.open(out / f"{name}_{kind}.png") for kind in ("mask", "overlay"))
        indices = np.array(mask)
        assert indices.shape == size == overlay.size[::-1]
        # A palette file: as indices the classes, as RGB the colours of the masks.
        palette = np.array(list(COLOURS.values()), np.uint8)
        assert (np.array(mask.convert("RGB")) == palette[indices]).all()
        with np.load(out / f"{name}_probabilities.npz") as stored:
            assert stored["classes"].tolist() == list(COLOURS)
            assert np.abs(stored["probabilities"].sum(axis=0) - 1).max() < 1e-5
            assert (stored["probabilities"].argmax(axis=0) == indices).all()
        [line] = [line for line in done.stdout.splitlines() if f"/{name}." in line.lower()]
        share = f"{(indices == 2).mean():.1%}"
        assert f"{size[1]}×{size[0]}" in line and f"circle {share}" in line


def test_bad_images_are_named_and_the_others_predicted(
    checkpoint: Path, tmp_path: Path, script: Callable
) -> None:
    good, bad = save_noise(tmp_path / "good.png", 9, 9), tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG no more")
    command = ("predict.py", "--checkpoint", checkpoint, bad, good, "--out", tmp_path / "out")
    done = script(*command)
    assert done.returncode == 2 and "1 of 2 images" in done.stderr and "Trace" not in done.stderr
    assert f"problem: {bad}: cannot be read" in done.stdout
    assert (tmp_path / "out/good_mask.png").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["none.png"], "none.png: no such file or folder"),
        (["{empty}"], "holds no image"),
        ([], "give images or a folder"),
        (["--checkpoint", "none.pt", "x.png"], "none.pt: no such checkpoint"),
        (["{image}", "--out", "{folder}"], "would overwrite an image given"),
    ],
)
def test_mistakes_get_one_line(
    checkpoint: Path, tmp_path: Path, script: Callable, arguments: list[str], says: str
) -> None:
    (tmp_path / "empty").mkdir()
    save_noise(tmp_path / "a.png", 8, 8)
    places = {"empty": tmp_path / "empty", "folder": tmp_path, "image": tmp_path}
    save_noise(tmp_path / "a_mask.png", 8, 8)  # what the mask of a.png would be called
    before = (tmp_path / "a_mask.png").read_bytes()
    command = [argument.format(**places) for argument in arguments]
    if "{folder}" in arguments:
        command[0] = str(tmp_path / "a.png")
        command.insert(1, str(tmp_path / "a_mask.png"))
    chosen = [] if "--checkpoint" in command else ["--checkpoint", checkpoint]
    done = script("predict.py", *command, *chosen)
    assert done.returncode == 2 and says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert (tmp_path / "a_mask.png").read_bytes() == before


def test_hundreds_of_images_and_a_contact_sheet_of_some(
    checkpoint: Path, tmp_path: Path, script: Callable
) -> None:
    for i in range(130):
        save_noise(tmp_path / "in" / f"{i}.png", 8, 8)
    out = tmp_path / "out"
    done = script("predict.py", "--checkpoint", checkpoint, tmp_path / "in", "--out", out)
    assert done.returncode == 0 and f"({predict.SHEET} shown)" in done.stdout
    assert len(list(out.glob("*_mask.png"))) == 130


# ---- names


def test_names_never_collide(tmp_path: Path) -> None:
    files = ["a/x.png", "b/x.png", "x.jpg", "X.PNG", "a_x.png", "a_x_png.png", "b/only.png"]
    paths = [save_noise(tmp_path / name, 2, 2) for name in files]
    names = predict.find_images([*paths, tmp_path, tmp_path / "a"], tmp_path / "out")
    assert sorted(map(str, names.values())) == sorted(map(str, paths))  # each once
    assert len({name.lower() for name in names}) == len(files)
    assert names["only"] == tmp_path / "b/only.png" and names["a_x"] == tmp_path / "a_x.png"


def test_what_was_predicted_before_is_not_predicted(tmp_path: Path) -> None:
    save_noise(tmp_path / "a.png", 2, 2)
    save_noise(tmp_path / "out/a_mask.png", 2, 2)
    assert list(predict.find_images([tmp_path], tmp_path / "out")) == ["a"]


# ---- tiles


@pytest.mark.parametrize("size", [(300, 300), (129, 417), (50, 260)])
@pytest.mark.parametrize("kernel", [3, 7])
def test_tiles_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], kernel: int
) -> None:
    """With tiles far smaller than the image, seams included, it is as if there were none."""
    sizes = f"encoder=[[4, {kernel}], [4, 3], [8, {kernel}]]"
    wide = make_checkpoint(tmp_path / "a.pt", sizes, "decoder=[[8, 3], [4, 3], [4, 3], [4, 3]]")
    model, config = predict.load_model(wide, "cpu")
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
    whole = predict.predict_probabilities(model, config, image)
    monkeypatch.setattr(predict, "TILE", 128)
    tiled = predict.predict_probabilities(model, config, image)
    assert tiled.shape == whole.shape == (3, *size)
    assert (tiled - whole).abs().max() < 1e-5
    monkeypatch.setattr(predict, "margin_of", lambda config: 0)  # the margin is what does it
    assert (predict.predict_probabilities(model, config, image) - whole).abs().max() > 1e-3


def test_python_use_is_what_the_script_does(checkpoint: Path, tmp_path: Path) -> None:
    path = save_noise(tmp_path / "a.png", 33, 20)
    model, config = predict.load_model(checkpoint)
    mask = predict.predict_mask(model, config, path)
    assert mask.dtype == torch.uint8 and mask.shape == (33, 20)
    pixels = torch.from_numpy(read_image(path, 3).copy()).permute(2, 0, 1)
    with torch.no_grad():
        expected = model(pixels[None] / 255).argmax(dim=1)[0]
    assert torch.equal(mask.long(), expected)


def test_a_model_of_resized_images_sees_resized_ones(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "best.pt", "resize=[32, 48]")
    model, config = predict.load_model(path)
    image = torch.randint(0, 256, (3, 75, 100), dtype=torch.uint8)
    seen: list[tuple] = []
    model.register_forward_pre_hook(lambda _module, args: seen.append(tuple(args[0].shape)))
    assert predict.predict_mask(model, config, image).shape == (75, 100)
    assert seen == [(1, 3, 32, 48)]


# ---- for use elsewhere


def test_exported_program_needs_torch_alone(
    checkpoint: Path, tmp_path: Path, script: Callable
) -> None:
    done = script("predict.py", "--checkpoint", checkpoint, "--export", tmp_path / "m.pt2")
    assert done.returncode == 0, done.stderr
    assert "UserWarning" not in done.stderr
    use = (
        "import torch, sys\n"
        "program = torch.export.load('m.pt2').module()\n"
        "shapes = [(1, 3, 16, 16), (2, 3, 33, 97), (3, 3, 128, 128), (1, 3, 1, 7)]\n"
        "make = torch.Generator().manual_seed(1)\n"
        "images = [torch.randint(0, 256, s, generator=make, dtype=torch.uint8) for s in shapes]\n"
        "torch.save([(i, program(i).detach()) for i in images], 'out.pt')\n"
        "assert not {'model', 'config', 'predict'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-I", "-c", use]  # isolated: nothing of the project is on the path
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    model, _ = predict.load_model(checkpoint, "cpu")
    for images, logits in torch.load(tmp_path / "out.pt"):
        with torch.no_grad():
            expected = model(images / 255)
        assert logits.shape == expected.shape
        assert (logits - expected).abs().max() < 1e-4


def test_slim_weights_predict_alike(checkpoint: Path, tmp_path: Path, script: Callable) -> None:
    small = tmp_path / "small.pt"
    assert script("predict.py", "--checkpoint", checkpoint, "--slim", small).returncode == 0
    assert small.stat().st_size < 0.55 * checkpoint.stat().st_size
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    first, second = (
        predict.predict_probabilities(*predict.load_model(path, "cpu"), image)
        for path in (checkpoint, small)
    )
    assert (first - second).abs().max() < 0.01


def test_slim_keeps_what_evaluation_reports(checkpoint: Path, tmp_path: Path) -> None:
    content = load_checkpoint(checkpoint, torch.device("cpu"))
    cost = {"images_seen": 7, "train_seconds": 1.5}
    save_checkpoint(tmp_path / "a.pt", content | {"cost": cost, "optimizer": {}})
    predict.slim(tmp_path / "a.pt", tmp_path / "b.pt")
    slim = load_checkpoint(tmp_path / "b.pt", torch.device("cpu"))
    assert slim["cost"] == cost and "optimizer" not in slim
    assert json.dumps(slim["config"]) == json.dumps(content["config"])


def test_export_of_a_program_that_is_wrong_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = predict.load_model(checkpoint, "cpu")
    right = predict.Exportable.forward
    monkeypatch.setattr(predict.Exportable, "forward", lambda s, images: right(s, images) + 0.1)
    with pytest.raises(UserError, match="not written"):
        predict.export(model, 3, tmp_path / "m.pt2")
    assert not (tmp_path / "m.pt2").exists()
