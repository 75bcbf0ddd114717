"""List the sections of the page in order, and write its general parts: short answers, definitions.

The functions that write a section are in report_models.py (the models), report_sweeps.py (series
of experiments) and report_lab.py (what went wrong in the lab).
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

# The studies of RESULTS.md: (data, profile) → what the page calls it. The first runs were made with
# afo-half, the real data with half of the test images.
STUDIES = {
    ("afo", "full"): "By the lab's protocol",
    ("afo-half", "full"): "By the lab's protocol without flips, half of the test images",
    ("afo", "quick"): "On small budgets",
    ("afo-half", "quick"): "On small budgets, half of the test images",
}
LAB_IOU = LAB["test_iou"]


class Section(NamedTuple):
    """Hold a heading, sentences that are always true, and the functions that write the rest."""

    title: str
    introduction: str
    write: Callable[[Study], str | None]
    answer: Callable[[Study], Answer | None] | None = None  # stands first, and in the short answers
    lab_said: str = "–"
    once: bool = False  # True: one study is enough


SECTIONS = [
    Section(
        "Does a high accuracy mean a good model?",
        "",
        report_models.section_accuracy,
        report_models.answer_accuracy,
        lab_said="no",
        once=True,
    ),
    Section(
        "Why do runs of the same code differ so much?",
        "The last layer of the lab's networks computes each of the four positions of every 2×2"
        " pixels with weights of its own (Odena et al. 2016, doi:10.23915/distill.00003). Some of"
        " them may never learn a class: the masks then have stripes or regular holes.",
        report_lab.section_seeds,
        report_lab.answer_seeds,
        lab_said="could not say",
    ),
    Section(
        "Classes that are never predicted",
        "The lab's last decoder stage is a ReLU as narrow as the number of classes. It may stop"
        " passing on a class, whose IoU is then 0. Accuracy hardly shows it.",
        report_lab.section_never_predicted,
    ),
    Section(
        "How often does the last layer lose a class?",
        "",
        report_lab.section_heads,
        report_lab.answer_heads,
    ),
    Section(
        "Curves that are running averages",
        "The lab never reset its metric object. Each point of its curves is an average over all"
        " epochs so far, and some runs began with what the run before had left.",
        report_lab.section_running_average,
        once=True,
    ),
    Section(
        "Fifty test images",
        "The lab tested on one batch of 50 images, the same for every run, with the model left in"
        " training mode.",
        report_lab.section_fifty_images,
    ),
    Section(
        "Which model is best?",
        "`best` has a training length of its own: look at the images seen.",
        report_models.section_models,
        report_models.answer_models,
        lab_said=f"`tuned`, {LAB_IOU['tuned']:.4f}",
    ),
    Section("What the models see", "", report_models.section_pictures),
    Section(
        "Did `modified` beat `initial`?",
        "",
        report_models.section_modified,
        report_models.answer_modified,
        lab_said=f"{LAB_IOU['modified']:.4f} against {LAB_IOU['initial']:.4f}",
    ),
    Section(
        "Did augmentation help?",
        "The number in a name is a probability. The lab's blurs differ in strength as well"
        " (`configs/augment/`). The lab's `tuned` was trained with horizontal flips, so the lab"
        " compared one augmentation with another.",
        report_sweeps.section_augmentation,
        report_sweeps.answer_augmentation,
        lab_said=f"vertical flips {LAB_IOU['flip-0.5']:.4f}, `tuned` {LAB_IOU['tuned']:.4f}",
    ),
    Section(
        "What had the greatest impact?",
        "Each setting changes one thing in `tuned`. Settings are compared on the validation split,"
        " because the test split is not there to choose by.",
        report_sweeps.section_tuning,
        report_sweeps.answer_tuning,
    ),
    Section(
        "Can the network be forced to overfit?",
        "`one-batch` trains on two whole images, `few-frames` on 32, without augmentation. The"
        " networks are the lab's; the loss is cross-entropy and a Dice of each class.",
        report_sweeps.section_overfitting,
        report_sweeps.answer_overfitting,
        lab_said="tried, and failed",
    ),
    Section("What the lab's choices were worth", "", report_lab.section_choices),
    Section(
        "The last run, and runs of other lengths",
        "These rows share no table with the models: look at the images seen. `final` is the lab's"
        " last run, with vertical flips and twice the epochs. `no-flip` means: without the"
        " horizontal flips that the lab trained with. `modified-no-flip` stopped after 6 of 15"
        " epochs.",
        report_models.section_other_runs,
    ),
]


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
            parts.append(f"### {STUDIES[study.data, study.profile]}")
        answer = section.answer(study) if section.answer else None
        if answer is not None:
            parts.append(answer.text)
        parts.append(text)
    if not parts:
        return None
    if section.introduction:
        parts.insert(0, section.introduction)
    parts.insert(0, f"## {section.title}")
    return "\n\n".join(parts)


def short_answer(section: Section, studies: list[Study]) -> tuple[Answer, str] | None:
    """Take the answer of the first study that can tell, or else of the first that has the runs.

    Returns the answer and the study's profile.
    """
    found = []
    for study in studies:
        answer = section.answer(study)
        if answer is not None:
            found.append((answer, study.profile))
    for answer, profile in found:
        if answer.sure != "cannot tell":
            return answer, profile
    return found[0] if found else None


def in_short(studies: list[Study]) -> str | None:
    """Tabulate the lab's questions with its answers and ours."""
    lines = [["question", "the lab said", "we found", "how sure", "runs"]]
    for section in SECTIONS:
        found = short_answer(section, studies) if section.answer else None
        if found is not None:
            answer, profile = found
            lines.append([section.title, section.lab_said, answer.text, answer.sure, profile])
    if len(lines) == 1:
        return None
    if len(studies) == 1:  # all runs have the same profile
        lines = [line[:-1] for line in lines]
    return f"## In short\n\n{markdown(lines).replace('---:', '---')}"


