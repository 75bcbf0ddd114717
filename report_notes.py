"""Write the notes at the end of the page: definitions, machines, and what was not run."""

from common import ROOT
from report_page import under_heading
from report_runs import MODELS, SWEEPS, Run, Study

FEW = 6  # runs of one machine that are named


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
        " 2×2 pixels, `square 0.5/4` at two of the 16 positions of each 4×4 pixels.",
        "**n** is the number of seeds: runs of one config with other random numbers, perhaps on"
        " other machines. Scores are the mean ± the sample standard deviation over them.",
        "**Luck of the seed**: the difference of two means is too small for Welch's t test over the"
        " seeds (two-sided, 95 %). **Difference** stands with half of its 95 % interval.",
        "**Sure** is what was counted in enough runs, or a difference beyond luck of the seed."
        " **Likely** is a difference that may have another cause, or was picked among several; or a"
        " cause that fits what was counted.",
        "**Lab IoU** is what the lab published, from one run and one batch of 50 images.",
        "**Images seen** counts each time that training showed an image, or a crop of one.",
    ]
    if group == "flight":
        bullets.append("A **flight** is a scene in motion. Its images are nearly copies.")
    else:
        bullets.append("A **group** is what `group` in the config keeps in one split.")
    bullets.append(
        f"**95 % over {group}s**: a 95 % interval for the mean IoU on all {group}s of this kind, by"
        f" a bootstrap over the {group}s of the test split. Its limits are means over the seeds, so"
        " it does not show the luck of the seed. It is left out if fewer than five"
        f" {group}s of the test split show a class."
    )
    return "### Definitions\n\n" + bullet_list(bullets)


def bullet_list(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def machines(runs: list[Run]) -> str:
    """Count the runs of each machine, with the commits of the code; name the runs if few."""
    runs_of: dict[str, list[Run]] = {}  # machine → its runs
    for run in runs:
        if run.machine:
            used = run.machine
            name = f"{used['device']}, threads: {used['threads']}, {used['precision']}"
            name += f", PyTorch {used['torch']}"
            runs_of.setdefault(name, []).append(run)
    lines = []
    for name, members in sorted(runs_of.items(), key=lambda item: len(item[1]), reverse=True):
        number = "1 run" if len(members) == 1 else f"{len(members)} runs"
        if len(members) <= FEW:
            number += f" ({'; '.join(run.label for run in members)})"
        commits = sorted({run.machine["commit"] for run in members})
        lines.append(f"{name}: {number}. Code: {', '.join(commits)}.")
    return "### Machines\n\n" + bullet_list(lines)


def missing(study: Study, studies: list[Study]) -> list[str]:
    """List what is not run, with the command that makes it.

    Heads and overfitting runs do not depend on the profile, and settings are tuned in short runs:
    those of one study are enough.
    """
    done = {run.experiment for run in study.all_runs}
    for other in studies:
        done.update(other.heads)
        done.update(other.overfit)
        done.update(name for name in other.tune if name.startswith("tune/"))
    # tuned has one augmentation by itself, which make augment does not train.
    if study.profile == "quick":
        done.add("augment/no-augmentation")
    elif study.profile == "full":
        done.add("augment/horizontal-flip-0.7")
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
    texts = {}
    for study in studies:
        lines = missing(study, studies) + unfinished
        texts[study.profile] = bullet_list(lines) or "Nothing."
    heading = "### What is missing" if len(studies) > 1 else "## What you can run next"
    return under_heading(heading, "", texts, studies)
