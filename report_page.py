"""List the sections of the page in order, and write them and the table of short answers.

The functions that write a section are in report_models.py (the models), report_sweeps.py (series
of experiments), report_lost.py (lost classes), report_positions.py (lost positions) and
report_lab.py (the lab's metric, test and choices).
"""

from collections.abc import Callable
from typing import NamedTuple

import report_lab
import report_lost
import report_models
import report_positions
import report_sweeps
from report_models import Answer
from report_runs import Study
from table import LAB, markdown

# The studies of RESULTS.md: (data, profile) → what the page calls it.
STUDIES = {("afo", "full"): "By the lab's protocol", ("afo", "quick"): "In short runs"}
RUN_LENGTH = {"full": "long", "quick": "short"}
OWN_LENGTH = "In runs of their own length"  # the same in both profiles
LAB_IOU = LAB["test_iou"]


class Section(NamedTuple):
    """Hold a heading, sentences that every study needs, and the functions that write the rest."""

    title: str
    targets: str  # of make, which make its runs
    introduction: str
    write: Callable[[Study], str | None] | None = None
    answer: Callable[[Study], Answer | None] | None = None  # stands first, and in the short answers
    details: Callable[[Study], str | None] | None = None  # the full tables, at the end of the page
    lab_said: str = "–"
    once: bool = False  # True: one study is enough
    own_length: bool = False  # True: its runs have one length, whatever the profile
    quick_targets: str | None = None  # if short runs come from other targets


WHY_SECTION = Section(
    "Why do runs of the same code differ so much?",
    "report augment final",
    "The last up-sampling of the lab's networks computes each of the four positions of every 2×2"
    " pixels with weights of its own (Odena et al. 2016, doi:10.23915/distill.00003). At some"
    " positions these weights may never learn a class. The masks then have stripes or regular"
    " holes.",
    report_positions.section_seeds,
    report_positions.answer_seeds,
    report_positions.details_seeds,
    lab_said="could not say",
    once=True,
)
MODELS_SECTION = Section(
    "Which model wins?",
    "report",
    "",
    report_models.section_models,
    report_models.answer_models,
    report_models.details_models,
    lab_said=f"`tuned`, {LAB_IOU['tuned']:.4f}",
)
SECTIONS = [
    Section(
        "Does a high accuracy imply a good model? Which metric suits better?",
        "report",
        "",
        report_models.section_accuracy,
        report_models.answer_accuracy,
        lab_said="no",
        once=True,
    ),
    WHY_SECTION,
    Section(
        "How often does the last stage lose a class?",
        "heads",
        "The lab's last decoder stage has one channel for each class, and a ReLU after it. A"
        " channel that is 0 everywhere passes nothing on, and a class may then be lost at all"
        " positions. Its IoU is 0. Accuracy hardly shows it.",
        report_lost.section_heads,
        report_lost.answer_heads,
        report_lost.details_heads,
        once=True,
        own_length=True,
    ),
    Section(
        "Curves that lied",
        "train-tuned",
        "The lab never reset its metric object. Each point of its curves is an average over all"
        " epochs so far, and some runs began with what the run before had left.",
        report_lab.section_running_average,
        once=True,
    ),
    Section(
        "Did the lab's test batch matter?",
        "report augment final",
        "The lab tested on one batch of 50 images, the same for every run, with the model left in"
        " training mode. Batch norm then uses the statistics of this batch.",
        report_lab.section_fifty_images,
        report_lab.answer_fifty_images,
        details=report_lab.details_fifty_images,
    ),
    MODELS_SECTION,
    Section(
        "Increase the complexity a little: does it improve?",
        "report",
        "`modified` is one stage deeper than `initial`. It also has another loss, the pooled Dice"
        " instead of cross-entropy, so depth alone is not tested.",
        report_models.section_modified,
        report_models.answer_modified,
        lab_said=f"{LAB_IOU['modified']:.4f} against {LAB_IOU['initial']:.4f}",
    ),
    Section(
        "Does augmentation help?",
        "augment",
        "The number in a name is the probability of the flip or the blur. In `flip-blur` it is"
        " the blur's, and half of the images are flipped. A blur has the strength that it had in"
        " the lab (`configs/augment/`), and blurs the masks too, as the lab did, except in"
        " `blur-0.8-clean-masks`. The lab's `tuned` was trained with horizontal flips, so the lab"
        " compared one augmentation with another.",
        report_sweeps.section_augmentation,
        report_sweeps.answer_augmentation,
        report_sweeps.details_augmentation,
        lab_said="vertical flips of 0.3, 0.5 and 0.8 of the images:"
        f" {LAB_IOU['flip-0.3']:.4f}, {LAB_IOU['flip-0.5']:.4f}, {LAB_IOU['flip-0.8']:.4f};"
        f" `tuned`: {LAB_IOU['tuned']:.4f}",
    ),
    Section(
        "Why might vertical flips have helped the lab?",
        "augment",
        "All triangles of the data point right. A horizontal flip makes triangles that never occur,"
        " a vertical flip gives scenes of the same kind. (`flip-0.5` flips vertically.)",
        report_sweeps.section_flips,
        report_sweeps.answer_flips,
    ),
    Section(
        "Does an augmentation that the lab lacked help?",
        "augment",
        "`jitter` changes brightness, contrast, saturation and hue. The lab tried it, but its code"
        " fails on images of four channels.",
        report_sweeps.section_jitter,
        report_sweeps.answer_jitter,
        lab_said="tried it, but its code failed",
        once=True,
    ),
    Section(
        "What had the greatest impact?",
        "report tune augment",
        "Most settings change one thing in `tuned`. Those named `grid` change learning rate and"
        " width, and `skip-wide` changes skips and last stage: these are shown, but not compared."
        " Settings are compared on the"
        " validation split, because the test split must not be used for choosing.",
        report_sweeps.section_tuning,
        report_sweeps.answer_tuning,
        report_sweeps.details_tuning,
    ),
    Section(
        "Which loss suits the task better?",
        "tune",
        "The lab's loss is a Dice of all classes pooled. `loss-class` has cross-entropy and a Dice"
        " of each class instead.",
        report_lost.section_loss,
        report_lost.answer_loss,
        once=True,
    ),
    Section(
        "Force the network to overfit: how bad can it get?",
        "overfit",
        "`one-batch` trains on two images, `few-frames` on 32. The networks are the lab's. The loss"
        " (cross-entropy and a Dice of each class), the schedule (one_cycle) and the start of the"
        " last up-sampling (bilinear) are not.",
        report_sweeps.section_overfitting,
        report_sweeps.answer_overfitting,
        report_sweeps.details_overfitting,
        lab_said="tried, and failed to",
        once=True,
        own_length=True,
    ),
    Section(
        "Does longer training help?",
        "augment final",
        "`final`, the lab's last run, is `flip-0.5` with twice the epochs.",
        report_models.section_longer,
        report_models.answer_longer,
        lab_said=f"{LAB_IOU['final']:.4f} against {LAB_IOU['flip-0.5']:.4f}",
    ),
    Section(
        "Why did the validation loss jump?",
        "report augment final train-tuned-drop-last",
        "In the lab's logs the validation loss jumps in single epochs, to more than three times its"
        " lowest value so far. Each of the lab's epochs ended with a batch of one image. It makes a"
        " full step of the optimizer and updates the statistics of batch norm, just before"
        " validation.",
        report_lab.section_last_batch,
        report_lab.answer_last_batch,
        report_lab.details_last_batch,
        once=True,
    ),
    Section(
        "What the lab's choices were worth",
        "report augment train-tuned-drop-last",
        "",
        report_lab.section_choices,
        quick_targets="report augment tune",
    ),
    Section(
        "Other runs",
        "train-tuned-drop-last",
        "",
        details=report_models.details_other_runs,
    ),
]


