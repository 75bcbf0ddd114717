"""Write the report's sections on the models, with the helpers that all sections use.

A function answer_X gives a short answer, section_X writes what follows it in its section, and
details_X writes the tables at the end of the page. Each takes a study, the runs of one page by
experiment, and returns None if it lacks the runs. To add a sentence with a number, for example, in
section_models:

    if "best" in study.models:
        best = study.models["best"][0]  # the run of the first seed
        text += f" `best` scores {best.test['mean_iou']:.4f}."

A run has rows of scores `test` and `validation` (keys: the dict `row` in evaluate.py), its
`config`, and `history`, an entry for each epoch. `study.runs` has all experiments.
"""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import figures
from common import reading
from evaluate import SHOWN
from metrics import IGNORE, Comparison, mean_iou, welch
from report_runs import Run, Runs, Study
from table import COLUMNS, LAB, NONE, background_only, format_stat, markdown, rank, tabulate

HIGH_ACCURACY, LOW_IOU = 0.8, 0.5  # what is called high and poor
YES_OR_NO = {
    "more": "Yes. ",
    "less": "No. ",
    "noise": "We saw no clear difference. ",
    "one seed": "",
}
Rows = dict[str, list[dict]]  # experiment → the rows of its runs

# For pictures of the lab's classes: colours that the colour-blind can tell apart.
PICTURE_COLOURS = [[242, 242, 242], [213, 94, 0], [0, 158, 115], [0, 114, 178]]


class Answer(NamedTuple):
    """Hold a sentence that answers a question, and how certain it is."""

    text: str
    certainty: str  # "sure", "likely" or "cannot tell"
    comparison: Comparison | None = None  # what it rests on, where two experiments are compared
    short: str | None = None  # for the table of short answers, with fewer numbers; None: the text

    def begin_with(self, words: str) -> "Answer":
        """Put words before the text and before its short form."""
        return self._replace(text=words + self.text, short=words + (self.short or self.text))


# ---- helpers


def rows_of(runs: Runs, split: str) -> Rows:
    """Take the rows of the "test" or the "validation" split, and drop the folders of the names."""
    names = short_names(runs)
    rows = {}
    for experiment, members in runs.items():
        rows[names[experiment]] = [getattr(run, split) for run in members]
    return rows


def short_names(runs: Runs) -> dict[str, str]:
    """Name experiments without their folder, or with it where two would have the same name."""
    last_parts = {experiment: experiment.split("/")[-1] for experiment in runs}
    counts = Counter(last_parts.values())
    names = {}
    for experiment, last_part in last_parts.items():
        names[experiment] = last_part if counts[last_part] == 1 else experiment
    return names


def scores_of(runs: list[Run], split: str) -> list[float]:
    """List the mean IoU of each run on the "test" or the "validation" split."""
    return [getattr(run, split)["mean_iou"] for run in runs]


def score(values: list[float]) -> str:
    """Format mean IoUs of runs that differ in their seed: mean ± standard deviation."""
    return format_stat(values, std=True)


def compare(name_a: str, a: list[float], name_b: str, b: list[float]) -> Answer:
    """Say whether one experiment scores higher than another, by Welch's test over the seeds."""
    result = welch(a, b)
    if result.verdict == "one seed":
        text = f"{name_a} scores {score(a)}, {name_b} {score(b)}."
        number = "One run each" if len(a) == len(b) else f"So few runs, {len(a)} and {len(b)},"
        return Answer(f"{text} {number} cannot show which is better.", "cannot tell", result)
    difference = f"{result.difference:+.4f} ± {result.margin:.4f}"
    numbers = f"({score(a)} against {score(b)}, difference {difference})"
    finding = {
        "more": f"{name_a} beats {name_b}",
        "less": f"{name_a} scores lower than {name_b}",
        "noise": f"The gap between {name_a} and {name_b} may be luck of the seed",
    }[result.verdict]
    if result.verdict == "noise":
        return Answer(f"{finding} {numbers}.", "cannot tell", result, f"{finding}.")
    short = f"{finding}, by {abs(result.difference):.4f} ± {result.margin:.4f}."
    return Answer(f"{finding} {numbers}.", "sure", result, short)


