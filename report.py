"""Write the report of all runs below a folder: tables, figures, answers to the lab's questions.

    python report.py --runs runs/generated/quick --out report [--device auto]

Writes OUT/report.md, OUT/report.html (one file that needs no other), OUT/results.json (every
number) and OUT/figures/. Nothing is trained; the checkpoints of the models compared are run once
over the test split. What is missing is named; unfinished runs are left out, named in the report
and once more at the end, with exit code 2.
"""

import argparse
import base64
import html
import json
import re
from pathlib import Path

import numpy as np

import figures
from answers import answers, explanations
from checkpoint import load_checkpoint, restore_model
from collect import MODELS, Run, find_runs, missing_runs
from data import load_split
from device import pick_device, pick_precision
from errors import UserError, run
from evaluate import background_only
from files import write_atomically
from images import IGNORE
from metrics import predict_split
from tables import (
    RULE,
    Blocks,
    check_tables,
    dead,
    experiments,
    of,
    over_seeds,
    published,
    show,
    table,
)

FRAMES = 4  # rows of a panel
RECHECK = 0.01  # mean IoU: rounding on another machine stays far below, another model does not
SCORES = ("pixel_accuracy", "mean_iou", "mean_iou_foreground", "mean_dice")
CSS = """
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; background: #fff; color: #1a1a1a;
  font: 16px/1.55 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.25; margin: 2em 0 .5em; } h1 { margin-top: 0; }
h2 { border-bottom: 1px solid #ccc; padding-bottom: .2em; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
th, td { padding: .3em .5em; text-align: right; border-bottom: 1px solid #ddd;
  font-variant-numeric: tabular-nums; }
th { border-bottom: 2px solid #888; vertical-align: bottom; }
td:first-child { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.5em 0; break-inside: avoid; } img { max-width: 100%; height: auto; }
figcaption { color: #444; font-size: 14px; } code { background: #f2f2f2; padding: 0 .2em; }
@media print { body { max-width: none; font-size: 11pt; } h2, h3 { break-after: avoid; }
  tr { break-inside: avoid; } .wide { overflow: visible; } table { font-size: 8pt; } }
"""

# ---- the models compared


def run_models(models: dict[str, list[Run]], device_name: str) -> dict:
    """Run the checkpoints of the models compared once over the test split.

    Returns:
        images (M, channels, H, W), masks (M, H, W), names, groups, classes of the split; by model
        `predictions` (M, H, W) uint8 and `frames` (M, C, C) of the lowest seed and `boundary`, the
        boundary IoU over the seeds; `recheck`, the largest difference between a mean IoU found
        here and the one in testing.json.
    """
    device = pick_device(device_name)
    made: dict = {"predictions": {}, "frames": {}, "boundary": {}, "recheck": 0.0}
    for name, runs in models.items():
        boundary = []
        for one in runs:
            config, classes = one.config, list(one.config["classes"])
            split = load_split(config, one.test["split"])
            if split.digest != one.test["digest"]:
                raise UserError(
                    f"{config['data']}: is not the data that {one.folder} was tested on; restore "
                    "it, or remove that run's testing.json and run make again"
                )
            best = one.folder / "best.pt"
            model = restore_model(load_checkpoint(best, device), best, device)
            dtype = pick_precision(device, config["precision"])
            predicted = predict_split(model, split.images, dtype)
            # Ignored pixels count nowhere, right or wrong.
            predicted = predicted.where(split.masks != IGNORE, IGNORE)
            frames = figures.frame_matrices(predicted, split.masks, len(classes))
            off = abs(float(figures.mean_iou(frames.sum(axis=0))) - one.test["mean_iou"])
            if off > RECHECK:
                raise UserError(
                    f"{one.folder}: best.pt scores {off:.4f} off its testing.json; remove that "
                    "file and run make again"
                )
            made["recheck"] = max(made["recheck"], off)
            boundary.append(figures.boundary_iou(predicted, split.masks, len(classes))[0])
            if one is runs[0]:
                made["predictions"][name], made["frames"][name] = predicted, frames
                made |= {"images": split.images, "masks": split.masks}
                made |= {"names": split.names, "groups": split.groups, "classes": classes}
                made["colours"] = config["classes"]
        made["boundary"][name] = over_seeds(boundary)
        print(f"{name}: {len(runs)} checkpoints, {len(split.names)} test images each", flush=True)
    return made


def _two_lines(name: str, group: str) -> str:
    rest = name.removeprefix(group).replace("_", " ").strip()
    return f"{group}\n{rest[-20:]}"