def write_section(section: Section, studies: list[Study]) -> str | None:
    """Write what each study says under one heading; None if none of them says anything."""
    if section.write is None:
        return None
    answered = short_answer(section, studies)
    shown = studies
    if section.once and answered is not None:
        shown = [answered[0]]  # the study of the short answer
    texts = {}
    for study in shown:
        if section.once and texts:
            break
        text = section.write(study)
        if text is None:
            continue
        answer = section.answer(study) if section.answer else None
        if answer is not None:
            text = f"{answer.text}\n\n{text}"
        texts[study.profile] = text
    heading = f"## {section.title}"
    return under_heading(heading, section.introduction, texts, studies, section)


def write_details(section: Section, studies: list[Study]) -> str | None:
    """Write the full tables of a section; None if no study has any."""
    if section.details is None:
        return None
    texts = {}
    for study in studies:
        text = section.details(study)
        if text is not None:
            texts[study.profile] = text
    return under_heading(f"### {section.title}", "", texts, studies, section)


def under_heading(
    heading: str,
    introduction: str,
    texts: dict[str, str],
    studies: list[Study],
    section: Section | None = None,
) -> str | None:
    """Join the texts of studies, profile → text, under a heading; None if there is none.

    If there is more than one study, a line above each text names its runs, and the command that
    makes those of a section.
    """
    if not texts:
        return None
    parts = [heading]
    if introduction:
        parts.append(introduction)
    for study in studies:
        if study.profile not in texts:
            continue
        if len(studies) > 1:
            kind = STUDIES[study.data, study.profile]
            command = f"PROFILE={study.profile}"
            if section is not None:
                targets = section.targets
                if study.profile == "quick" and section.quick_targets:
                    targets = section.quick_targets
                command = f"make {targets}{study.settings}"
                if section.own_length:
                    kind = OWN_LENGTH
            parts.append(f"**{kind}** (`{command}`)")
        parts.append(texts[study.profile])
    return "\n\n".join(parts)


def short_answer(section: Section, studies: list[Study]) -> tuple[Study, Answer] | None:
    """Take the answer of the first study that can tell, or else of the first with several seeds."""
    answers = []
    for study in studies:
        answer = section.answer(study) if section.answer else None
        if answer is not None:
            answers.append((study, answer))
    for study, answer in answers:
        if answer.certainty != "cannot tell":
            return study, answer
    for study, answer in answers:
        if answer.comparison is not None and answer.comparison.verdict != "one seed":
            return study, answer
    return answers[0] if answers else None


def in_short(studies: list[Study]) -> str | None:
    """Tabulate the lab's questions with its answers and ours."""
    lines = []
    for section in SECTIONS:
        answered = short_answer(section, studies)
        if answered is None:
            continue
        study, answer = answered
        cells = [section.title, section.lab_said, answer.short or answer.text, answer.certainty]
        if len(studies) > 1:
            cells.append("own length" if section.own_length else RUN_LENGTH[study.profile])
        lines.append(cells)
    if not lines:
        return None
    headings = ["question", "the lab said", "we found", "how sure"]
    text = (
        "## In short\n\nScores are mean IoU. ± after a score is the standard deviation over seeds."
        " After a difference it is half of a 95 % interval: if it is larger than the difference,"
        " that may be luck of the seed."
    )
    if len(studies) > 1:
        headings.append("runs")
        text += (
            " Long runs follow the lab's protocol, short runs train for minutes, two questions have"
            " runs of their own length ([more on them](#the-kinds-of-runs)). The other words are"
            " [defined below](#definitions). **The first three rows are our main findings.**"
        )
    return f"{text}\n\n{markdown([headings, *lines]).replace('---:', '---')}"
