"""Write the report of all runs below a folder, from their stored results alone.

    python -m tools.report --runs runs/generated/quick --out report

Writes OUT/report.md, OUT/report.html (one file that needs no other), OUT/results.json (every
number) and OUT/figures/. The sentences are in docs/report_template.md: a section whose numbers are
missing is replaced by the make target in its heading. Runs that are unfinished, or that cannot
share a table with the others, are left out and listed at the end.
"""

import argparse
import base64
import html
import json
import re
from pathlib import Path

from common import ROOT, UserError, run, write_atomically

from metrics import mean_std
from tools import facts
from tools.collect import MODELS, Groups, comparable, find_runs, in_folder

TEMPLATE = ROOT / "docs" / "report_template.md"
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


def missing_experiments(groups: Groups) -> list[str]:
    """List the make targets of experiments of which no finished run was found."""
    missing = {f"train-{name}": [name] for name in MODELS if name not in groups}
    missing |= {"final": ["final"]} if "final" not in groups else {}
    for folder in ("augment", "tune", "overfit"):
        names = sorted(path.stem for path in (ROOT / "configs" / folder).glob("*.yaml"))
        names = [name for name in names if f"{folder}/{name}" not in groups]
        missing |= {folder: names} if names else {}
    return [f"`make {target}` makes {', '.join(names)}." for target, names in missing.items()]


def collect_facts(groups: Groups, unfinished: list[str], out: Path) -> dict:
    """Compute all that the template can say, and draw the figures into a folder."""
    left_out = list(unfinished)
    models = {name: groups[name] for name in MODELS if name in groups}
    models = comparable(models, True, left_out)
    augment = in_folder(groups, "augment", "none", left_out)
    tune = in_folder(groups, "tune", "base", left_out)
    runs = [one for group in groups.values() for one in group]
    where = "{device}, {threads} threads, {precision}, PyTorch {torch}"
    profiles = {f"{one.config['profile']} profile on {one.config['data']}" for one in runs}
    absent = [*missing_experiments(groups), *left_out]
    found = {
        "runs": len(runs),
        "experiments": len(groups),
        "seeds": ", ".join(map(str, sorted({one.seed for one in runs}))),
        "profiles": "; ".join(sorted(profiles)),
        "machines": "; ".join(sorted({where.format(**one.environment) for one in runs})),
        "missing": "\n".join(f"- {line}" for line in absent) or "Nothing.",
    }
    if models:
        found |= facts.describe_models(models, out) | facts.show_images(models, out)
        found |= facts.interval_of_fifty(models, out)
    found |= facts.answer_questions(models, augment, tune)
    found |= facts.running_average(groups, out) | facts.show_dead_classes(groups, out)
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

    Args:
        text: headings, paragraphs, lists, tables and images, each a block between blank lines.
        folder: which the paths of the images start from.
    """

    def inline(part: str) -> str:
        part = html.escape(part).replace(" ± ", "&nbsp;±&nbsp;").replace("\\*", "*")
        part = re.sub(r"`(.+?)`", r"<code>\1</code>", part)
        return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", part)

    body = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.splitlines()
        if match := re.fullmatch(r"(#+) (.*)", block):
            body.append(f"<h{len(match[1])}>{inline(match[2])}</h{len(match[1])}>")
        elif match := re.fullmatch(r"!\[(.*)\]\((.*)\)", block):
            data = base64.b64encode((folder / match[2]).read_bytes()).decode()
            image = f'<img alt="{html.escape(match[1])}" src="data:image/png;base64,{data}">'
            body.append(f"<figure>{image}<figcaption>{inline(match[1])}</figcaption></figure>")
        elif block.startswith("- "):
            body.append(f"<ul>{''.join(f'<li>{inline(line[2:])}</li>' for line in lines)}</ul>")
        elif block.startswith("|"):
            cells = [line.strip("|").split("|") for line in lines if not line.startswith("| ---")]
            tags = ["th", *["td"] * len(cells)]
            rows = [
                "<tr>" + "".join(f"<{tag}>{inline(cell.strip())}</{tag}>" for cell in row) + "</tr>"
                for tag, row in zip(tags, cells, strict=False)
            ]
            body.append(f'<div class="wide"><table>{"".join(rows)}</table></div>')
        else:
            body.append(f"<p>{inline(block)}</p>")
    title = html.escape(text.splitlines()[0].removeprefix("# "))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<style>{CSS}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="holds the runs")
    parser.add_argument("--out", type=Path, default=Path("report"), metavar="DIR")
    args = parser.parse_args()
    groups, unfinished = find_runs(args.runs)
    if not groups:
        raise UserError(f"{args.runs}: holds no finished run; `make report` makes some")
    found = collect_facts(groups, unfinished, args.out / "figures")
    text = fill_template(TEMPLATE.read_text(encoding="utf-8"), found)
    results = found | {
        "statistics": {
            name: {
                key: mean_std([(one.test or one.summary["validation"])[key] for one in runs])
                for key in ("pixel_accuracy", "mean_iou", "mean_iou_foreground", "mean_dice")
            }
            for name, runs in groups.items()
        },
        "all_runs": [
            {
                key: getattr(one, key)
                for key in ("experiment", "seed", "environment", "summary", "test")
            }
            for runs in groups.values()
            for one in runs
        ],
    }
    write_atomically(args.out / "report.md", text.encode())
    write_atomically(args.out / "report.html", to_html(text, args.out).encode())
    lines = json.dumps(results, indent=2, ensure_ascii=False, default=str) + "\n"
    write_atomically(args.out / "results.json", lines.encode())
    print(f"{args.out / 'report.html'}: {len(groups)} experiments")


if __name__ == "__main__":
    run(main)
