"""Write RESULTS.md, its figures and the tables of README.md from the files in results/ alone.

    python -m tools.results [--out DIR]

`make publish` puts runs there: generated/quick and afo/PROFILE as `make report` makes them, scenes
as `make scenes` does. The sentences of RESULTS.md are in docs/results_template.md.
"""

import argparse
import re
from pathlib import Path

from common import ROOT, run, write_atomically

from evaluate import align, comparison_table, read_results
from tools.facts import MODELS, contrast, markdown
from tools.report import collect_facts, fill_template, find_runs
from tools.scenes import draw_runs, read_runs, tabulate_runs

RESULTS = ROOT / "results"
FEW, MANY, SHIPPED = "generated-300", "generated-10800", "generated-21600"  # in results/scenes


def fill_table(text: str, name: str, table: str) -> str:
    """Replace the table of README.md that stands between `<!-- table: NAME -->` and its end."""
    pattern = rf"(<!-- table: {name} -->\n```\n).*?(?=\n```\n<!-- end -->)"
    return re.sub(pattern, lambda start: start[1] + table, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT, metavar="DIR", help="of what is written")
    out = parser.parse_args().out
    found = {}
    for profile in ("quick", "full"):
        groups, left_out = find_runs(RESULTS / "afo" / profile)
        if groups:
            found[profile] = collect_facts(groups, left_out, out / "results/figures" / profile)
    readme, scenes = (ROOT / "README.md").read_text(encoding="utf-8"), read_runs(RESULTS / "scenes")
    weights = {h: {n: runs.pop(n) for n in (SHIPPED,) if n in runs} for h, runs in scenes.items()}
    for name, rows in {"weights": weights, "make scenes": scenes}.items():
        if all(rows.values()):
            found[name] = markdown(tabulate_runs(rows))
            readme = fill_table(readme, name, align(tabulate_runs(rows)))
    if all(scenes.values()):
        draw_runs(scenes, out / "results/figures/scenes.png")
    for test, runs in scenes.items():
        if runs.keys() >= {MANY, FEW}:
            found[test] = contrast(runs[MANY], runs[FEW])
    tests = {"make speedrun": sorted(RESULTS.glob("speedrun/seed*/on-afo.json"))}
    tests["make report"] = [RESULTS / f"generated/quick/{n}/seed0/testing.json" for n in MODELS]
    for name, paths in tests.items():
        if rows := [row for path in paths if path.exists() for row in read_results(path)]:
            readme = fill_table(readme, name, comparison_table(rows))
    text = fill_template("results_template.md", found).replace(f"{ROOT}/", "")
    for name, content in {"README.md": readme, "RESULTS.md": text}.items():
        write_atomically(out / name, content.encode())
        print(out / name)


if __name__ == "__main__":
    run(main)
