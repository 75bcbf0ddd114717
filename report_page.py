"""Put the page together: headings and their order, short answers, definitions, what is missing.

Where does a sentence of the page come from? Its heading stands in SECTIONS, beside the function
that writes what follows. The functions are in report_models.py (the models), report_sweeps.py
(series of experiments) and report_lab.py (what went wrong in the lab).
"""

from collections.abc import Callable
from typing import NamedTuple

import report_lab
import report_models
import report_sweeps
from common import ROOT
from report_models import Answer
from report_runs import MODELS, SWEEPS, Run, Study
from table import LAB, markdown

PROFILES = {"full": "By the lab's protocol", "quick": "On small budgets"}
TEN_SEEDS = ' SEEDS="0 1 2 3 4 5 6 7 8 9"'
SWEEP_QUESTIONS = {
    "augment": "does augmentation help?",
    "tune": "which setting matters most?",
    "heads": "how often does the lab's last layer lose a class, and what prevents it?",
    "overfit": "can the network be forced to overfit?",
}


class Section(NamedTuple):
    """Hold a heading, sentences that are always true, and the function that writes the rest."""

    title: str
    introduction: str
    write: Callable[[Study], str | None]
    once: bool = False  # True: one study is enough


SECTIONS = [
    Section("Does a high accuracy mean a good model?", "", report_models.accuracy_trap, once=True),
    Section(
        "Same code, another seed: striped masks",
        "The last layer of the lab's networks computes each of the four positions of every 2×2"
        " pixels with weights of its own (Odena et al. 2016, doi:10.23915/distill.00003). Some of"
        " them may never learn a class: the masks then have stripes or regular holes.",
        report_lab.striped,
    ),
    Section(
        "Classes that are never predicted",
        "The lab's last decoder stage is a ReLU as narrow as the number of classes. It may stop"
        " passing on a class, whose IoU is then 0. Accuracy hardly shows it.",
        report_lab.never_predicted,
    ),
    Section("How the lab's last layer loses classes, and what helps", "", report_sweeps.heads),
    Section(
        "Curves that are running averages",
        "The lab never reset its metric object. Each point of its curves is an average over all"
        " epochs so far, and some runs began with what the run before had left.",
        report_lab.running_average,
        once=True,
    ),
    Section(
        "Fifty test images",
        "The lab tested on one batch of 50 images, the same for every run, with the model left in"
        " training mode.",
        report_lab.fifty_images,
    ),
    Section("Which model is best?", "", report_models.models_compared),
    Section("What the models see", "", report_models.pictures_seen),
    Section("Did the modified model beat the initial one?", "", report_models.modified_or_initial),
    Section(
        "Did augmentation help?",
        "The number in a name is a probability. The lab's blurs differ in strength as well"
        " (`configs/augment/`).",
        report_sweeps.augmentation_tried,
    ),
    Section(
        "What had the greatest impact?",
        "Each setting changes one thing in `tuned`. Settings are compared on the validation split,"
        " because the test split is not there to choose by.",
        report_sweeps.tuning,
    ),
    Section(
        "Can the network be forced to overfit?",
        "`one-batch` trains on two whole images, `few-frames` on 32, without augmentation. The"
        " networks are the lab's; the loss is cross-entropy and a Dice of each class.",
        report_sweeps.overfitting,
    ),
    Section("What the lab's choices were worth", "", report_lab.worth),
    Section(
        "The last run, and runs of other lengths",
        "These rows share no table with the models: look at the images seen. `final` is the lab's"
        " last run, with vertical flips and twice the epochs. `no-flip` means: without the"
        " horizontal flips that the lab trained with.",
        report_models.other_runs,
    ),
]


# ---- parts of the page


def write_section(section: Section, studies: list[Study]) -> str | None:
    """Write what each study says under one heading; None if none of them says anything."""
    parts = []
    for study in studies:
        if section.once and parts:
            break
        text = section.write(study)
        if text is None:
            continue
        if len(studies) > 1 and not section.once:
            text = f"### {PROFILES[study.profile]}\n\n{text}"
        parts.append(text)
    if not parts:
        return None
    if section.introduction:
        parts.insert(0, section.introduction)
    parts.insert(0, f"## {section.title}")
    return "\n\n".join(parts)


def in_short(studies: list[Study]) -> str | None:
    """Tabulate the lab's questions with its answers and ours."""
    lab = LAB["test_iou"]
    questions: list[tuple[str, str, Callable[[Study], Answer | None]]] = [
        ("Which model is best?", f"`tuned`, {lab['tuned']:.4f}", report_models.best_model),
        ("Does a high accuracy mean a good model?", "no", report_models.accuracy),
        (
            "Did `modified` beat `initial`?",
            f"{lab['modified']:.4f} against {lab['initial']:.4f}",
            report_models.modified,
        ),
        (
            "Did augmentation help?",
            f"vertical flips {lab['flip-0.5']:.4f}, `tuned` {lab['tuned']:.4f}",
            report_sweeps.augmentation,
        ),
        ("What had the greatest impact?", "–", report_sweeps.greatest_impact),
        ("Can the network be forced to overfit?", "tried, and failed", report_sweeps.memorised),
        ("Why do runs differ so much?", "could not say", report_lab.unlike_seeds),
        ("How often is a class lost?", "–", report_sweeps.lost_classes),
    ]
    lines = [["question", "the lab said", "we found", "how sure", "runs"]]
    for question, said, ask in questions:
        line = None
        for study in studies:  # the first that can tell, or else the first that has the runs
            answer = ask(study)
            if answer is None:
                continue
            if line is None or (line[3] == "cannot tell" and answer.sure != "cannot tell"):
                line = [question, said, answer.text, answer.sure, study.profile]
        if line is not None:
            lines.append(line)
    if len(lines) == 1:
        return None
    if len(studies) == 1:
        lines = [line[:4] for line in lines]
    return f"## In short\n\n{markdown(lines).replace('---:', '---')}"


