"""Tabulate and draw what scenes are worth, from the stored results of `make scenes`.

    python -m tools.scenes runs/scenes

prints the table and writes scenes.png into that folder.
"""

import argparse
from pathlib import Path

from common import UserError, run

from evaluate import COLUMNS, align, differences, read_results
from figures import dots

TESTS = {"on-afo.json": "real test", "on-scenes.json": "generated test"}  # file → heading


def read_runs(root: Path) -> dict[str, list[list[dict]]]:
    """Read the rows of both tests of every finished run, by training set, fewest scenes first."""
    found: dict[str, list[list[dict]]] = {}
    folders = [f for f in root.glob("*-*/seed*") if all((f / file).exists() for file in TESTS)]
    for folder in sorted(folders, key=lambda f: (int(f.parent.name.rpartition("-")[2]), f)):
        rows = [read_results(folder / file)[0] for file in TESTS]
        found.setdefault(folder.parent.name, []).append(rows)
        for row, first in zip(rows, next(iter(found.values()))[0], strict=True):
            if differ := differences(row, first):
                raise UserError(f"{folder}: tested on another {', '.join(differ)}; remove it")
    if not found:
        raise UserError(f"{root}: holds no tested run; `make scenes` makes them")
    return found


def tabulate_runs(found: dict[str, list[list[dict]]]) -> list[list[str]]:
    """Tabulate mean IoU on both tests by training set, the heading first."""
    lines = [["trained on", "n", "images seen", *TESTS.values()]]
    for name, runs in found.items():
        means = [COLUMNS["mean IoU"](list(rows)) for rows in zip(*runs, strict=True)]
        seen = COLUMNS["images seen"]([rows[0] for rows in runs])
        lines.append([name, str(len(runs)), seen, *means])
    return lines


def draw_runs(found: dict[str, list[list[dict]]], path: Path) -> None:
    """Draw the table as a figure, with the seeds that all training sets have."""
    panels, seeds = {}, range(min(map(len, found.values())))
    for i, head in enumerate(TESTS.values()):
        panels[head] = [{n: runs[s][i]["mean_iou"] for n, runs in found.items()} for s in seeds]
    dots(path, panels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, metavar="DIR", help="holds runs of make scenes")
    root = parser.parse_args().root
    found = read_runs(root)
    draw_runs(found, root / "scenes.png")
    print(align(tabulate_runs(found)))


if __name__ == "__main__":
    run(main)
