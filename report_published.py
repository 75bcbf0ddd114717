"""Write runs as lines of results/runs.jsonl, which git keeps, and read them."""

import json
from pathlib import Path

from common import ROOT, reading, require
from report_runs import TESTS, Run, shorten
from table import ROW

PUBLISHED = ROOT / "results/runs.jsonl"  # a run a line; tools/publish.py writes it
KEPT = (  # of a published run
    "data",
    "profile",
    "experiment",
    "seed",
    "config",
    "machine",
    "validation",
    "test",
    "on_afo",
    "on_scenes",
    "history",
)


def to_line(run: Run) -> str:
    """Write a run as one line of JSON, without what it lacks."""
    kept = {}
    for key in KEPT:
        value = shorten(getattr(run, key))
        if value not in (None, {}, []):
            kept[key] = value
    return json.dumps(kept, ensure_ascii=False, separators=(",", ":"))


def from_line(line: str) -> Run:
    """Read a run from one line of JSON; keys that a run need not have may be missing."""
    values = json.loads(line)
    require(values, {"data": str, "profile": str, "experiment": str, "seed": int})
    for key in ("validation", *TESTS):
        if key in values:
            require(values[key], ROW)
    return Run(**values)


def read_published(path: Path = PUBLISHED) -> list[Run]:
    """Read all published runs; UserError names the line that is damaged."""
    runs = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        with reading(f"{path}, line {number}", "restore the file: git checkout results/runs.jsonl"):
            runs.append(from_line(line))
    return runs