def table_of(rows: Rows, headings: list[str]) -> str:
    """Write a table of experiments with some of `table.COLUMNS`."""
    columns = {heading: COLUMNS[heading] for heading in headings}
    return markdown(tabulate(rows, columns))


def picture(study: Study, name: str, caption: str) -> str:
    """Write a figure of a study with its caption below it."""
    return captioned(f"{study.link}/{name}", caption)


def captioned(link: str, caption: str) -> str:
    """Write a picture with a caption that a reader sees: Markdown shows no other text of it."""
    title = Path(link).stem.replace("-", " ")
    return f"![{title}]({link})\n\n*{caption}*"


def panel(runs: Runs, split: str, key: str = "mean_iou") -> dict[str, list[list[float]]]:
    """List a value of every epoch for `figures.curves`: experiment → runs → epochs."""
    names = short_names(runs)
    lines = {}
    for experiment, members in runs.items():
        values = [[entry[split][key] for entry in run.history] for run in members]
        lines[names[experiment]] = values
    return lines


def draw_mean_iou(study: Study, name: str, runs: Runs) -> str:
    """Draw mean IoU by epoch, and return the link to the figure."""
    panels = {
        "training mean IoU": panel(runs, "training"),
        "validation mean IoU": panel(runs, "validation"),
    }
    figures.curves(study.figures / name, panels)
    return picture(study, name, "Training and validation mean IoU by epoch.")


# ---- does a high accuracy mean a good model?


def answer_accuracy(study: Study) -> Answer | None:
    if not study.models:
        return None
    first = next(iter(study.models.values()))[0]
    nothing = background_only(first.test)
    share, low = nothing["pixel_accuracy"], nothing["mean_iou"]
    background = (
        f"Predicting {nothing['name'].removesuffix(' only')} everywhere scores an accuracy"
        f" of {share:.4f}, but a mean IoU of {low:.4f}."
    )
    if share >= HIGH_ACCURACY and low <= LOW_IOU:
        return Answer(f"No, mean IoU suits better. {background}", "sure")
    return Answer(f"This data does not show it. {background}", "cannot tell")


def section_accuracy(study: Study) -> str | None:
    if not study.models:
        return None
    ranked = rank(rows_of(study.models, "test"))
    top, rows = next(iter(ranked.items()))
    return (
        f"`{top}` scores an accuracy of {COLUMNS['accuracy'](rows)} and a mean"
        f" IoU of {COLUMNS['mean IoU'](rows)}. Where most pixels are background, accuracy hardly"
        " sees the shapes."
    )


# ---- which model is best?


def answer_models(study: Study) -> Answer | None:
    """Name the model with the highest score, and compare it with the next."""
    if len(study.models) < 2:
        return None
    ranked = list(rank(rows_of(study.models, "test")))
    first, second = ranked[0], ranked[1]
    a = scores_of(study.models[first], "test")
    b = scores_of(study.models[second], "test")
    answer = compare(f"`{first}`", a, f"`{second}`", b)
    seen = study.models[first][0].validation["images_seen"]
    seen_by_second = study.models[second][0].validation["images_seen"]
    if answer.certainty == "sure" and seen != seen_by_second:
        images_seen = f" It saw {seen:,} images, `{second}`, which is second, {seen_by_second:,}."
        short = answer.short + images_seen
        return Answer(answer.text + images_seen, "likely", answer.comparison, short)
    if a == b:
        return answer._replace(text=f"`{first}` and `{second}` score the same.", short=None)
    if answer.certainty == "sure":
        return answer
    if answer.comparison.verdict == "one seed":
        return answer.begin_with(f"`{first}` scores highest. ")
    return answer.begin_with(f"`{first}` scores highest, {score(a)}. ")


