"""Tests of doctor.py: runs made sick on purpose are recognised, healthy ones give no alarm."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import doctor
import errors
import findings
import findings_data
from config import dump, load_config
from files import lock_run
from train import train

ROOT = Path(__file__).parent.parent
COLOURS = {"square": (255, 0, 0), "triangle": (0, 255, 0), "circle": (0, 0, 255)}
HEALTHY = {
    "name": "tiny",
    "encoder": [[8, 3], [16, 3]],
    "decoder": [[16, 3], [12, 3]],
    "loss": {"cross_entropy": 1.0, "dice_per_class": 1.0},
    "images_per_epoch": 96,
    "batch_size": 8,
    "learning_rate": 0.01,
    "epochs": 4,
    "device": "cpu",
    "precision": "float32",
}
QUICK = {  # what configs/quick.yaml and tuned.yaml set
    "loss": {"dice_pooled": 1.0},
    "decoder": [[16, 3], ["classes", 3]],
    "upsampling_init": "bilinear",
    "schedule": "one_cycle",
    "crop": 16,
    "crop_on_objects": 1.0,
    "epochs": 3,
    "images_per_epoch": 240,
}


def draw(root: Path, images: int = 24, side: int = 9) -> Path:
    """A data set of 32×32 whose class is the colour of an object, quickly learnt: three objects of
    `side` pixels on grey noise, so many training images and half as many for validation."""
    rng = np.random.default_rng(0)
    for split, number in (("training", images), ("validation", images // 2)):
        for folder in ("image", "gt_image"):
            (root / split / folder).mkdir(parents=True)
        for i in range(number):
            image = rng.integers(90, 166, (32, 32, 1)).repeat(3, axis=2).astype(np.uint8)
            mask = np.zeros((32, 32, 3), np.uint8)
            for colour in COLOURS.values():
                y, x = rng.integers(0, 32 - side, 2)
                image[y : y + side, x : x + side] = 0.6 * np.array(colour) + 40
                mask[y : y + side, x : x + side] = colour
            Image.fromarray(image).save(root / split / "image" / f"{i:03}.png")
            Image.fromarray(mask).save(root / split / "gt_image" / f"gt_{i:03}.png")
    return root


def change(folder: Path, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    """Rewrite every PNG of a folder."""
    for path in folder.glob("*.png"):
        Image.fromarray(np.ascontiguousarray(edit(np.asarray(Image.open(path))))).save(path)


def config_of(data: Path, **changes: object) -> dict:
    return load_config([], []) | HEALTHY | {"data": str(data)} | changes


def named(run_dir: Path) -> dict[str, findings.Finding]:
    """The findings in a run."""
    found, _ = doctor.diagnose(run_dir, torch.device("cpu"))
    assert tuple(found) == doctor.ORDER
    return {name: finding for name, finding in found.items() if finding}


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of `draw`. Read-only: copy it to change it."""
    return draw(tmp_path_factory.mktemp("doctor") / "data")


