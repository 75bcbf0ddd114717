"""Write the report of all runs below a folder, from their stored results alone.

    python -m tools.report --runs runs/generated/quick --out report

Writes OUT/report.md, OUT/report.html (one file that needs no other), OUT/results.json (every
number) and OUT/figures/. The sentences are in docs/report_template.md: a section whose numbers are
missing is replaced by the make target in its heading. Runs that are unfinished, or that cannot
share a table with the others, are left out and listed at the end.
"""

import argparse
import base64
import json
import re
from pathlib import Path

from common import ROOT, UserError, read_json, reading, require, run, write_atomically

import numpy as np
from markdown import markdown

from config import load_config
from evaluate import read_results
from metrics import mean_std
from tools import facts
from tools.facts import MODELS, Groups, Run

TEMPLATE, STYLE = ROOT / "docs" / "report_template.md", ROOT / "docs" / "report.css"
ADVICE = "remove the folder of this run and make it again"
SCORES = {"mean_iou": (float, type(None)), "per_class_iou": dict, "dead_classes": list}


def read_run(folder: Path, experiment: str) -> Run:
    """Read the files of a finished run; UserError names the one that cannot be used."""
    config, environment = (
        load_config([folder / "config.yaml"]),
        read_json(folder / "environment.json"),
    )
    with reading(folder / "environment.json", ADVICE):
        require(environment, {"device": str, "threads": int, "precision": str, "torch": str})
    with reading(path := folder / "metrics.jsonl", ADVICE):
        history = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for entry in history:
            for split in ("training", "validation"):
                require(entry[split], SCORES | {"loss": float})
    rows, classes = {"summary": None, "testing": None}, list(config["classes"])
    for name in rows if is_tested(experiment) else ("summary",):
        [row] = read_results(folder / f"{name}.json")
        with reading(folder / f"{name}.json", ADVICE):
            require(row, {"images_seen": int, "train_seconds": float})
            if list(row["per_class_iou"]) != classes:
                raise ValueError("its classes are not those of config.yaml")
            if name == "testing" and "confusion_matrix" not in row:
                raise ValueError("it has no confusion matrix")
        rows[name] = row
    return Run(
        experiment, int(folder.name[4:]), folder, config, environment, history, *rows.values()
    )


def read_arrays(one: Run) -> dict[str, np.ndarray]:
    """Read testing.npz of a run, with the prediction of every test image."""
    with reading(one.folder / "testing.npz", "remove testing.json beside it and run make again"):
        return dict(np.load(one.folder / "testing.npz"))


def is_tested(experiment: str) -> bool:
    """Tell whether an experiment reads the test split: those that choose settings never do."""
    return experiment.split("/")[0] not in ("tune", "overfit")


def find_runs(root: Path) -> tuple[Groups, list[str]]:
    """Read every run below a folder; returns the finished ones, and a line for each other one."""
    groups: Groups = {}
    left_out = []
    folders = [f for f in root.rglob("seed*") if f.is_dir() and f.name[4:].isdigit()]
    for folder in sorted(folders, key=lambda f: (f.parent, int(f.name[4:]))):
        experiment = folder.parent.relative_to(root).as_posix()
        needed = ["summary.json"] + ["testing.json"] * is_tested(experiment)
        lacking = [name for name in needed if not (folder / name).exists()]
        if lacking:
            left_out.append(f"`{folder}` is not finished, it has no {' and no '.join(lacking)}.")
        else:
            groups.setdefault(experiment, []).append(read_run(folder, experiment))
    return groups, left_out


def comparable(groups: Groups, left_out: list[str]) -> Groups:
    """Keep the runs that can share a table with the first one, and list the others."""
    kept: Groups = {}
    first: dict = {}
    for name, runs in groups.items():
        for one in runs:
            rows = {"training": one.validation} | ({"test": one.test} if one.test else {})
            terms = {f"{split} data": row["digest"] for split, row in rows.items()}
            terms |= {"profile": one.config["profile"]}
            if name != "best":  # ours may take another budget: a column says so
                terms |= {"images seen": one.validation["images_seen"]}
            first = terms | first
            differ = [key for key, value in terms.items() if first[key] != value]
            if differ:
                left_out.append(f"`{one.folder}` differs from its table in {', '.join(differ)}.")
            else:
                kept.setdefault(name, []).append(one)
    return kept


