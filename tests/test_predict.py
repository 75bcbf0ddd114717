"""Tests of predict.py: images of every kind and size, bad files, tiles, export, slim weights."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from checkpoints import save_checkpoint
from common import ROOT, UserError
from config import load_config
from images import read_mask
from model import build_model

NOISE = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 129, 417), np.uint8))
COLOURS = {"background": [0, 0, 0], "square": [255, 0, 0], "circle": [0, 0, 255]}
SMALL = ("encoder=[[4, 3], [8, 3]]", "decoder=[[8, 3], [4, 3], [4, 3]]")
USE = """
import torch, sys
shapes = [(1, 3, 16, 16), (2, 3, 33, 97), (1, 3, 1, 7)]
for name in sys.argv[2:]:
    program = torch.export.load(f"{sys.argv[1]}/{name}.pt2").module()
    pairs = []
    for shape in shapes:
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        pairs.append((images, program(images).detach()))
    torch.save(pairs, f"{sys.argv[1]}/{name}.out")
assert not {"model", "config", "predict", "torchvision"} & set(sys.modules)
"""


def make_checkpoint(path: Path, *overrides: str) -> Path:
    config = load_config([ROOT / "configs/best.yaml"], ["precision=float32", *overrides])
    config["classes"] = dict(COLOURS, circle=[COLOURS["circle"], [9, 9, 9]])  # two colours
    torch.manual_seed(0)
    model = build_model(config)
    model(torch.rand(4, config["in_channels"], 32, 32))  # fills the statistics of batch norm
    save_checkpoint(path, {"config": config, "model": model.state_dict(), "optimizer": {}})
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "best.pt", *SMALL)


def save_noise(path: Path, height: int, width: int, mode: str = "RGB", **how: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 4), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **how)
    return path


def test_every_kind_of_image(checkpoint: Path, tmp_path: Path, call) -> None:
    """Folders are mirrored, earlier results left out; Python does what the script does."""
    save_noise(tmp_path / "grey.png", 20, 31, mode="L")
    save_noise(tmp_path / "palette.png", 17, 16, mode="P")
    save_noise(tmp_path / "deep/rgba.png", 40, 9, mode="RGBA")
    save_noise(tmp_path / "tiny.png", 1, 1, mode="1")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90°
    save_noise(tmp_path / "turned.PNG", 12, 30, exif=exif)
    sizes = {
        "grey.png": (20, 31),
        "palette.png": (17, 16),
        "deep/rgba.png": (40, 9),
        "tiny.png": (1, 1),
        "turned.PNG": (30, 12),
    }
    (tmp_path / "notes.txt").write_text("no image")
    out = tmp_path / "out"
    save_noise(out / "grey_mask.png", 4, 4)
    options = ("--checkpoint", checkpoint, "--out", out, "--probabilities")
    code, text, _ = call(predict.main, *options, tmp_path)
    assert code == 0
    assert len([path for path in out.rglob("*") if path.is_file()]) == 3 * 5 + 1

    model, config = predict.load_model(checkpoint)
    for name, (height, width) in sizes.items():
        target = out / Path(name).with_suffix("")
        mask = Image.open(f"{target}_mask.png")
        indices = np.array(mask)
        assert indices.shape == (height, width)
        colours = np.array(list(COLOURS.values()))
        assert (np.array(mask.convert("RGB")) == colours[indices]).all()
        assert Image.open(f"{target}_overlay.png").size == (width, height)
        assert (predict.predict_mask(model, config, tmp_path / name).numpy() == indices).all()
        with np.load(f"{target}_probabilities.npz") as stored:
            assert stored["classes"].tolist() == list(COLOURS)
            assert np.abs(stored["probabilities"].sum(axis=0) - 1).max() < 1e-5
            assert (stored["probabilities"].argmax(axis=0) == indices).all()
        background = (indices == 0).mean()
        line = f"{tmp_path / name}  {width}×{height}  background {background:.1%}"
        assert line in text


def test_contact_sheet_names_the_classes_that_have_contours(tmp_path: Path, monkeypatch) -> None:
    legends = []

    def note_legend(rows: list, legend: dict) -> None:
        legends.append(legend)

    monkeypatch.setattr(predict, "grid", note_legend)
    monkeypatch.setattr(predict, "save", lambda figure, path: None)
    colours = {"sea": [0, 0, 0], "ship": [255, 0, 0], "ice": [0, 0, 255]}
    predict.draw_sheet(tmp_path / "sheet.png", {}, colours)
    assert legends == [{"ship": [255, 0, 0], "ice": [0, 0, 255]}]


def test_images_of_16_bits_are_scaled_as_in_training(tmp_path: Path) -> None:
    overrides = ("in_channels=1", "value_range=[0, 65535]")
    model, config = predict.load_model(make_checkpoint(tmp_path / "a.pt", *overrides), "cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 31), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "8.png")
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "16.png")
    seen = []
    model.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    for name in ("8.png", "16.png"):
        predict.predict_mask(model, config, tmp_path / name)
    assert torch.equal(seen[0], seen[1])


def test_values_that_are_cut_off_are_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    overrides = ("in_channels=1", "value_range=[0, 4095]")
    model, config = predict.load_model(make_checkpoint(tmp_path / "a.pt", *overrides), "cpu")
    values = np.full((8, 8), 4000, np.uint16)
    Image.fromarray(values).save(tmp_path / "fits.png")
    predict.predict_files(model, config, [tmp_path / "fits.png"], tmp_path / "out", False)
    assert "cuts off" not in capsys.readouterr().out
    values[:2] = 5000
    Image.fromarray(values).save(tmp_path / "high.png")
    Image.new("1", (8, 8)).save(tmp_path / "empty.png")  # as a program that saves space writes it
    images = [tmp_path / "empty.png", tmp_path / "high.png"]
    predict.predict_files(model, config, images, tmp_path / "out", False)
    assert (
        f"cuts off values of 1 images, most in {tmp_path}/high.png (25.00%)"
        in capsys.readouterr().out
    )


def test_masks_of_indices_get_the_numbers_of_the_training_masks(tmp_path: Path) -> None:
    """With ignore: [0, 2] the classes are 1, 3 and 4, in training masks and in predicted ones."""
    config = load_config([], ["mask_format=indices", "ignore=[0, 2]"])
    config["classes"] = COLOURS
    classes = np.arange(6, dtype=np.uint8).reshape(2, 3) % 3
    path = tmp_path / "mask.png"
    predict.draw_mask(torch.from_numpy(classes), config).save(path)
    assert np.array(Image.open(path)).tolist() == [[1, 3, 4], [1, 3, 4]]
    assert (read_mask(path, config) == classes).all()
    colours = np.array(list(COLOURS.values()))
    assert (np.array(Image.open(path).convert("RGB")) == colours[classes]).all()


def test_linked_folders_are_entered_and_results_left_out(
    checkpoint: Path, tmp_path: Path, call
) -> None:
    save_noise(tmp_path / "elsewhere/b.png", 16, 20)
    save_noise(tmp_path / "in/a.jfif", 16, 20, format="JPEG")
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/c.heic").touch()
    options = ("--checkpoint", checkpoint, "--out", tmp_path / "out")
    code, text, _ = call(predict.main, *options, tmp_path / "in")
    assert code == 0 and "1 .heic left out" in text
    (tmp_path / "in/gone.png").symlink_to("nowhere")
    code, text, _ = call(predict.main, *options, tmp_path / "in")
    assert code == 2 and f"problem: {tmp_path / 'in/gone.png'}: cannot be read" in text
    assert (tmp_path / "out/linked/b_mask.png").exists() and (tmp_path / "out/a_mask.png").exists()
    code, _, error = call(predict.main, *options, tmp_path / "out")
    assert code == 2 and "where results go" in error and "give another OUT" in error
    code, _, error = call(predict.main, *options[:2], "--out", checkpoint / "x", tmp_path / "in")
    assert code == 2 and "cannot be written (Not a directory); give another path" in error


def test_bad_images_among_good_ones(checkpoint: Path, tmp_path: Path, call) -> None:
    bad, out = tmp_path / "in/bad.png", tmp_path / "out"
    paths = [save_noise(tmp_path / f"in/{i}.png", 16 + i % 3, 20) for i in range(70)]
    bad.write_bytes(b"\x89PNG no more")
    options = ("--checkpoint", checkpoint, "--out", out)
    code, text, errors = call(predict.main, *options, tmp_path / "in", "none.png")
    assert code == 2 and errors == "error: 2 of 72 images could not be read, listed above\n"
    assert f"problem: {bad}: cannot be read" in text and "problem: none.png: cannot be" in text
    model, config = predict.load_model(checkpoint)
    for path in paths:
        mask = predict.predict_mask(model, config, path).numpy()
        assert (np.array(Image.open(out / f"{path.stem}_mask.png")) == mask).mean() > 0.99


def test_name_with_spaces_is_told_to_be_quoted(checkpoint: Path, tmp_path: Path, call) -> None:
    save_noise(tmp_path / "my photo (1).png", 8, 8)
    options = ("--checkpoint", checkpoint, "--out", tmp_path / "out")
    code, text, _ = call(predict.main, *options, tmp_path / "my", "photo", "(1).png")
    assert code == 2 and text.count("no such file; put a name with spaces in quotes: python") == 3
    assert call(predict.main, *options, tmp_path / "my photo (1).png")[0] == 0


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = save_noise(tmp_path / "a.png", 8, 8)
    lost = "mask would overwrite"
    for other, message in {"a_mask": lost, "a_overlay": lost, "b/a": "has its name"}.items():
        other_path = save_noise(tmp_path / f"{other}.png", 8, 8)
        with pytest.raises(UserError, match=message):
            predict.find_images([path, other_path], tmp_path)


def test_hidden_files_and_folders_are_passed_by(tmp_path: Path) -> None:
    for name in ("a.png", "sub/b.png", ".c.png", ".cache/d.png", "sub/.thumbs/e.png"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = predict.find_images([tmp_path / "in"], tmp_path / "out")
    names = {path.relative_to(tmp_path / "in").as_posix() for path in found.values()}
    assert names == {"a.png", "sub/b.png"}


def test_tiles_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ("encoder=[[4, 7], [4, 3], [8, 7]]", "decoder=[[8, 3], [4, 3], [4, 3], [4, 3]]")
    model, config = predict.load_model(make_checkpoint(tmp_path / "a.pt", *sizes), "cpu")
    whole = predict.predict(model, config, NOISE)
    monkeypatch.setattr(predict, "TILE", 128)
    assert (predict.predict(model, config, NOISE) - whole).abs().max() < 1e-5
    model.receptive_radius = 0  # what is seen around a tile does it
    assert (predict.predict(model, config, NOISE) - whole).abs().max() > 1e-3


def test_a_model_of_resized_images_sees_resized_ones(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "best.pt", "resize=[32, 48]")
    model, config = predict.load_model(path, "cpu")
    shapes = []
    model.register_forward_pre_hook(lambda _module, args: shapes.append(tuple(args[0].shape)))
    assert predict.predict(model, config, NOISE).shape[2:] == (129, 417)
    assert shapes == [(1, 3, 32, 48)]


@pytest.mark.parametrize("resize", ["[]", "[32, 48]", "[300, 500]"])
def test_classes_are_the_most_probable(tmp_path: Path, monkeypatch, resize: str) -> None:
    path = make_checkpoint(tmp_path / "best.pt", f"resize={resize}", *SMALL)
    model, config = predict.load_model(path, "cpu")
    monkeypatch.setattr(predict, "TILE", 128)
    images = torch.cat([NOISE, 255 - NOISE])
    with torch.no_grad():  # as many pixels of each class
        model.up[-1].bias -= predict.predict_logits(model, config, images).mean(dim=(0, 2, 3))
    expected = predict.predict(model, config, images).argmax(dim=1)
    assert len(expected.unique()) == len(COLOURS)
    if resize == "[]":
        monkeypatch.delattr(predict, "predict_logits")  # nothing of all classes and pixels is made
    classes = predict.predict_classes(model, config, images)
    assert classes.dtype == torch.uint8 and classes.shape == expected.shape
    assert (classes == expected).float().mean() > 0.9999  # equal but for rounding


def test_exported_program_scores_what_predict_scores(tmp_path: Path, call, script) -> None:
    resizes = {"any": "[]", "resized": "[37, 29]"}
    stages = ("encoder=[[4, 3]]", "decoder=[[8, 3], [4, 3]]")  # each more takes seconds to export
    for name, resize in resizes.items():
        path = make_checkpoint(tmp_path / f"{name}.pt", f"resize={resize}", *stages)
        exported = tmp_path / f"{name}.pt2"
        assert call(predict.main, "--checkpoint", path, "--export", exported)[0] == 0
    done = script("-I", "-c", USE, tmp_path, *resizes)  # isolated: torch alone
    assert done.returncode == 0, done.stderr
    for name in resizes:
        model, config = predict.load_model(tmp_path / f"{name}.pt", "cpu")
        for images, logits in torch.load(tmp_path / f"{name}.out"):
            expected = predict.predict(model, config, images)
            assert logits.shape == expected.shape
            assert (logits.softmax(dim=1) - expected).abs().max() < 1e-4


def test_predicting_needs_no_private_module_and_has_no_limit_of_pixels(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("torch.fx.experimental._config")
    monkeypatch.setitem(sys.modules, "torch.fx.experimental._config", None)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for name in ("images", "predict"):
        monkeypatch.delitem(sys.modules, name)
    alone = importlib.import_module("predict")  # once more, as in a new process
    image = save_noise(tmp_path / "a.png", 8, 9)
    mask = alone.predict_mask(*alone.load_model(checkpoint, "cpu"), image)
    assert mask.shape == (8, 9)


def test_slim_weights_predict_alike(tmp_path: Path, call) -> None:
    checkpoint, slim = make_checkpoint(tmp_path / "best.pt"), tmp_path / "slim.pt"
    assert call(predict.main, "--checkpoint", checkpoint, "--slim", slim)[0] == 0
    assert slim.stat().st_size < 0.55 * checkpoint.stat().st_size
    model, config = predict.load_model(checkpoint, "cpu")
    slim_model, slim_config = predict.load_model(slim, "cpu")
    assert slim_config == config
    difference = predict.predict(slim_model, config, NOISE) - predict.predict(model, config, NOISE)
    assert difference.abs().max() < 0.01
