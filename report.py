"""Write the report of the runs below a folder, or RESULTS.md from the published runs.

    python report.py --runs runs/generated/quick --out report
    python report.py --published

The first writes report.md, report.html (one file that needs no other) and figures/ into OUT. The
second reads results/runs.jsonl alone and writes RESULTS.md, the tables of README.md and docs/*.md
and results/figures/.

To add a sentence with a number, edit section_models in report_models.py; its top says how. The
other sections are in report_sweeps.py, report_lost.py, report_positions.py and report_lab.py, the
notes at the end in report_notes.py. SECTIONS in report_page.py lists the sections in order, and is
where a new one is named.
"""

import argparse
import base64
import re
from pathlib import Path

import machine  # noqa: F401 (before torch: see machine.py)

from markdown import markdown as convert

from common import ROOT, UserError, run, write_atomically
from report_models import captioned, draw_curves, rows_of, section_pictures, table_of
from report_notes import definitions, machines, what_is_missing
from report_page import (
    MODELS_SECTION,
    SECTIONS,
    STUDIES,
    WHY_SECTION,
    in_short,
    write_details,
    write_section,
)
from report_positions import count_striped
from report_published import PUBLISHED, read_published
from report_runs import (
    Run,
    Study,
    check_one_profile,
    find_runs,
    sort_runs,
)
from table import COLUMNS, markdown

# ---- the report of a folder


def page_of_folder(study: Study, unfinished: list[str]) -> str:
    """Write the page of `make report`."""
    runs = study.all_runs
    aim = "and answers its questions"
    if study.group != "flight":  # own data
        aim = "on other images"
    experiments = {member.experiment for member in runs}
    seeds = ", ".join(str(seed) for seed in sorted({member.seed for member in runs}))
    parts = [
        "# Flying objects: small U-Nets, compared",
        "In 2021 a student lab trained three small U-Nets (`initial`, `modified`, `tuned`) to find"
        " squares, triangles and circles in small pictures, pixel by pixel. This report repeats its"
        f" experiments with a fourth model, `best`, {aim}.",
        f"It rests on {len(runs)} runs of {len(experiments)} experiments ({study.profile} profile,"
        f" data `{study.data}`, seeds {seeds}). Every number comes from the files of the runs,"
        " except for what the lab published.",
        write_section(MODELS_SECTION, [study]),
    ]
    pictures = section_pictures(study)
    if pictures is not None:
        parts.append(f"## What the models see\n\n{pictures}")
    parts.append(in_short([study]))
    for section in SECTIONS:
        if section is not MODELS_SECTION:
            parts.append(write_section(section, [study]))
    parts.append(what_is_missing([study], unfinished))
    parts.append(details_of([study]))
    parts += [definitions(study.group), machines(runs)]
    return "\n\n".join(part for part in parts if part is not None) + "\n"


def details_of(studies: list[Study]) -> str:
    """Write the full tables of all sections, under one heading."""
    parts = ["## Details"]
    for section in SECTIONS:
        details = write_details(section, studies)
        if details is not None:
            parts.append(details)
    return "\n\n".join(parts)


def to_html(text: str, folder: Path) -> str:
    """Convert Markdown to one HTML file that loads nothing: it holds the figures of a folder."""
    body = convert(text, extensions=["tables"]).replace(" ± ", "&nbsp;±&nbsp;")

    def embed(match: re.Match) -> str:
        title, source, caption = match.groups()
        data = base64.b64encode((folder / source).read_bytes()).decode()
        image = f'<img alt="{title}" src="data:image/png;base64,{data}" />'
        return f"<figure>{image}<figcaption>{caption or ''}</figcaption></figure>"

    figure = r'<p><img alt="(.*?)" src="(.*?)" /></p>(?:\n<p><em>(.*?)</em></p>)?'  # its caption
    body = re.sub(figure, embed, body)
    page = (ROOT / "docs/report.html").read_text(encoding="utf-8")
    title = text.splitlines()[0].removeprefix("# ")
    return page.replace("$title", title).replace("$body", body)


def write_report(root: Path, out: Path, variables: str | None = None) -> None:
    """Write report.md, report.html and figures/ about the runs below a folder.

    The commands in it repeat `variables`, as make was called with them.
    """
    runs, unfinished = find_runs(root)
    if not runs:
        why = f" ({unfinished[0]})" if unfinished else ""
        raise UserError(f"{root}: holds no finished run; `make report` makes some{why}")
    check_one_profile(runs, root)
    study = sort_runs(runs, out / "figures", "figures", variables)
    text = page_of_folder(study, unfinished)
    write_atomically(out / "report.md", text.encode())
    write_atomically(out / "report.html", to_html(text, out).encode())
    print(f"{out / 'report.html'}: {len(runs)} runs")


# ---- the published runs

