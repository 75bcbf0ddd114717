"""Tests of report.py: both pages, the folders of runs, damaged files."""

import json
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import corruptions, write_checkpoint
from made_runs import make_run, make_study

import report
import report_models
import report_notes
import report_page
from checkpoints import read_checkpoint
from common import ROOT, UserError
from config import dump
from evaluate import main as evaluate
from report_published import read_published
from tools.publish import publish

# ---- the page


def test_first_report_has_no_empty_section(tmp_path: Path, no_drawing: None) -> None:
    names = ("initial", "modified", "tuned", "best")
    study = make_study([make_run(name, 0, 0.8) for name in names], tmp_path)
    text = report.page_of_folder(study, ["`runs/x` is not finished."])
    headings = re.findall(r"^## (.*)", text, re.M)
    assert "Did augmentation help?" not in headings and headings[-2] == "What you can run next"
    missing = text.split("## What you can run next")[1]
    for command in ("train-final", "augment", "tune", "overfit", "heads"):
        assert f"`make {command} DATA=afo" in missing
    assert '`make report DATA=afo SEEDS="0 1 2"`' in missing and "- `runs/x` is not" in missing
    assert {path.name for path in tmp_path.glob("*.png")} == set(re.findall(r"/(\S+\.png)", text))
    assert "| 95 % over flights |" in text
    question = "Increase the complexity a little: does it improve?"
    assert (
        question in headings and f"| {question} | 0.9778 against 0.9824 | `modified` scores" in text
    )


@pytest.mark.parametrize(
    ("profile", "of_tuned", "needed"),
    [
        ("quick", "no-augmentation", "horizontal-flip-0.7"),
        ("full", "horizontal-flip-0.7", "no-augmentation"),
    ],
)
def test_augmentation_that_tuned_has_needs_no_run(
    tmp_path: Path, profile: str, of_tuned: str, needed: str
) -> None:
    study = make_study([make_run("tuned", 0, 0.8)], tmp_path)
    study.profile = profile
    lines = report_notes.missing(study, [study])
    [augment] = [line for line in lines if line.startswith("`make augment")]
    assert of_tuned not in augment and needed in augment
    study.profile = "mine"  # a name that a user's config gives
    assert of_tuned in "".join(report_notes.missing(study, [study]))


def test_an_answer_that_can_tell_comes_before_one_that_cannot(tmp_path: Path) -> None:
    studies = []
    for profile, seeds in (("full", [0]), ("quick", [0, 1, 2])):
        runs = [make_run("initial", seed, 0.7 + seed / 100) for seed in seeds]
        runs += [make_run("modified", seed, 0.9 + seed / 100) for seed in seeds]
        studies.append(make_study(runs, tmp_path))
        studies[-1].profile = profile
    section = next(part for part in report_page.SECTIONS if "complexity" in part.title)
    study, answer = report_page.short_answer(section, studies)
    assert study is studies[1] and answer.text.startswith("Yes. `modified` beats `initial`")
    line = "by 0.2000 ± 0.0227. `modified` also has another loss. | sure | short |"
    assert line in report_page.in_short(studies)


def test_one_study_is_the_study_of_the_short_answer(tmp_path: Path) -> None:
    studies = []
    for profile, seeds in (("full", [0]), ("quick", [0, 1, 2])):
        runs = [make_run("tuned", seed, 0.7 + seed / 100) for seed in seeds]
        runs += [make_run("augment/jitter", seed, 0.9 + seed / 100) for seed in seeds]
        studies.append(make_study(runs, tmp_path))
        studies[-1].profile = profile
    section = next(part for part in report_page.SECTIONS if "that the lab lacked" in part.title)
    text = report_page.write_section(section, studies)
    assert "**In short runs**" in text and "Yes. `jitter` beats no augmentation (0.9100" in text
    assert "**By the lab's protocol**" not in text