def section_models(study: Study) -> str | None:
    """Compare the models: the most important columns, and curves."""
    if not study.models:
        return None
    headings = ["mean IoU", "n", "accuracy", "never predicted", "striped", "lab IoU", "images seen"]
    text = models_table(study, headings)
    if any(run.test.get("lost_positions") for members in study.models.values() for run in members):
        text += (
            "\n\n`striped` names the classes that some run lost at a part of the positions: 1/4 is"
            " one of the four in each 2×2 pixels."
        )
    if len(study.models) > 1:
        draw_curves(study)
        caption = "Mean IoU and loss by epoch."
        if any(len(members) > 1 for members in study.models.values()):
            caption += " Lines are means, bands reach from the lowest to the highest seed."
        losses = [members[0].config["loss"] for members in study.models.values()]
        if any(loss != losses[0] for loss in losses):
            caption += (
                " The models minimise different losses: compare the shapes of those curves, not"
                " their heights."
            )
        text += f"\n\n{picture(study, 'curves.png', caption)}"
    return text


def draw_curves(study: Study) -> None:
    """Draw curves.png: mean IoU and loss of the models by epoch."""
    panels = {
        "training mean IoU": panel(study.models, "training"),
        "validation mean IoU": panel(study.models, "validation"),
        "validation loss": panel(study.models, "validation", "loss"),
    }
    figures.curves(study.figures / "curves.png", panels)


def details_models(study: Study) -> str | None:
    """Tabulate the models with all columns, and the interval over flights."""
    if not study.models:
        return None
    headings = ["mean IoU", "n", "boundary IoU (2 px)", "accuracy", "mean Dice", "never predicted"]
    headings += ["striped", "parameters", "images seen"]
    return models_table(study, headings, interval=True)


def models_table(study: Study, headings: list[str], interval: bool = False) -> str:
    """Tabulate the models below a model that predicts background everywhere."""
    rows = rows_of(study.models, "test")
    nothing = background_only(next(iter(rows.values()))[0])
    lines_of = {nothing["name"]: [nothing]}
    lines_of.update(rows)
    columns = {heading: COLUMNS[heading] for heading in headings}
    if interval:
        columns[f"95 % over {study.group}s"] = over_groups
    return markdown(tabulate(lines_of, columns))


def over_groups(rows: list[dict]) -> str:
    """Format the interval over flights or groups: the means of its limits over the seeds."""
    intervals = [row.get("interval") for row in rows]
    if None in intervals:
        return NONE
    low = format_stat([interval[0] for interval in intervals])
    high = format_stat([interval[1] for interval in intervals])
    return f"{low}–{high}"


# ---- what the models see


def section_pictures(study: Study) -> str | None:
    """Show test images with each model's prediction: evenly spaced ones, and the worst of one."""
    arrays = {}
    for name, members in study.models.items():
        if members[0].folder is None:  # a published run
            continue
        path = members[0].folder / "testing.npz"
        if path.exists():
            with reading(path, "remove this file and run make again"):
                arrays[name] = dict(np.load(path))
    if not arrays:
        return None
    judged = list(arrays)[-1]
    shown = list(arrays[judged]["shown"])
    even = min(SHOWN, len(arrays[judged]["names"]))  # evenly spaced ones, then the worst
    config = study.models[judged][0].config
    classes = figures.class_colours(config)
    if list(classes) == LAB["classes"]:  # of own images, the config chooses the colours
        classes = dict(zip(classes, PICTURE_COLOURS, strict=True))
    legend = dict(classes)
    if (arrays[judged]["masks"] == IGNORE).any():
        legend["ignored, or added to fit the size"] = figures.GREY
    rows = [pictures_of(arrays, judged, k, classes) for k in range(len(shown))]
    figures.save(figures.grid(rows[:even], legend), study.figures / "frames.png")
    figures.save(figures.grid(rows[even:], legend), study.figures / "worst.png")
    even_caption = "Evenly spaced test images. Beside each prediction its wrong pixels in black."
    worst = f"The worst test images of {judged}: lowest mean IoU, one image of each {study.group}."
    parts = [
        picture(study, "frames.png", even_caption),
        picture(study, "worst.png", worst),
    ]
    return "\n\n".join(parts)