def definitions(studies: list[Study]) -> str:
    """Define the words of the page, once."""
    bullets = [
        "**IoU** of a class is the overlap of prediction and truth divided by their union. **Mean"
        " IoU** averages it over the classes. All pixels of a split are counted together.",
        "**Accuracy** is the share of pixels that are predicted right.",
        "**Boundary IoU** is the IoU of the pixels up to 2 pixels inside a contour (after Cheng et"
        " al. 2021, arXiv:2103.16562, who take 2 % of the diagonal).",
        "**Never predicted**: a class that is in the masks but in no prediction.",
        "**Striped**: `square 2/4` is a class that is missing at two of the four positions of each"
        " 2×2 pixels.",
        "**n** is the number of seeds, runs that only differ in their random numbers. Scores are"
        " the mean ± the sample standard deviation over them.",
        "**Luck of the seed**: the difference of two means is too small for Welch's t test over the"
        " seeds (two-sided, 95 %). **Difference** stands with half of its 95 % interval.",
        "**Lab IoU** is what the lab published, from one run and one batch of 50 images.",
    ]
    groups = {study.group for study in studies}
    if "flight" in groups:
        bullets.append("A **flight** is a scene in motion. Its images are nearly copies.")
    for study in studies:
        tests = [run.test for runs in study.runs.values() for run in runs if run.test]
        if any(test["interval"] is None for test in tests):
            bullets.append(
                f"There are fewer than five {study.group}s in the test split, so there is no"
                f" interval over {study.group}s."
            )
            break
    else:
        name = studies[0].group
        bullets.append(
            f"**95 % over {name}s**: if the test split had other {name}s of the same kind, 95 % of"
            " the scores would be within these limits. They come from a bootstrap and are means"
            " over the seeds."
        )
    return "## Definitions\n\n" + "\n".join(f"- {bullet}" for bullet in bullets)


def machines(runs: list[Run]) -> str:
    """List the machines of runs, with the commits of the code that trained there.

    The experiments are named for all machines but the one with most runs.
    """
    by_machine: dict[str, list[Run]] = {}
    for member in runs:
        if member.machine:
            used = member.machine
            name = (
                f"{used['device']}, threads: {used['threads']}, {used['precision']},"
                f" PyTorch {used['torch']}"
            )
            by_machine.setdefault(name, []).append(member)
    lines = []
    for name in sorted(by_machine, key=lambda name: -len(by_machine[name])):
        members = by_machine[name]
        commits = sorted({member.machine["commit"] for member in members})
        text = f"- {name}: {len(members)} run{'s' if len(members) > 1 else ''}"
        if lines:
            experiments = sorted({f"`{member.data}/{member.experiment}`" for member in members})
            text += f" of {', '.join(experiments)}"
        lines.append(f"{text}. Code: {', '.join(commits)}.")
    return "## Machines\n\n" + "\n".join(lines)


def missing(study: Study, elsewhere: list[str]) -> list[str]:
    """List what is not run, with the command that makes it; not what other studies have."""
    lines = []
    absent = [name for name in (*MODELS, "final") if name not in study.runs]
    if absent:
        targets = " ".join(f"train-{name}" for name in absent)
        lines.append(f"`make {targets}{study.settings}` trains {', '.join(absent)}.")
    for folder in SWEEPS:
        if folder in elsewhere:
            continue
        names = sorted(path.stem for path in (ROOT / "configs" / folder).glob("*.yaml"))
        absent = [name for name in names if f"{folder}/{name}" not in study.runs]
        if "no-augmentation" in absent and is_plain(study.runs.get("tuned", [])):
            absent.remove("no-augmentation")  # the same as tuned
        seeds = TEN_SEEDS if folder == "heads" else ""
        command = f"`make {folder}{study.settings}{seeds}`"
        if absent and len(absent) < len(names) - 1:
            lines.append(f"{command} adds {', '.join(absent)}.")
        elif absent:
            lines.append(f"{command}: {SWEEP_QUESTIONS[folder]}")
    if any(len(runs) == 1 for runs in study.models.values()):
        command = f'`make report{study.settings} SEEDS="0 1 2"`'
        lines.append(f"{command} trains each model three times: one seed cannot rank models.")
    return lines + study.left_out


def is_plain(runs: list[Run]) -> bool:
    """Tell whether there are runs and they have no augmentation."""
    return bool(runs) and runs[0].config["horizontal_flip"] == 0


def what_is_missing(studies: list[Study], unfinished: list[str]) -> str:
    parts = ["## What is missing"]
    for study in studies:
        elsewhere = []
        for other in studies:
            if other is not study and other.heads:  # heads and overfit do not depend on the profile
                elsewhere.append("heads")
            if other is not study and other.overfit:
                elsewhere.append("overfit")
        lines = missing(study, elsewhere) + unfinished
        if len(studies) > 1:
            parts.append(f"### {PROFILES[study.profile]}")
        parts.append("\n".join(f"- {line}" for line in lines) or "Nothing.")
    return "\n\n".join(parts)


def join(parts: list[str | None]) -> str:
    """Join the parts of a page that are there."""
    return "\n\n".join(part for part in parts if part) + "\n"