def test_tuned_of_one_profile_is_missing_though_the_other_has_it(tmp_path: Path) -> None:
    short = [make_run("tuned", 0, 0.8), make_run("tune/width-half", 0, 0.8)]
    studies = [make_study([make_run("best", 0, 0.9)], tmp_path), make_study(short, tmp_path)]
    lines = report_notes.missing(studies[0], studies)
    assert lines[0].startswith("`make train-initial train-modified train-tuned train-final")
    assert not any("width-half" in line for line in lines)


def test_missing_published_runs_are_one_line(monkeypatch) -> None:
    kept = [run for run in read_published() if run.data != "generated"]
    monkeypatch.setattr(report, "read_published", lambda: kept)
    with pytest.raises(
        UserError,
        match=r"has no run of generated/quick/tuned; .*: git checkout results/runs\.jsonl",
    ):
        report.write_published(Path())


def test_too_few_groups_have_no_interval(tmp_path: Path) -> None:
    runs = [make_run(name, 0, 0.8) for name in ("initial", "tuned")]
    for run in runs:
        run.test["interval"] = None
    assert "95 % over" not in report_models.details_models(make_study(runs, tmp_path))


def test_tables_are_filled_where_they_stand() -> None:
    old = "a\n<!-- table: x -->\nold\n<!-- end -->\nb\n<!-- table: y -->\n\n<!-- end -->\n"
    new = report.fill_tables(old, {"x": "new \\1", "y": "z"}, "README.md")
    assert new == old.replace("old", "new \\1").replace("y -->\n\n", "y -->\nz\n")
    with pytest.raises(UserError, match="no table 'y'; there are x"):
        report.fill_tables(old, {"x": ""}, "README.md")


def test_published_pages_are_up_to_date(tmp_path: Path, call: Callable, no_drawing: None) -> None:
    code, _, error = call(report.main, "--published", "--out", tmp_path)
    assert code == 0, error
    for path in tmp_path.rglob("*.md"):
        name = path.relative_to(tmp_path)
        assert path.read_text() == (ROOT / name).read_text(), f"{name}: run make results"
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.png")}
    kept = {path.relative_to(ROOT) for path in (ROOT / "results").rglob("*.png")}
    text = (tmp_path / "RESULTS.md").read_text() + (tmp_path / "README.md").read_text()
    linked = {Path(link) for link in re.findall(r"\((results/\S+\.png)\)", text)}
    assert made == kept == linked


# ---- the folders of runs


@pytest.fixture
def write_run(call: Callable, dataset: Path, tmp_path: Path) -> Callable:
    """`write_run("tune/a-1", seed, iou)`: the folder of a finished run with random weights."""

    def write(experiment: str, seed: int, iou: float) -> Path:
        folder = tmp_path / "runs" / experiment / f"seed{seed}"
        made = make_run(experiment, seed, iou)
        name = made.validation["name"]
        cost = {"images_seen": 100, "train_seconds": 7.0}
        path = write_checkpoint(folder, dataset, name, seed, images_per_epoch=50, cost=cost)
        config = read_checkpoint(path)["config"]
        (folder / "config.yaml").write_text(dump(config))
        (folder / "environment.json").write_text(json.dumps(made.machine))
        lines = "".join(json.dumps(entry) + "\n" for entry in made.history)
        (folder / "metrics.jsonl").write_text(lines)
        summary = {
            "name": name,
            "seed": seed,
            "profile": config["profile"],
            "digest": "d",
            "images_seen": 100,
            "train_seconds": 7.0,
            "parameters": 9,
            "code": None,
            "training": made.history[-1]["training"],
            "validation": made.history[-1]["validation"],
        }
        (folder / "summary.json").write_text(json.dumps(summary))
        if made.test is not None:
            assert call(evaluate, path, "--device", "cpu", "--beside")[0] == 0
        return folder

    return write


@pytest.fixture
def make(call: Callable, tmp_path: Path) -> Callable:
    """Call the report's main on the runs: (exit code, text of report.md, errors)."""

    def run() -> tuple[int, str, str]:
        out = tmp_path / "out"
        code, _, error = call(report.main, "--runs", tmp_path / "runs", "--out", out)
        return code, (out / "report.md").read_text() if code == 0 else "", error

    return run