def definitions(group: str) -> str:
    """Define the words of the page. Images that belong together are a `group`, as a flight is."""
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
    if group == "flight":
        bullets.append("A **flight** is a scene in motion. Its images are nearly copies.")
    bullets.append(
        f"**95 % over {group}s**: if the test split had other {group}s of the same kind, 95 % of"
        " the scores would be within these limits. They come from a bootstrap and are means over"
        f" the seeds. With fewer than five {group}s in the test split there are none."
    )
    return "## Definitions\n\n" + bullet_list(bullets)


def bullet_list(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def machines(runs: list[Run]) -> str:
    """Count the runs of each machine, with the commits of the code that trained there."""
    commits: dict[str, list[str]] = {}  # machine → a commit for each run
    for run in runs:
        if run.machine:
            used = run.machine
            name = f"{used['device']}, threads: {used['threads']}, {used['precision']}"
            name += f", PyTorch {used['torch']}"
            commits.setdefault(name, []).append(used["commit"])
    lines = []
    for name in sorted(commits, key=lambda name: len(commits[name]), reverse=True):
        number = len(commits[name])
        runs_of = "1 run" if number == 1 else f"{number} runs"
        lines.append(f"{name}: {runs_of}. Code: {', '.join(sorted(set(commits[name])))}.")
    return "## Machines\n\n" + bullet_list(lines)


def missing(study: Study, studies: list[Study]) -> list[str]:
    """List what is not run, with the command that makes it.

    Heads and overfitting runs do not depend on the profile: those of one study are enough.
    """
    done = set(study.runs)
    for other in studies:
        done.update(other.heads)
        done.update(other.overfit)
    tuned = study.runs.get("tuned")
    if tuned and tuned[0].config["horizontal_flip"] == 0:
        done.add("augment/no-augmentation")  # the same as tuned
    lines = []
    absent = [name for name in (*MODELS, "final") if name not in done]
    if absent:
        targets = " ".join(f"train-{name}" for name in absent)
        lines.append(f"`make {targets}{study.settings}` trains {', '.join(absent)}.")
    for folder in SWEEPS:
        names = sorted(path.stem for path in (ROOT / "configs" / folder).glob("*.yaml"))
        absent = [name for name in names if f"{folder}/{name}" not in done]
        seeds = ' SEEDS="0 1 2 3 4 5 6 7 8 9"' if folder == "heads" else ""
        if absent:
            lines.append(f"`make {folder}{study.settings}{seeds}` adds {', '.join(absent)}.")
    if any(len(members) == 1 for members in study.models.values()):
        command = f'`make report{study.settings} SEEDS="0 1 2"`'
        lines.append(f"{command} trains each model three times: one seed cannot rank models.")
    return lines + study.left_out


def what_is_missing(studies: list[Study], unfinished: list[str]) -> str:
    parts = ["## What is missing"]
    for study in studies:
        if len(studies) > 1:
            parts.append(f"### {STUDIES[study.data, study.profile]}")
        parts.append(bullet_list(missing(study, studies) + unfinished) or "Nothing.")
    return "\n\n".join(parts)