SPEEDRUN_GOAL = 0.995  # mean IoU, as in the Makefile
PROTOCOLS = """### The kinds of runs

- **By the lab's protocol** (`PROFILE=full`) means: whole images, batches of 32, Adam at 0.005, 15
  epochs, the lab's losses, and horizontal flips where the lab had them. Three things differ from
  the lab. Images are RGB, without a fourth channel computed from the three. A processor that has
  bfloat16 computes in it (see Machines below). The epoch that is best on the validation split is
  tested. `best` has a recipe of its own.
- **In short runs** (`PROFILE=quick`) means: minutes of training on small crops, by a learning rate
  that rises and falls, without horizontal flips. The last up-sampling of the lab's models starts as
  a plain enlargement, so that it loses fewer classes. Validation has 100 images instead of 2,241.
- **In runs of their own length** means: whole images without augmentation for 1,000 steps, with 200
  validation images (`make heads`), or two and 32 images again and again (`make overfit`).

The command above a text makes its runs with seed 0. `SEEDS="0 1 2"` makes three of each; runs of
`heads` have the seeds 0 to 9. To repeat one run alone, train it with
`make runs/afo/quick/augment/jitter/seed0/summary.json DATA=afo` and test it with
`python evaluate.py runs/afo/quick/augment/jitter/seed0/best.pt`.

`make results` writes this page from `results/runs.jsonl`. What the lab did comes from its notebook
and logs (johagg17/ArtificialFlyingObjects at commit 98b1590), not from its report alone."""


def scores_of_weights(runs: list[Run]) -> str:
    """Say what the models score that were trained on generated flights."""
    members = [r for r in runs if r.experiment == "weights" and r.on_scenes]
    shipped = members[0].on_afo
    generated = COLUMNS["mean IoU"]([member.on_scenes for member in members])
    return (
        f"The file scores {shipped['mean_iou']:.4f} on all {shipped['images']:,} of the lab's test"
        f" images. On other generated flights {len(members)} runs of its recipe score {generated}."
    )


def models_on_generated(runs: list[Run], out: Path) -> str:
    """Tabulate the models trained on generated images, for README.md, and draw their curves."""
    link = "results/figures/generated-quick"
    members = [r for r in runs if r.data == "generated" and r.profile == "quick"]
    study = sort_runs(members, out / link, link)
    draw_curves(study)
    return table_of(rows_of(study.models, "test"), ["parameters", "mean IoU", "accuracy"])


def models_on_real_images(study: Study) -> str:
    """Tabulate the models trained on the lab's images in short runs, for README.md."""
    return table_of(rows_of(study.models, "test"), ["mean IoU", "accuracy", "lab IoU"])


def speedruns(runs: list[Run]) -> list[Run]:
    """List the published runs of `make speedrun`, which tests on the lab's images."""
    return [member for member in runs if member.experiment == "speedrun" and member.on_afo]


def count_fast(runs: list[Run]) -> str:
    """Say how many of the published runs of `make speedrun` reach its goal."""
    ious = [member.on_afo["mean_iou"] for member in speedruns(runs)]
    reached = sum(iou >= SPEEDRUN_GOAL for iou in ious)
    return f"{reached} of {len(ious)} reach it."


def speedrun_table(runs: list[Run]) -> str:
    """Tabulate the published runs of `make speedrun`."""
    shown = ("mean IoU", "boundary IoU (2 px)", "accuracy", "images seen", "training")
    lines = [["seed", *shown, "threads"]]
    for member in speedruns(runs):
        cells = [COLUMNS[heading]([member.on_afo]) for heading in shown]
        lines.append([str(member.seed), *cells, str(member.machine["threads"])])
    return markdown(lines)


def fill_tables(page: str, tables: dict[str, str], source: str) -> str:
    """Replace what stands between `<!-- table: NAME -->` and `<!-- end -->`."""

    def fill(match: re.Match) -> str:
        name = match[1]
        if name not in tables:
            known = ", ".join(tables)
            raise UserError(f"{source}: there is no table {name!r}; there are {known}")
        return f"<!-- table: {name} -->\n{tables[name]}\n<!-- end -->"

    return re.sub(r"<!-- table: (.*?) -->\n.*?<!-- end -->", fill, page, flags=re.DOTALL)