def test_report_of_folders(write_run: Callable, make: Callable, tmp_path: Path) -> None:
    ious = []
    for seed in (0, 1):
        write_run("initial", seed, 0.7)
        folder = write_run("tuned", seed, 0.8)
        [row] = json.loads((folder / "testing.json").read_text())
        ious.append(row["mean_iou"])
        write_run("tune/width-half", seed, 0.5)
    (write_run("modified", 0, 0.8) / "summary.json").unlink()
    (write_run("final", 0, 0.8) / "testing.json").unlink()
    code, text, error = make()
    assert (code, error) == (0, "")
    mean = f"{statistics.fmean(ious):.4f} ± {statistics.stdev(ious):.4f}"
    assert f"| tuned | {mean} | 2 |" in text and "| width-half | 0.5000 ± 0.0000 | 2 |" in text
    assert f"`{tmp_path}/runs/modified/seed0` is not finished: it has no summary.json." in text
    assert f"`{tmp_path}/runs/final/seed0` is not tested: it has no testing.json." in text
    assert "figures/frames.png" in text and "figures/worst.png" in text
    assert "`make augment DATA=set.yaml PROFILE=full`" in text  # own data

    added, unfinished = publish(tmp_path / "runs", tmp_path / "runs.jsonl")
    kept = read_published(tmp_path / "runs.jsonl")
    assert len(kept) == len(added) == 6 and len(unfinished) == 2
    assert kept[0].test["interval"] is None and kept[0].config["batch_size"] == 32

    html = (tmp_path / "out/report.html").read_text()
    links = re.findall(r"""(?:src|href)=["']([^"']*)""", html)
    assert len(links) == len(list((tmp_path / "out/figures").glob("*.png")))
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert "url(" not in html and "@import" not in html and "<table>" in html


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "summary.json", "environment.json", "config.yaml"]
)
def test_damaged_file_is_named(
    write_run: Callable, make: Callable, no_drawing: None, name: str
) -> None:
    path = write_run("tune/a-1", 0, 0.5) / name
    refused = 0
    for content in corruptions(path.read_bytes(), 12):
        path.write_bytes(content)
        code, text, error = make()
        if code == 2:
            assert error.startswith("error: ") and error.count("\n") == 1 and str(path) in error
            refused += 1
        else:
            assert code == 0 and "What you can run next" in text
    assert refused > 2


def test_a_copied_run_does_not_count_as_another_seed(
    write_run: Callable, make: Callable, tmp_path: Path
) -> None:
    folder = write_run("tuned", 0, 0.8)
    copy = shutil.copytree(folder, folder.with_name("seed7"))
    code, _, error = make()
    text = f"error: {copy}: has seed 0 of `tuned`, as {folder} has; move one of them out of "
    assert (code, error) == (2, f"{text}{tmp_path / 'runs'}\n")
    assert not (tmp_path / "out").exists()


def test_no_runs_is_one_line(make: Callable, tmp_path: Path) -> None:
    code, _, error = make()
    assert code == 2 and error.startswith(f"error: {tmp_path / 'runs'}: holds no finished run")


def test_runs_of_several_profiles_are_refused(tmp_path: Path, monkeypatch) -> None:
    runs = [make_run("afo/quick/tuned", 0, 0.5), make_run("rate/tuned", 0, 0.5)]
    monkeypatch.setattr(report, "find_runs", lambda root: (runs, []))
    with pytest.raises(UserError, match="several profiles"):
        report.write_report(tmp_path / "runs", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_picture_without_a_caption_is_in_the_page_too(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"png")
    html = report.to_html("# Title\n\n![a](a.png)\n\ntext *with stress*", tmp_path)
    assert 'src="data:image/png;base64,' in html and "<p>text <em>with stress</em></p>" in html
