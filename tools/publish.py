"""Add finished runs to results/runs.jsonl, on which RESULTS.md and the README's tables rest.

    python -m tools.publish --runs runs/afo/quick

A run replaces the line of the same data, profile, experiment and seed. `make results` then writes
the pages.
"""

import argparse
from pathlib import Path

from common import UserError, run, write_atomically
from report_runs import PUBLISHED, Run, check_one_profile, find_runs, read_published, to_line


def key_of(member: Run) -> tuple[str, str, str, int]:
    """Give what tells a published run from all others, in the order of the file."""
    return member.data, member.profile, member.experiment, member.seed


def publish(root: Path, path: Path) -> tuple[list[Run], list[str]]:
    """Write the finished runs below a folder into a file of runs, in the place of older ones.

    Returns them, and a line on each unfinished run. UserError if there is none to add, or if the
    folder holds several profiles, whose experiments could not be told apart.
    """
    added, unfinished = find_runs(root)
    if not added:
        raise UserError(f"{root}: holds no finished run")
    check_one_profile(added, root)
    lines = {}
    if path.exists():
        for member in read_published(path):
            lines[key_of(member)] = to_line(member)
    for member in added:
        lines[key_of(member)] = to_line(member)
    text = "".join(lines[key] + "\n" for key in sorted(lines))
    write_atomically(path, text.encode())
    return added, unfinished


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="runs/DATA/PROFILE")
    args = parser.parse_args()
    added, unfinished = publish(args.runs, PUBLISHED)
    for line in unfinished:
        print(line)
    print(f"{PUBLISHED}: {len(added)} runs added or replaced")


if __name__ == "__main__":
    run(main)