def comparison(models: dict[str, list[Run]], tested: dict, pictures: Path) -> Blocks:
    """The comparison table, curves, panels, confusion matrices and bars of the models."""
    classes = tested["classes"]
    background = background_only(next(iter(models.values()))[0].test)
    _, header, rows = table(
        models,
        "testing",
        {
            "boundary IoU": lambda runs: show(tested["boundary"][runs[0].experiment]),
            "mean Dice": lambda runs: f"{of(runs, 'mean_dice')['mean']:.4f}",
            "accuracy": lambda runs: f"{of(runs, 'pixel_accuracy')['mean']:.4f}",
            "dead classes": dead,
            "lab IoU": published,
            "parameters": lambda runs: f"{runs[0].test['parameters']:,}",
        },
    )
    iou, dice, accuracy = (
        f"{background[key]:.4f}" for key in ("mean_iou", "mean_dice", "pixel_accuracy")
    )
    cells = {"": background["name"], "test mean IoU": iou, "mean Dice": dice, "accuracy": accuracy}
    cells |= {"mark": "", "dead classes": ", ".join(background["dead_classes"])}
    top = [cells.get(key, "–") for key in header]
    blocks: Blocks = [("h2", "The models compared"), ("table", header, [top, *rows]), ("p", RULE)]
    if not any(row[3] for row in rows):
        blocks.append(("p", "No row is marked: no lead here lies beyond seed noise as defined."))
    text = (
        "The checkpoints were run again for the figures below; their mean IoU differs from that of "
    )
    blocks.append(("p", f"{text}the table by at most {tested['recheck']:.6f}."))

    def draw(function: object, file: str, caption: str, *args: object) -> None:
        function(pictures / file, *args)
        blocks.append(("figure", file, caption))

    draw(
        figures.curves,
        "curves.png",
        "Mean IoU and loss by epoch: the mean over the seeds, and from the lowest to the highest. "
        "The models minimise different losses: compare the shapes of those curves, not heights.",
        {name: [one.history for one in runs] for name, runs in models.items()},
    )
    even = np.linspace(0, len(tested["names"]) - 1, FRAMES).astype(int)
    judged = next(name for name in reversed(MODELS) if name in models)
    single = figures.mean_iou(tested["frames"][judged])
    worst: dict[str, int] = {}  # sequence → its worst frame, sequences from the worst
    for i in np.argsort(single, kind="stable"):
        worst.setdefault(tested["groups"][i], int(i))
    for file, chosen, caption in (
        ("frames.png", even, "Evenly spaced test frames, the same for every model."),
        (
            "worst.png",
            list(worst.values())[:FRAMES],
            "The worst test frames: lowest mean IoU of "
            f"`{judged}` in one frame, one frame a sequence.",
        ),
    ):
        captions = [
            {"image": _two_lines(tested["names"][i], tested["groups"][i])}
            | {n: f"IoU {figures.mean_iou(f[i]):.4f}" for n, f in tested["frames"].items()}
            for i in chosen
        ]
        predictions = {n: p[chosen] for n, p in tested["predictions"].items()}
        images, masks = tested["images"][chosen], tested["masks"][chosen]
        colours = tested["colours"]
        draw(figures.panels, file, caption, images, masks, predictions, captions, colours)
    draw(
        figures.confusion,
        "confusion.png",
        "Confusion matrices, all test pixels and seeds: of each true class, per cent predicted as.",
        {n: sum(np.array(r.test["confusion_matrix"]) for r in runs) for n, runs in models.items()},
        classes,
    )
    draw(
        figures.bars,
        "classes.png",
        "Test IoU of each class, ± standard deviation over the seeds.",
        {
            c: {
                n: over_seeds([r.test["per_class_iou"][c] for r in runs])
                for n, runs in models.items()
            }
            for c in classes
        },
        "test IoU",
    )
    draw(
        figures.bars,
        "boundary.png",
        f"Boundary IoU (Cheng et al. 2021, arXiv:2103.16562) counts only the {figures.BAND} pixels "
        "inside a contour. It tells models apart whose mean IoU is alike, as most of what they get "
        "wrong is the rim of the shapes.",
        {
            n: {"mean IoU": of(runs, "mean_iou"), "boundary IoU": tested["boundary"][n]}
            for n, runs in models.items()
        },
        "test score",
    )
    return blocks


# ---- writing