def in_folder(groups: Groups, folder: str, base: str, left_out: list[str]) -> Groups:
    """Take the experiments of a folder; the tuned model, which they vary, stands for `base`."""
    mine = {n.split("/")[1]: runs for n, runs in groups.items() if n.startswith(f"{folder}/")}
    if mine and base not in mine and "tuned" in groups:
        mine[base] = groups["tuned"]
    return comparable(mine, left_out)


def collect_facts(groups: Groups, left_out: list[str], out: Path) -> dict:
    """Compute all that the template can say, and draw the figures into a folder."""
    models = comparable({name: groups[name] for name in MODELS if name in groups}, left_out)
    augment = in_folder(groups, "augment", "none", left_out)
    tune = in_folder(groups, "tune", "base", left_out)
    runs = [one for group in groups.values() for one in group]
    where = "{device}, {threads} threads, {precision}, PyTorch {torch}"
    profiles = {f"{one.config['profile']} profile on {one.config['data']}" for one in runs}
    absent = [*facts.missing_experiments(groups), *left_out]
    found = {
        "runs": len(runs),
        "experiments": len(groups),
        "seeds": ", ".join(map(str, sorted({one.seed for one in runs}))),
        "profiles": "; ".join(sorted(profiles)),
        "machines": "; ".join(sorted({where.format(**one.environment) for one in runs})),
        "missing": "\n".join(f"- {line}" for line in absent) or "Nothing.",
    }
    if models:
        arrays = {name: read_arrays(runs[0]) for name, runs in models.items()}
        judged = "tuned" if "tuned" in models else next(iter(models))
        found |= facts.describe_models(models, out) | facts.show_images(models, arrays, out)
        found |= facts.interval_of_fifty(judged, models, arrays[judged], out)
    if "tuned" in groups:
        found |= facts.running_average(groups, out)
    found |= facts.answer_questions(models, augment, tune) | facts.show_dead_classes(groups, out)
    return found | facts.tabulate_experiments(groups, augment, tune, out)


def fill_template(text: str, found: dict) -> str:
    """Fill the sections of a template; of one that lacks a fact only its make target is left."""
    sections = []
    for section in re.split(r"^(?=#)", text, flags=re.MULTILINE)[1:]:
        heading, _, body = section.partition("\n")
        title, _, target = heading.partition(" <!-- ")
        try:
            sections.append(f"{title}\n{body.format_map(found)}")
        except KeyError:
            sections.append(f"{title}\n\nNot run yet: `{target.removesuffix(' -->')}`.\n\n")
    return "".join(sections).rstrip() + "\n"


def to_html(text: str, folder: Path) -> str:
    """Convert the report from Markdown to one HTML file that loads nothing.

    `folder` is where the paths of the images start; an image's alternative text is its caption.
    """
    body = markdown(text, extensions=["tables"]).replace(" ± ", "&nbsp;±&nbsp;")
    for image, caption, source in re.findall(r'<p>(<img alt="(.*?)" src="(.*?)" />)</p>', body):
        data = base64.b64encode((folder / source).read_bytes()).decode()
        embedded = image.replace(source, f"data:image/png;base64,{data}")
        figure = f"<figure>{embedded}<figcaption>{caption}</figcaption></figure>"
        body = body.replace(f"<p>{image}</p>", figure)
    title, style = text.splitlines()[0].removeprefix("# "), STYLE.read_text(encoding="utf-8")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<style>{style}</style></head><body>\n{body}\n</body></html>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="holds the runs")
    parser.add_argument("--out", type=Path, default=Path("report"), metavar="DIR")
    args = parser.parse_args()
    groups, left_out = find_runs(args.runs)
    if not groups:
        raise UserError(f"{args.runs}: holds no finished run; `make report` makes some")
    found = collect_facts(groups, left_out, args.out / "figures")
    text = fill_template(TEMPLATE.read_text(encoding="utf-8"), found)
    keys = ("pixel_accuracy", "mean_iou", "mean_iou_foreground", "mean_dice")
    runs = [one for group in groups.values() for one in group]
    results = found | {
        "statistics": {
            name: {k: mean_std([(one.test or one.validation)[k] for one in group]) for k in keys}
            for name, group in groups.items()
        },
        "all_runs": [one._asdict() | {"folder": str(one.folder)} for one in runs],
    }
    write_atomically(args.out / "report.md", text.encode())
    write_atomically(args.out / "report.html", to_html(text, args.out).encode())
    lines = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    write_atomically(args.out / "results.json", lines.encode())
    print(f"{args.out / 'report.html'}: {len(groups)} experiments")


if __name__ == "__main__":
    run(main)