def pictures_of(arrays: dict, judged: str, k: int, classes: dict) -> list[tuple]:
    """Make a row of pictures: image k of those shown, its truth, each model's prediction."""
    i = arrays[judged]["shown"][k]
    image = torch.from_numpy(arrays[judged]["images"][k, :3]).expand(3, -1, -1)
    mask = torch.from_numpy(arrays[judged]["masks"][k])
    name = str(arrays[judged]["names"][i])
    row = [(name, image), ("truth", figures.colourise(mask, classes))]
    for model, stored in arrays.items():
        predicted = torch.from_numpy(stored["predictions"][i])
        iou = mean_iou(torch.from_numpy(stored["matrices"][i]))
        is_right = (predicted == mask) | (mask == IGNORE)
        errors = (is_right.to(torch.uint8) * 255).expand(3, -1, -1)
        row.append((f"{model}: {iou:.4f}", figures.colourise(predicted, classes)))
        row.append(("errors", errors))
    return row


# ---- a deeper model, longer training, and the other runs


def answer_modified(study: Study) -> Answer | None:
    if "initial" not in study.models or "modified" not in study.models:
        return None
    a = scores_of(study.models["modified"], "test")
    b = scores_of(study.models["initial"], "test")
    answer = compare("`modified`", a, "`initial`", b)
    answer = answer.begin_with(YES_OR_NO[answer.comparison.verdict])
    return answer._replace(short=f"{answer.short} `modified` also has another loss.")


def section_modified(study: Study) -> str | None:
    """Compare modified with initial on the validation split as well."""
    if "initial" not in study.models or "modified" not in study.models:
        return None
    a = scores_of(study.models["modified"], "validation")
    b = scores_of(study.models["initial"], "validation")
    answer = compare("`modified`", a, "`initial`", b)
    limit = study.models["modified"][0].config["limit_validation"]
    where = f"at most {limit} validation images" if limit else "the validation split"
    text = f"On {where}: {answer.text}"
    on_validation = answer.comparison.difference
    on_test = answer_modified(study).comparison.difference
    if on_validation * on_test > 0:
        text += " The two splits point the same way."
    elif on_validation * on_test < 0:
        text += " The two splits point in different directions."
    return (
        f"{text}\n\nThe lab published {LAB['test_iou']['modified']:.4f} for `modified` and"
        f" {LAB['test_iou']['initial']:.4f} for `initial`, each from one run."
    )


def answer_longer(study: Study) -> Answer | None:
    """Say whether twice the epochs help: final against flip-0.5, which is half as long."""
    final = study.runs.get("final")
    half = study.runs.get("augment/flip-0.5")
    if not final or not half:
        return None
    if final[0].validation["images_seen"] != 2 * half[0].validation["images_seen"]:
        return None  # another number of epochs was given
    answer = compare("`final`", scores_of(final, "test"), "`flip-0.5`", scores_of(half, "test"))
    return answer.begin_with(YES_OR_NO[answer.comparison.verdict])


def section_longer(study: Study) -> str | None:
    """Tabulate final beside the run of half its length."""
    if answer_longer(study) is None:
        return None
    runs = {name: study.runs[name] for name in ("augment/flip-0.5", "final")}
    return table_of(rows_of(runs, "test"), ["mean IoU", "n", "lab IoU", "images seen"])


def details_other_runs(study: Study) -> str | None:
    """Tabulate the tested runs that share no table with the models."""
    others = dict(study.others)
    if answer_longer(study) is not None:
        others.pop("final", None)  # it has a section of its own
    if not others:
        return None
    headings = ["mean IoU", "n", "never predicted", "striped", "lab IoU", "images seen"]
    return table_of(rows_of(others, "test"), headings)