@pytest.fixture(scope="module")
def healthy(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A healthy run. Read-only: copy it to change it."""
    folder = tmp_path_factory.mktemp("doctor") / "run"
    train(config_of(colours), folder, resume=False)
    return folder


# ---- healthy runs give no alarm


@pytest.mark.parametrize("changes", [{}, QUICK], ids=["constant rate", "quick profile"])
def test_healthy_run_is_silent(colours: Path, tmp_path: Path, changes: dict) -> None:
    train(config_of(colours, **changes), tmp_path, resume=False)
    assert named(tmp_path) == {}


def test_healthy_run_gets_one_line_and_stale_figures_go(
    healthy: Path, script: Callable, tmp_path: Path
) -> None:
    stale, own = tmp_path / "dead-classes.png", tmp_path / "notes.png"
    stale.touch(), own.touch()
    done = script("doctor.py", healthy, "--out", tmp_path, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    assert line.startswith(f"{healthy}: nothing found wrong (epoch 4 of 4, mean IoU 0.")
    assert not stale.exists() and own.exists()
    assert not (healthy / "doctor").exists()


# ---- runs made sick on purpose


def test_only_background_is_said_first_with_cures_and_a_figure(
    tmp_path: Path, script: Callable
) -> None:
    """The lab's head and loss on objects of 2×2 pixels."""
    sick = {"loss": {"dice_pooled": 1.0}, "decoder": [[16, 3], ["classes", 3]]}
    config = config_of(draw(tmp_path / "data", side=2), **sick)
    train(config, tmp_path / "run", resume=False)
    done = script("doctor.py", tmp_path / "run", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    _, _, title, *_ = done.stdout.splitlines()
    assert title == "The model predicts only background"
    text = " ".join(done.stdout.split())
    for part in ("square, triangle, circle", "since epoch 1 of 4", "0.988", "dice_per_class"):
        assert part in text
    for part in ("dice_pooled weighs", "[classes, 3]", "crop_on_objects: 1.0"):
        assert part in text
    figure = tmp_path / "run" / "doctor" / "dead-classes.png"
    assert str(figure) in text
    assert Image.open(figure).width > 300


@pytest.mark.parametrize(
    ("changes", "expected", "says"),
    [
        ({"learning_rate": 1e-9, "epochs": 3}, "loss-not-moving", "0.005"),
        ({"learning_rate": 100.0, "epochs": 3}, "learning-rate-too-high", "guessing"),
        ({"learning_rate": 1.0, "epochs": 4}, "learning-rate-too-high", "batch norm"),
        ({"epochs": 1, "images_per_epoch": 16}, "too-few-steps", "epochs: 3 instead of 1"),
        ({"limit_images": 1}, "overfitting", "trained on 1 images"),
    ],
)
def test_bad_setting_is_found(
    colours: Path, tmp_path: Path, changes: dict, expected: str, says: str
) -> None:
    train(config_of(colours, **changes), tmp_path, resume=False)
    found = named(tmp_path)
    assert set(found) - {"dead-classes"} == {expected}  # such models may see no class yet
    assert says in found[expected].evidence + found[expected].advice


SICK_DATA = {
    "masks all background": ("empty-masks", "*/gt_image", lambda mask: mask * 0),
    "no circles": ("empty-masks", "*/gt_image", lambda mask: mask * np.uint8([1, 1, 0])),
    "images from 0 to 1": ("dark-images", "*/image", lambda image: image // 128),
    "images of BGR": ("channel-order", "validation/image", lambda image: image[..., ::-1]),
    "masks of BGR": ("channel-order", "validation/gt_image", lambda mask: mask[..., ::-1]),
    "masks of GRB": ("swapped-masks", "validation/gt_image", lambda mask: mask[..., [1, 0, 2]]),
    "masks from 0 to 1": ("unreadable-data", "*/gt_image", lambda mask: mask // 255),
    "masks of indices": ("unreadable-data", "validation/gt_image", lambda m: m[..., :1] // 255),
}


@pytest.mark.parametrize("sickness", SICK_DATA)
def test_bad_data_is_found_and_drawn(
    colours: Path, healthy: Path, tmp_path: Path, sickness: str
) -> None:
    """The files are changed under a run that is healthy, which saves training one on them."""
    expected, folders, edit = SICK_DATA[sickness]
    data = shutil.copytree(colours, tmp_path / "data")
    shutil.rmtree(data / ".cache", ignore_errors=True)
    for folder in data.glob(folders):
        if edit(np.zeros((1, 1, 3), np.uint8)).shape[-1] == 1:
            change(folder, lambda mask: edit(mask)[..., 0])
        else:
            change(folder, edit)
    run = shutil.copytree(healthy, tmp_path / "run")
    (run / "config.yaml").write_text(dump(config_of(data)))
    found = named(run)
    assert next(iter(found)) == expected
    if sickness == "masks from 0 to 1":
        assert "0 and 1 in the place of 0 and 255" in found[expected].advice
    assert not {"overfitting", "learning-rate-too-high", "loss-not-moving"} & set(found)
    found[expected].draw(tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").width > 300


def test_masks_without_foreground_are_named_first_in_a_run_trained_on_them(
    colours: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(colours, tmp_path / "data")
    change(data / "training" / "gt_image", lambda mask: mask * 0)
    train(config_of(data, epochs=2), tmp_path / "run", resume=False)
    first, *rest = named(tmp_path / "run")
    assert first == "empty-masks" and "dead-classes" in rest


# ---- runs that broke off


def test_run_whose_loss_became_nan(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.weighted_loss", lambda logits, *_: logits.sum() * float("nan"))
    with pytest.raises(errors.UserError):
        train(config_of(colours), tmp_path, resume=False)
    [(name, finding)] = named(tmp_path).items()
    assert name == "stopped" and "nan" in finding.advice
    assert finding.title == "The run stopped after 0 of 4 epochs"
    assert finding.draw is None  # nothing was recorded


def test_run_that_still_trains_is_not_called_stopped(healthy: Path, tmp_path: Path) -> None:
    run = shutil.copytree(healthy, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:3]))
    assert list(named(run)) == ["stopped"]
    lock = lock_run(run)
    assert named(run) == {}
    lock.close()


def test_run_of_another_version_is_told_as_one(
    healthy: Path, tmp_path: Path, call: Callable
) -> None:
    run = shutil.copytree(healthy, tmp_path / "run")
    config = run / "config.yaml"
    config.write_text(config.read_text() + "limit_sequences: 0\n")
    code, _, error = call(doctor.main, run)
    [line] = error.splitlines()
    assert code == 2 and "'limit_sequences'" in line and "another version" in line


def test_folder_that_is_no_run_is_refused(healthy: Path, tmp_path: Path, script: Callable) -> None:
    done = script("doctor.py", tmp_path)
    [line] = done.stderr.splitlines()
    assert done.returncode == 2
    assert line.startswith(f"error: {tmp_path}: is no run") and "train.py" in line
    run = shutil.copytree(healthy, tmp_path / "run")
    (run / "best.pt").write_bytes(b"damaged")
    with pytest.raises(errors.UserError, match=r"best\.pt: damaged"):
        named(run)
    (run / "best.pt").unlink()  # last.pt is looked at instead
    assert named(run) == {}


def test_make_doctor_without_a_run_says_so() -> None:
    done = subprocess.run(["make", "doctor"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "make doctor RUN=runs/" in done.stderr


# ---- the findings alone, on histories made by hand


def history_of(
    train_loss: list[float], val_loss: list[float], val_iou: list[float], **scores: list
) -> list[dict]:
    """Lines of metrics.jsonl; training mean IoU is that of validation."""
    return [
        {
            "epoch": i + 1,
            "images_seen": 10_000 * (i + 1),
            "training": {"loss": t, "mean_iou": iou},
            "validation": {"loss": v, "mean_iou": iou, "pixel_accuracy": 0.9}
            | {key: values[i] for key, values in scores.items()},
        }
        for i, (t, v, iou) in enumerate(zip(train_loss, val_loss, val_iou, strict=True))
    ]


CONFIG = load_config([], []) | {"loss": {"cross_entropy": 1.0}, "epochs": 6}
FALLING, RISING = [0.7, 0.2, 0.1, 0.06, 0.05, 0.04], [0.6, 0.8, 0.9, 0.93, 0.94, 0.945]
FINE = history_of(FALLING, FALLING, RISING)


def rate_finding(train_loss: list[float], val_loss: list[float]) -> findings.Finding | None:
    history = history_of(train_loss, val_loss, RISING)
    return findings.learning_rate_too_high(history, CONFIG, default=0.005)


def test_what_a_loss_does_in_a_healthy_run_is_no_finding() -> None:
    assert rate_finding(FALLING, FALLING) is None
    assert rate_finding([*FALLING[:4], 0.08, 0.05], FALLING) is None  # a ripple near zero
    assert rate_finding(FALLING, [2.0, 0.2, 0.1, 0.15, 0.1, 0.1]) is None  # a bad first epoch
    assert rate_finding(FALLING, [0.3, 0.3, 0.4, 0.6, 0.9, 1.4]) is None  # overfitting
    assert rate_finding(FALLING, [1.0, 3.0, 5.0, 7.0, 8.0, 9.0]) is None  # another domain


def test_jumps_and_spikes_are_named_by_epoch() -> None:
    jump = rate_finding([0.7, 0.2, 0.1, 0.5, 0.2, 0.1], FALLING)
    assert "jumps up in epoch 4, at most from 0.1 to 0.5" in jump.evidence
    spike = rate_finding(FALLING, [0.7, 0.2, 0.1, 2.5, 0.1, 0.1])
    assert "spikes in epoch 4, at most to 2.5 with 0.1 beside it" in spike.evidence
    assert "one_cycle" in spike.advice and "0.0005" in spike.advice


def test_spike_in_the_first_epochs_is_compared_with_guessing() -> None:
    spike = rate_finding(FALLING, [900.0, 80.0, 0.2, 0.1, 0.1, 0.1])
    assert "epochs 1, 2, at most to 900 where guessing has 1.39" in spike.evidence


def test_class_that_died_late_is_told_from_one_that_never_lived() -> None:
    iou = [dict.fromkeys(CONFIG["classes"], 0.5) | {"square": s} for s in (0.5, 0.2, 0.0, 0.001)]
    dead = [[], [], ["square"], []]  # in the last epoch a few stray pixels
    sick = history_of([1.0] * 4, [1.0] * 4, [0.5, 0.6, 0.4, 0.4], per_class_iou=iou)
    for entry, names in zip(sick, dead, strict=True):
        entry["validation"]["dead_classes"] = names
    finding = findings.dead_classes(sick, CONFIG)
    assert finding.title == "Dead classes: square"
    assert "since epoch 3 of 4" in finding.evidence
    assert "best.pt is of epoch 2, when no class was dead" in finding.advice
    assert findings.dead_classes(sick[:2], CONFIG) is None


def test_still_climbing_is_found_at_a_constant_rate_only() -> None:
    climbing = history_of(FALLING, FALLING, [0.3, 0.4, 0.5, 0.6, 0.7, 0.75])
    assert "0.150 above" in findings.too_few_steps(climbing, CONFIG).evidence
    assert findings.too_few_steps(climbing, CONFIG | {"schedule": "one_cycle"}) is None
    assert findings.too_few_steps(climbing, CONFIG | {"epochs": 9}) is None  # not at its end
    assert findings.too_few_steps(FINE, CONFIG) is None


def test_loss_not_moving_advises_by_the_rate() -> None:
    stuck = history_of([1.4, 1.39, 1.4], [1.4] * 3, [0.2] * 3)
    for rate, says in ((1e-6, "low"), (1.0, "high"), (0.005, "limit_images=8")):
        assert says in findings.loss_not_moving(stuck, rate, default=0.005).advice
    assert findings.loss_not_moving(FINE, 1e-6, default=0.005) is None
    assert findings.loss_not_moving(stuck[:1], 1e-6, default=0.005) is None


def test_rare_foreground_matters_only_where_it_is_not_learnt() -> None:
    pixels = {"background": 999_500, "square": 500}
    assert "0.050 %" in findings_data.rare_foreground(pixels, 0.1).title
    assert findings_data.rare_foreground(pixels, 0.8) is None
    assert findings_data.rare_foreground({"background": 99, "square": 1}, 0.1) is None


def test_every_figure_of_a_history_can_be_drawn(tmp_path: Path) -> None:
    found = findings.stopped(FINE, 9, 0.1), rate_finding([0.1, 0.9, 0.1, 0.1, 0.1, 0.1], FALLING)
    for i, finding in enumerate(found):
        finding.draw(tmp_path / f"{i}.png")
        assert Image.open(tmp_path / f"{i}.png").width > 300


def test_quick_settings_are_those_of_the_quick_profile() -> None:
    config = load_config([ROOT / "configs/tuned.yaml", ROOT / "configs/quick.yaml"], [])
    sizes = ("decoder", "crop", "images_per_epoch")
    assert {k: v for k, v in QUICK.items() if k not in sizes and config[k] != v} == {}
