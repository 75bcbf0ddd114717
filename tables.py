"""Statistics over seeds, and the tables of the report."""

import math
from pathlib import Path

import figures
from collect import MODELS, Run, folder_of, must_agree, with_base
from evaluate import over_seeds, show

# What a report is made of: ("h2" | "h3" | "p", text), ("list", texts), ("table", header, rows) or
# ("figure", file, caption); texts may hold **strong** and `code`.
Blocks = list[tuple]
OVERFIT = {
    "one-batch": "Forced to overfit: one batch, no augmentation",
    "few-frames": "Overfitting on few frames of few sequences",
}
PERFECT = 0.9995  # rounds to 1.000
RULE = (
    "A row is marked **best** if its mean exceeds that of the runner-up by more than "
    "2·√(s₁²/n₁ + s₂²/n₂), twice the standard error of the difference of two means (Welch 1947), "
    "with s the standard deviation over n seeds. With one seed there is no s, and no mark."
)


# ---- statistics


def standard_error(a: dict, b: dict) -> float | None:
    """Of the difference of two means (Welch 1947); None if either has one seed only."""
    if a["std"] is None or b["std"] is None:
        return None
    return math.sqrt(a["std"] ** 2 / a["n"] + b["std"] ** 2 / b["n"])


def judge(a: dict, b: dict) -> str:
    """ "more", "less", "noise" or "one seed": how the mean of `a` compares to that of `b`."""
    error = standard_error(a, b)
    if error is None:
        return "one seed"
    difference = a["mean"] - b["mean"]
    return "noise" if abs(difference) <= 2 * error else "more" if difference > 0 else "less"


def best_of(stats: dict[str, dict]) -> str | None:
    """The name whose mean lies beyond seed noise above the runner-up's; None if there is none."""
    ranked = sorted(stats, key=lambda name: -stats[name]["mean"])
    if len(ranked) < 2 or judge(stats[ranked[0]], stats[ranked[1]]) != "more":
        return None
    return ranked[0]


def of(runs: list[Run], score: str, split: str = "testing") -> dict | None:
    """A score of `metrics.scores` over the seeds of an experiment."""
    rows = [run.test if split == "testing" else run.summary["validation"] for run in runs]
    return over_seeds([row[score] for row in rows])


def published(runs: list[Run]) -> str:
    """The test IoU in the lab's report, as text."""
    value = runs[0].config["published_iou"]
    return "–" if value is None else f"{value:.4f}"


# ---- tables


def table(groups: dict[str, list[Run]], split: str, columns: dict[str, object]) -> tuple:
    """A table with a row per experiment: mean IoU, n, the mark, the given columns, and the cost.

    Args:
        groups: label → runs.
        split: "testing" or "validation": whose mean IoU is shown.
        columns: header → function of the runs of an experiment to the text of a cell; a column
            with nothing but "–" is left out.
    """
    columns = {
        key: column
        for key, column in columns.items()
        if any(column(runs) != "–" for runs in groups.values())
    }
    stats = {name: of(runs, "mean_iou", split) for name, runs in groups.items()}
    best = best_of(stats)
    scored = f"{split.removesuffix('ing')} mean IoU"
    header = ["", scored, "n", "mark", *columns, "images seen", "training"]
    rows = []
    for name, runs in groups.items():
        seen, seconds = (
            over_seeds([one.summary[key] for one in runs])
            for key in ("images_seen", "train_seconds")
        )
        cells = [name, show(stats[name]), str(len(runs)), "**best**" if name == best else ""]
        cells += [column(runs) for column in columns.values()]
        rows.append([*cells, f"{seen['mean']:,.0f}", f"{seconds['mean']:.0f} s"])
    return ("table", header, rows)


def dead(runs: list[Run]) -> str:
    """The classes that at least one seed never predicts on the test split, as text."""
    return ", ".join(sorted({c for run in runs for c in run.test["dead_classes"]})) or "none"


def others(groups: dict[str, list[Run]]) -> dict[str, list[Run]]:
    """The experiments that are neither a model compared nor in a folder with a table of its own."""
    known = (*MODELS, "augment", "tune", "overfit")
    return {name: runs for name, runs in groups.items() if name.split("/")[0] not in known}


def overfitted(groups: dict[str, list[Run]], half: str) -> dict[str, list[Run]]:
    """The experiments of overfit/ whose name begins with `half`."""
    return {n: r for n, r in folder_of(groups, "overfit").items() if n.startswith(half)}


def check_tables(groups: dict[str, list[Run]]) -> None:
    """Refuse, before anything is written, runs that would share a table and must not."""
    models = {name: groups[name] for name in MODELS if name in groups}
    must_agree(models, budget=False)
    # Our model may take another budget: the column "images seen" says so.
    must_agree({name: runs for name, runs in models.items() if name != "best"}, budget=True)
    must_agree(with_base(groups, "augment", "none"), budget=True)
    must_agree(with_base(groups, "tune", "base"), budget=True)
    for half in OVERFIT:
        must_agree(overfitted(groups, half), budget=False)
    must_agree(others(groups), budget=False)


def experiments(groups: dict[str, list[Run]], pictures: Path) -> Blocks:
    """The tables of the experiments besides the models compared, of those that were run."""
    blocks: Blocks = [("h2", "The other experiments")]
    augment = with_base(groups, "augment", "none")
    tune = with_base(groups, "tune", "base")
    rest = others(groups)
    if augment:
        none = {"none": augment.pop("none")} if "none" in augment else {}
        blocks += [
            ("h3", "Augmentation of the tuned model"),
            (
                "p",
                "The number in a name is the probability; the lab's blurs differ in strength as "
                "well. The lab tested on one batch of 50 images and blurred its masks.",
            ),
            table({**none, **augment}, "testing", {"lab IoU": published}),
        ]
    if tune:
        tune = dict(
            sorted(tune.items(), key=lambda item: -of(item[1], "mean_iou", "validation")["mean"])
        )
        blocks += [
            ("h3", "Tuning, one factor at a time and a small grid"),
            (
                "p",
                "`base` is the tuned model. Sorted by the score on the validation split; the test "
                "split is not read for choices.",
            ),
            table(tune, "validation", {}),
        ]
    for half, text in OVERFIT.items():
        part = overfitted(groups, half)
        if not part:
            continue
        rows, lines = [], {}
        for name, runs in part.items():
            lines[name.removeprefix(half + "-")] = [run.history for run in runs]
            train, val = (
                over_seeds([run.history[-1][split]["mean_iou"] for run in runs])
                for split in ("training", "validation")
            )
            hit = [
                [e["epoch"] for e in r.history if e["training"]["mean_iou"] >= PERFECT]
                for r in runs
            ]
            reached = ", ".join(str(epochs[0]) if epochs else "never" for epochs in hit)
            gap = f"{train['mean'] - val['mean']:.4f}"
            frames = str(runs[0].config["limit_images"] or "all")
            rows.append([name, frames, reached, show(train), show(val), gap, str(len(runs))])
        header = [
            "",
            "frames",
            "1.000 in epoch",
            "training mean IoU",
            "validation mean IoU",
            "gap",
            "n",
        ]
        figures.curves(pictures / f"overfit-{half}.png", lines)
        blocks += [("h3", text), ("table", header, rows)]
        blocks += [("figure", f"overfit-{half}.png", f"{text}: training and validation by epoch.")]
    if rest:
        blocks += [
            ("h3", "Final run and others"),
            ("p", "Budgets differ between these rows: see images seen."),
            table(rest, "testing", {"lab IoU": published}),
        ]
    return blocks if len(blocks) > 1 else [*blocks, ("p", "None has been run yet.")]
