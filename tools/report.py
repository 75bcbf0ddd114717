"""Write the report of all runs below a folder, from their stored results alone.

    python -m tools.report --runs runs/generated/quick --out report

Writes OUT/report.md, OUT/report.html (one file that needs no other), OUT/results.json (every
number) and OUT/figures/. The sentences are in docs/report_template.md; runs left out are listed.
"""

import argparse
import base64
import json
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from statistics import mode

from common import ROOT, UserError, reading, require, run, write_atomically

import numpy as np
from markdown import markdown

from config import load_config
from evaluate import LAB, differences, read_history, read_results
from metrics import mean_std
from tools import facts

ADVICE = "remove the folder of this run and make it again"
MACHINE = "{device}, threads: {threads}, {precision}, PyTorch {torch}"
COST = {"images_seen": int, "train_seconds": float}
LIMITS = dict.fromkeys(("interval", "interval_of_lab_batch"), (list, type(None)))
RESULTS = {
    "summary.json": COST,
    "testing.json": COST | {"groups": int, "contributions": list} | LIMITS,
}
UNTESTED = ("tune", "overfit", "heads")  # these look at validation, and never at the test split
TABLES = (*UNTESTED, "augment", "blurred-masks")  # of experiments that have a place of their own
DIFFERS = "`{}` differs from its table in {}."
STATISTICS = ("pixel_accuracy", "mean_iou", "mean_iou_foreground", "mean_dice")


def find_runs(root: Path) -> tuple[facts.Groups, list[str]]:
    """Read the finished runs below a folder, and list the others; UserError if one is damaged."""
    groups, left_out = {}, []
    folders = [f for f in root.rglob("seed*") if f.is_dir() and f.name[4:].isdecimal()]
    for folder in sorted(folders, key=lambda f: (f.parent, int(f.name[4:]))):
        name = folder.parent.relative_to(root).as_posix()
        files = list(RESULTS)[: 1 + (name.split("/")[0] not in UNTESTED)]
        if not all((folder / file).exists() for file in files):
            left_out.append(f"`{folder}` is not finished, it needs {' and '.join(files)}.")
            continue
        rows = dict.fromkeys(RESULTS)
        try:
            config = load_config([folder / "config.yaml"])
        except UserError as error:  # of an older version of the code
            left_out.append(f"A run is left out: {error}.")
            continue
        with reading(path := folder / "environment.json", ADVICE):
            environment = json.loads(path.read_text(encoding="utf-8"))
            MACHINE.format(**environment)
        history = read_history(folder / "metrics.jsonl", ADVICE)
        for file in files:
            with reading(folder / file, "remove this file and run make again"):
                [rows[file]] = read_results(folder / file)
                require(rows[file], RESULTS[file])
        found = (name, config["seed"], folder, config, environment, history, *rows.values())
        groups.setdefault(name, []).append(facts.Run(*found))
    return groups, left_out


def comparable(
    groups: facts.Groups, names: Collection[str]
) -> tuple[facts.Groups, facts.Groups, list[str]]:
    """Find the runs that can share a table of the experiments named.

    They have one budget, the images seen: that of most runs of the lab's models, or of all runs if
    there is none; best, ours, may have its own, which a column shows. Returns them, the other
    experiments and budgets (one for each name), and a line on each run that is in neither.
    """
    if not groups:
        return {}, {}, []
    counted = [name for name in groups if name in facts.LAB_MODELS] or groups
    all_runs = [one for name in counted for one in groups[name]]
    kept, apart, left_out = {}, {}, []
    budget = mode(one.validation["images_seen"] for one in all_runs)
    first = next(one for one in all_runs if one.validation["images_seen"] == budget)
    for name, runs in groups.items():
        for one in runs:
            seen = one.validation["images_seen"]
            differ = differences(one.validation, first.validation)
            differ += differences(one.test, first.test) if one.test and first.test else []
            table = kept if name == "best" or (seen == budget and name in names) else apart
            if seen != table.get(name, [one])[0].validation["images_seen"]:
                differ.append("images seen")
            if differ:
                left_out.append(DIFFERS.format(one.folder, ", ".join(dict.fromkeys(differ))))
            else:
                table.setdefault(name, []).append(one)
    return kept, apart, left_out


def gather(groups: facts.Groups, folder: str, base: str) -> tuple[facts.Groups, list[str]]:
    """Gather the experiments of a folder of configs for their table, and list what it lacks.

    The tuned model, which they vary, stands for `base`.
    """
    mine = {n.split("/")[1]: runs for n, runs in groups.items() if n.startswith(f"{folder}/")}
    absent = {path.stem for path in (ROOT / "configs" / folder).glob("*.yaml")} - mine.keys()
    missing = []
    if mine and absent:  # else the section says that it is not run
        missing.append(f"`make {folder}` makes {', '.join(sorted(absent))}.")
    if folder == "overfit":  # its rows have unlike budgets
        return mine, missing
    if base and mine and "tuned" in groups:
        mine = {base: groups["tuned"]} | mine
    kept, apart, lines = comparable(mine, mine)  # apart are those of another budget
    unlike = [one.folder for runs in apart.values() for one in runs]
    return kept, [*missing, *lines, *(DIFFERS.format(path, "images seen") for path in unlike)]


def machines_of(groups: facts.Groups) -> str:
    """Name the machines of some runs, those of most runs first."""
    used = Counter(MACHINE.format(**one.environment) for runs in groups.values() for one in runs)
    return "; ".join(f"{machine} ({n} run{'s' * (n > 1)})" for machine, n in used.most_common())


