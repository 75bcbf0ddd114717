"""Add finished runs to results/runs.jsonl, on which RESULTS.md and the README's tables rest.

    python -m tools.publish --runs runs/afo/quick

A run replaces the line of the same data, profile, experiment and seed. `make results` then writes
the pages.
"""

import argparse
from pathlib import Path

from common import UserError, run, write_atomically
from report_published import PUBLISHED, read_published, to_line
from report_runs import Run, check_one_profile, find_runs, share_config


def key_of(member: Run) -> tuple[str, str, str, int]:
    """Give what tells a published run from all others, in the order of the file."""
    return member.data, member.profile, member.experiment, member.seed


def publish(root: Path, path: Path) -> tuple[list[Run], list[str]]:
    """Write the finished runs below a folder into a file of runs, in the place of older ones.

    Returns them, and a line on each unfinished run. UserError if there is none to add, if the
    folder holds several profiles, whose experiments could not be told apart, or if the runs of an
    experiment would differ in more than their seed.
    """
    added, unfinished = find_runs(root)
    if not added:
        raise UserError(f"{root}: holds no finished run")
    check_one_profile(added, root)
    members = {}
    if path.exists():
        for member in read_published(path):
            members[key_of(member)] = member
    for member in added:
        members[key_of(member)] = member
    runs = [members[key] for key in sorted(members)]
    check_configs(runs)
    text = "".join(to_line(member) + "\n" for member in runs)
    write_atomically(path, text.encode())
    return added, unfinished


def check_configs(runs: list[Run]) -> None:
    """Raise UserError if runs of one experiment have other configs (see report_runs.OF_ONE_RUN)."""
    pages: dict[tuple, list[Run]] = {}
    for member in runs:
        pages.setdefault((member.data, member.profile), []).append(member)
    for members in pages.values():
        _, sentences = share_config(members)
        if sentences:
            raise UserError(f"{sentences[0]} Publish all of its seeds at once, or rename it")


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
