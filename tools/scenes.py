"""Tabulate and draw what scenes are worth, from the stored results of `make scenes`.

    python -m tools.scenes runs/scenes

prints the table and writes scenes.png into that folder.
"""

import argparse
from pathlib import Path

from common import UserError, run

from evaluate import COLUMNS, align, differences, read_results, tabulate
from figures import dots

TESTS = {"on-afo.json": "real test", "on-scenes.json": "generated test"}  # file → heading


def read_runs(root: Path) -> dict[str, dict[str, list[dict]]]:
    """Read the rows of tested runs: heading of the test → training set, fewest scenes first."""
    found: dict[str, dict[str, list[dict]]] = {head: {} for head in TESTS.values()}
    folders = [f for f in root.glob("*-*/seed*") if all((f / file).exists() for file in TESTS)]
    for folder in sorted(folders, key=lambda f: (f.parent.name.rpartition("-")[2].zfill(9), f)):
        for file, head in TESTS.items():
            [row] = read_results(folder / file)
            found[head].setdefault(folder.parent.name, []).append(row)
            if differ := differences(row, next(iter(found[head].values()))[0]):
                raise UserError(f"{folder}: tested on another {', '.join(differ)}; remove it")
    return found


def tabulate_runs(found: dict[str, dict[str, list[dict]]]) -> list[list[str]]:
    """Tabulate mean IoU on both tests by training set, the heading first."""
    heads = {key: COLUMNS[key] for key in ("n", "images seen")}
    real, generated = (tabulate(r, heads | {h: COLUMNS["mean IoU"]}) for h, r in found.items())
    heading, *lines = ([*left, right[-1]] for left, right in zip(real, generated, strict=True))
    return [["trained on", *heading[1:]], *lines]


def draw_runs(found: dict[str, dict[str, list[dict]]], path: Path) -> None:
    """Draw the table as a figure; a training set that lacks a seed of the others has no dot."""
    panels = {}
    for head, runs in found.items():
        of = {(n, row["seed"]): row["mean_iou"] for n, rows in runs.items() for row in rows}
        seeds = sorted({seed for _, seed in of})
        panels[head] = [{name: of.get((name, seed)) for name in runs} for seed in seeds]
    dots(path, panels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, metavar="DIR", help="holds runs of make scenes")
    root = parser.parse_args().root
    found = read_runs(root)
    if not all(found.values()):
        raise UserError(f"{root}: holds no tested run; `make scenes` makes them")
    draw_runs(found, root / "scenes.png")
    print(align(tabulate_runs(found)))


if __name__ == "__main__":
    run(main)