def collect_facts(groups: facts.Groups, left_out: list[str], out: Path) -> dict:
    """Compute all that the template can say, and draw the figures into a folder."""
    models = {name: groups[name] for name in facts.MODELS if name in groups}
    missing, tables = [], []
    for folder, base in (("augment", "none"), ("tune", "base"), ("heads", ""), ("overfit", "")):
        table, lines = gather(groups, folder, base)
        tables.append(table)
        missing += lines
    augment, tune, heads, overfit = tables
    known = (*facts.MODELS, *TABLES)
    more = {n: runs for n, runs in groups.items() if n.split("/")[0] not in known}
    models, others, lines = comparable(models | more, facts.MODELS)
    there = {*models, *more}
    missing += [f"`make train-{n}` makes {n}." for n in (*facts.MODELS, "final") if n not in there]
    arrays = {}
    for name, [one, *_] in models.items():
        path = one.folder / "testing.npz"  # too large to be kept with the others in results/
        if path.exists():
            with reading(path, "remove testing.json beside it"):
                arrays[name] = dict(np.load(path))
    missing = list(dict.fromkeys([*missing, *left_out, *lines]))  # tuned is in several tables
    runs = [one for group in groups.values() for one in group]
    profiles = {f"{one.config['profile']} profile on {one.config['data']}" for one in runs}
    found = {"runs": len(runs), "experiments": len(groups), "profiles": "; ".join(sorted(profiles))}
    found["seeds"] = ", ".join(map(str, sorted({one.seed for one in runs})))
    made = {"all": groups, "models": models, "heads": heads, "others": others}
    made["but heads"] = {n: runs for n, runs in groups.items() if not n.startswith("heads/")}
    found["machines"] = {name: machines_of(table) for name, table in made.items()}
    found["lab"] = LAB["test_iou"]
    lowest = (f"{iou:.4f}" for iou in sorted(LAB["test_iou"].values(), reverse=True) if iou < 0.95)
    found["lab_lowest"] = ", ".join(lowest)
    found["missing"] = "\n".join(f"- {line}" for line in missing) or "Nothing."
    if models:
        judged = "tuned" if "tuned" in models else next(iter(models))
        found |= facts.describe_models(models, out) | {"tested": models[judged][0].test}
    if arrays:
        found |= facts.show_images(models, arrays, out)
    if "tuned" in models:
        found |= facts.running_average(models, out)
    pairs = {"blurred": (models.get("tuned", []), groups.get("blurred-masks", []))}
    pairs["final"] = (others.get("final", []), augment.get("flip-0.5", []))
    for name, pair in pairs.items():
        a, b = ([one.test for one in runs] for runs in pair)
        b = [row for row in b if a and not differences(row, a[0])]  # on the same images
        if b and (name == "final" or a[0]["images_seen"] == b[0]["images_seen"]):
            found[name] = facts.contrast(a, b)
    found |= facts.answer_questions(models, augment, tune) | facts.find_dead_classes(groups)
    found |= facts.rank_factors(models, augment, tune)
    return found | facts.tabulate_experiments(augment, tune, heads, overfit, others, out)


def fill_template(name: str, found: dict) -> str:
    """Fill a template in docs/; a section that lacks a fact says which target makes it."""
    text, template = "", (ROOT / "docs" / name).read_text(encoding="utf-8")
    for section in re.split(r"^(?=#)", template, flags=re.M)[1:]:
        heading, _, content = section.partition("\n")
        title, _, target = heading.removesuffix(" -->").partition(" <!-- ")
        try:
            text += f"{title}\n{content.format_map(found)}"
        except (KeyError, TypeError):  # no run tells, or it has too few images: an interval of None
            text += f"{title}\n\nNot run yet: `{target}`.\n\n"
    return text.rstrip() + "\n"


def to_html(text: str, folder: Path) -> str:
    """Convert Markdown to one HTML file that loads nothing: figures below a folder are put in."""
    body = markdown(text, extensions=["tables"]).replace(" ± ", "&nbsp;±&nbsp;")
    for image, caption, source in re.findall(r'<p>(<img alt="(.*?)" src="(.*?)" />)</p>', body):
        data = base64.b64encode((folder / source).read_bytes()).decode()
        embedded = image.replace(source, f"data:image/png;base64,{data}")
        figure = f"<figure>{embedded}<figcaption>{caption}</figcaption></figure>"
        body = body.replace(f"<p>{image}</p>", figure)
    page = (ROOT / "docs/report.html").read_text(encoding="utf-8")
    return page.replace("$title", text.splitlines()[0][2:]).replace("$body", body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="holds the runs")
    parser.add_argument("--out", type=Path, default=Path("report"), metavar="DIR")
    args = parser.parse_args()
    groups, left_out = find_runs(args.runs)
    if not groups:
        more = "".join(f" ({left})" for left in left_out[:1])
        raise UserError(f"{args.runs}: holds no finished run; `make report` makes some{more}")
    found = collect_facts(groups, left_out, args.out / "figures")
    text = fill_template("report_template.md", found)
    statistics, all_runs = {}, []
    for name, runs in groups.items():
        rows = [one.test or one.validation for one in runs]
        statistics[name] = {key: mean_std([row[key] for row in rows]) for key in STATISTICS}
        all_runs += [one._asdict() | {"folder": str(one.folder)} for one in runs]
    results = json.dumps(found | {"statistics": statistics, "all_runs": all_runs}, indent=2)
    files = {"report.md": text, "report.html": to_html(text, args.out), "results.json": results}
    for name, content in files.items():
        write_atomically(args.out / name, content.encode())
    print(f"{args.out / 'report.html'}: {len(groups)} experiments")


if __name__ == "__main__":
    run(main)