def page_of_published(runs: list[Run], studies: list[Study]) -> str:
    """Write RESULTS.md."""
    test = studies[0].models["tuned"][0].test
    short_runs = next(study for study in studies if study.profile == "quick")
    striped, tested = count_striped(short_runs)
    parts = [
        "# Results",
        "A small U-Net can find a shape and still get half of its pixels wrong.",
        captioned(
            "docs/stripes.png",
            "Two test images, their truth, and the predictions of four runs. The colours of the"
            " masks are the classes. Colours in the images mean nothing. With seed 3, `tuned` turns"
            " squares and triangles into a fine pattern of both.",
        ),
        "Seed 0 and seed 3 of `tuned` are the same code (`make train-tuned DATA=afo"
        ' RUNS=runs/random SEEDS="0 3" SET="upsampling_init=random background_bias=0"`). With seed'
        " 3, each of the four positions in a block of 2×2 pixels can answer with one of the two"
        " shapes only: some always say square, the others triangle. These two runs were made for"
        " this picture, and are in no table. Our other short runs start in a safer way, or have"
        f" a wider last stage (`best`): of {tested} tested ones, {striped} show such patterns.",
        "A student lab of 2021 asked what makes a small U-Net good. We asked again, with its own"
        f" data: *Artificial Flying Objects*, tested on {test['images']:,} images from"
        f" {test['groups']} flights. A flight is a scene in motion: its images are nearly copies.",
        "Three models are the lab's: `initial`, `modified` (a stage deeper) and `tuned` (half of"
        " the channels of `modified`, and a smaller first kernel). In long runs they have the"
        " lab's horizontal flips, in short runs none. `best` is ours. It changes several things"
        " at once, so a win does not show which one helped. Its skip connections start at full"
        " resolution. Its decoder is wider than in `tuned`, its last stage wider than the number"
        " of classes. In half of its loss each class has the same weight. In long runs it alone"
        " trains on crops around shapes, by a learning rate that rises and falls. In short runs"
        " all models train so, but `best` has a higher rate and sees 1.5 times as many crops.",
        in_short(studies),
        write_section(WHY_SECTION, studies),
    ]
    for section in SECTIONS:
        if section is not WHY_SECTION:
            parts.append(write_section(section, studies))
    parts += [
        "## The weights that come with the project",
        "They are weights of `best`, trained on 21,600 generated flights alone. Seed 0"
        " is the file `weights/best.pt` ([model card](weights/README.md)).",
        scores_of_weights(runs),
        '    make weights SEEDS="0 1 2"\n'
        "    python predict.py --checkpoint runs/weights/seed0/best.pt --slim weights/best.pt\n"
        "    python evaluate.py weights/best.pt --data data/afo",
        "## A short training on generated flights",
        "`speedrun` trains a smaller `best` on generated flights for four epochs. The goal of each"
        f" run is a mean IoU of {SPEEDRUN_GOAL} on the lab's test images. {count_fast(runs)}",
        speedrun_table(runs),
        "## Three things to try",
        '- `make train-tuned RUNS=runs/random SEEDS="4 5 6" SET="upsampling_init=random'
        ' background_bias=0"`: does one of your seeds lose a class, or draw stripes? Look at'
        " `predictions.png`.\n"
        '- `make train-tuned SEEDS="3 4 5"`: with the start that short runs have, is a class'
        " lost?\n"
        "- `python evaluate.py weights/best.pt --data data/generated`: does the shipped model know"
        " the generated images as well?",
        details_of(studies),
        PROTOCOLS,
        definitions(studies[0].group),
        machines(runs),
        what_is_missing(studies, []),
    ]
    return "\n\n".join(part for part in parts if part is not None) + "\n"


def check_published(runs: list[Run]) -> None:
    """Raise UserError if runs are missing on which a text or table of the pages rests."""
    published = {(member.data, member.profile, member.experiment) for member in runs}
    needed = [(data, profile, "tuned") for data, profile in STUDIES]
    needed += [("generated", "quick", "tuned"), ("scenes", "full", "weights")]
    for key in needed:
        if key not in published:
            name = "/".join(key)
            advice = "restore the file: git checkout results/runs.jsonl"
            raise UserError(f"{PUBLISHED}: has no run of {name}; {advice}")


def write_published(out: Path) -> None:
    """Write RESULTS.md, its figures and the tables of other pages from results/runs.jsonl."""
    runs = read_published()
    check_published(runs)
    studies = []
    for data, profile in STUDIES:
        members = [r for r in runs if r.data == data and r.profile == profile]
        link = f"results/figures/{data}-{profile}"
        studies.append(sort_runs(members, out / link, link))
    write_atomically(out / "RESULTS.md", page_of_published(runs, studies).encode())
    short_runs = next(study for study in studies if study.profile == "quick")
    tables = {
        "models": models_on_generated(runs, out),
        "models on real images": models_on_real_images(short_runs),
        "make speedrun": speedrun_table(runs),
    }
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        page = path.read_text(encoding="utf-8")
        name = path.relative_to(ROOT)
        if "<!-- table: " in page:
            write_atomically(out / name, fill_tables(page, tables, str(name)).encode())
            print(out / name)
    print(out / "RESULTS.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--runs", type=Path, metavar="DIR", help="a folder that holds runs")
    source.add_argument("--published", action="store_true", help="the runs in results/runs.jsonl")
    parser.add_argument("--out", type=Path, metavar="DIR", help="report, or the project's folder")
    parser.add_argument("--variables", metavar="TEXT", help="that make was called with: DATA=…")
    args = parser.parse_args()
    if args.published:
        write_published(args.out or ROOT)
    else:
        write_report(args.runs, args.out or Path("report"), args.variables)


if __name__ == "__main__":
    run(main)
