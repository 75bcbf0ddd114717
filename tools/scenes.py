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


def read_runs(root: Path) -> dict[str, list[list[dict]]]:
    """Read the rows of both tests of every tested run, by training set, fewest scenes first."""
    found: dict[str, list[list[dict]]] = {}
    folders = [f for f in root.glob("*-*/seed*") if all((f / file).exists() for file in TESTS)]
    for folder in sorted(folders, key=lambda f: (f.parent.name.rpartition("-")[2].zfill(9), f)):
        rows = [read_results(folder / file)[0] for file in TESTS]
        found.setdefault(folder.parent.name, []).append(rows)
        for row, first in zip(rows, next(iter(found.values()))[0], strict=True):
            if differ := differences(row, first):
                raise UserError(f"{folder}: tested on another {', '.join(differ)}; remove it")
    return found


def tabulate_runs(found: dict[str, list[list[dict]]]) -> list[list[str]]:
    """Tabulate mean IoU on both tests by training set, the heading first."""
    real, generated = ({n: [rows[i] for rows in r] for n, r in found.items()} for i in (0, 1))
    heads = {key: COLUMNS[key] for key in ("n", "images seen")}
    first, second = (heads | {head: COLUMNS["mean IoU"]} for head in TESTS.values())
    both = zip(tabulate(real, first), tabulate(generated, second), strict=True)
    heading, *lines = ([*left, right[-1]] for left, right in both)
    return [["trained on", *heading[1:]], *lines]


def draw_runs(found: dict[str, list[list[dict]]], path: Path) -> None:
    """Draw the table as a figure; a training set that lacks a seed of the others has no dot."""
    scores = {(n, rows[0]["seed"]): rows for n, runs in found.items() for rows in runs}
    seeds, panels = sorted({seed for _, seed in scores}), {}
    for i, head in enumerate(TESTS.values()):
        of = {key: rows[i]["mean_iou"] for key, rows in scores.items()}
        panels[head] = [{name: of.get((name, seed)) for name in found} for seed in seeds]
    dots(path, panels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, metavar="DIR", help="holds runs of make scenes")
    root = parser.parse_args().root
    found = read_runs(root)
    if not found:
        raise UserError(f"{root}: holds no tested run; `make scenes` makes them")
    draw_runs(found, root / "scenes.png")
    print(align(tabulate_runs(found)))


if __name__ == "__main__":
    run(main)