def as_markdown(blocks: Blocks) -> str:
    """The report as Markdown, its figures as links into figures/."""
    lines = []
    for kind, *content in blocks:
        if kind in ("h1", "h2", "h3"):
            lines.append("#" * int(kind[1]) + " " + content[0])
        elif kind == "list":
            lines.append("\n".join(f"- {text}" for text in content[0]))
        elif kind == "table":
            header, rows = content
            rule = ["---"] + ["---:"] * (len(header) - 1)
            lines.append("\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows)))
        elif kind == "figure":
            lines.append(f"![{content[1]}](figures/{content[0]})\n\n*{content[1]}*")
        else:
            lines.append(content[0])
    return "\n\n".join(lines) + "\n"


def as_html(blocks: Blocks, pictures: Path) -> str:
    """The same as one HTML file that loads nothing: style and figures are inside."""

    def inline(text: str) -> str:
        text = html.escape(text).replace(" ± ", "&nbsp;±&nbsp;")
        text = re.sub(r"`(.+?)`", r"<code>\1</code>", text)
        return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)

    body, title = [], html.escape(blocks[0][1])
    for kind, *content in blocks:
        if kind == "list":
            body.append(f"<ul>{''.join(f'<li>{inline(text)}</li>' for text in content[0])}</ul>")
        elif kind == "table":
            rows = [
                "<tr>" + "".join(f"<{tag}>{inline(cell)}</{tag}>" for cell in row) + "</tr>"
                for tag, row in [("th", content[0]), *(("td", row) for row in content[1])]
            ]
            body.append(f'<div class="wide"><table>{"".join(rows)}</table></div>')
        elif kind == "figure":
            data = base64.b64encode((pictures / content[0]).read_bytes()).decode()
            caption = inline(content[1])
            image = f'<img alt="{html.escape(content[1])}" src="data:image/png;base64,{data}">'
            body.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
        else:
            body.append(f"<{kind}>{inline(content[0])}</{kind}>")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<style>{CSS}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def introduction(groups: dict[str, list[Run]], unfinished: list[str], facts: dict) -> Blocks:
    """What this is, what the words mean, where the runs were made and which are missing."""
    runs = [one for group in groups.values() for one in group]
    machines = sorted(
        {
            "{device}, {threads} threads, {precision}, PyTorch {torch}".format(**one.environment)
            for one in runs
        }
    )
    missing = missing_runs(groups)
    seeds = sorted({one.seed for one in runs})
    profiles = sorted({f"{one.config['profile']} profile on {one.config['data']}" for one in runs})
    facts |= {"machines": machines, "missing": missing, "unfinished": unfinished, "seeds": seeds}
    blocks: Blocks = [
        ("h1", "Flying objects: small U-Nets, compared"),
        (
            "p",
            "In 2021 a student lab trained three small U-Nets (*initial*, *modified*, *tuned*) to "
            "find squares, triangles and circles in small pictures, pixel by pixel, and asked what "
            "makes such a model good. This report repeats its experiments, adds a model of our own "
            "(*best*) and answers its questions. It was written by `report.py` from the files of "
            "the runs; nothing in it is typed by hand.".replace("*", ""),
        ),
        (
            "list",
            [
                "**IoU** of a class: pixels that are of it and predicted as it, divided by pixels "
                "that are either; from 0 to 1. **Mean IoU** is its mean over the classes, all "
                "pixels of a split counted together: the number to compare.",
                "**Accuracy**: share of pixels predicted right. **Dice**: like IoU, but the shared "
                "pixels count twice. **Boundary IoU**: IoU of the rims alone.",
                "**Dead class**: one that is there and never predicted.",
                "**n**: number of seeds, runs that differ in their random numbers only. Scores are "
                "the mean ± the sample standard deviation over them.",
                "**lab IoU**: what the lab published, measured on one batch of 50 images and so "
                "not comparable (see the end).",
                f"Here: {len(runs)} runs of {len(groups)} experiments, seeds "
                f"{', '.join(map(str, seeds))}, {'; '.join(profiles)}.",
                f"Made on: {'; '.join(machines)}.",
            ],
        ),
    ]
    if unfinished:
        blocks += [("h3", "Unfinished runs, left out"), ("list", unfinished)]
    if missing:
        texts = [f"`make {target}`: {', '.join(names)}" for target, names in missing.items()]
        blocks += [("h3", "Missing experiments, and what makes them"), ("list", texts)]
    return blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="holds the runs")
    parser.add_argument("--out", type=Path, default=Path("report"), metavar="DIR")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args()
    groups, unfinished = find_runs(args.runs)
    if not groups:
        more = f"; unfinished: {', '.join(unfinished)}" if unfinished else ""
        raise UserError(f"{args.runs}: holds no finished run; `make report` makes some{more}")
    models = {name: groups[name] for name in MODELS if name in groups}
    check_tables(groups)

    pictures, facts = args.out / "figures", {}
    blocks = introduction(groups, unfinished, facts)
    tested: dict = {}
    if models:
        tested = run_models(models, args.device)
        facts["boundary_iou"] = tested["boundary"]
        facts["recheck"] = tested["recheck"]
        blocks += comparison(models, tested, pictures)
    blocks += answers(groups, facts)
    blocks += experiments(groups, pictures)
    blocks += explanations(groups, tested, pictures, facts)

    facts["tables"] = [{"header": b[1], "rows": b[2]} for b in blocks if b[0] == "table"]
    facts["statistics"] = {
        name: {
            split: {score: of(runs, score, split) for score in SCORES}
            for split in ("testing", "validation")
            if split == "validation" or runs[0].test
        }
        for name, runs in groups.items()
    }
    facts["runs"] = [
        {"experiment": one.experiment, "seed": one.seed, "folder": str(one.folder)}
        | {"environment": one.environment, "summary": one.summary, "testing": one.test}
        for runs in groups.values()
        for one in runs
    ]
    for name, text in (
        ("report.md", as_markdown(blocks)),
        ("report.html", as_html(blocks, pictures)),
        ("results.json", json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False) + "\n"),
    ):
        write_atomically(args.out / name, text.encode())
    print(f"{args.out / 'report.html'}: {len(groups)} experiments")
    if unfinished:
        raise UserError(f"unfinished runs, left out of the report: {', '.join(unfinished)}")


if __name__ == "__main__":
    run(main)
