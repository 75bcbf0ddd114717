"""The finished runs below a folder, and which of them may share a table."""

import json
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoint import load_checkpoint
from config import load_config
from errors import UserError
from evaluate import read_results

UNTESTED = ("tune", "overfit")  # folders of experiments that never read the test split
MODELS = ("initial", "modified", "tuned", "best")
BUDGET = ("epochs", "images_per_epoch", "batch_size")


class Run(NamedTuple):
    """A finished run. `history` holds the lines of metrics.jsonl, `test` the row of testing.json
    (None in an experiment that never reads the test split), `digest` that of the training data."""

    experiment: str
    seed: int
    folder: Path
    config: dict
    environment: dict
    history: list[dict]
    summary: dict
    test: dict | None
    digest: str


# ---- reading


def read_json(path: Path, needed: tuple[str, ...], lines: bool = False) -> list[dict]:
    """The JSON objects of a file, one or one a line; UserError if it is damaged or lacks a key."""
    try:
        text = path.read_text(encoding="utf-8")
        objects = [json.loads(part) for part in (text.splitlines() if lines else [text])]
        if not objects or not all(key in entry for entry in objects for key in needed):
            raise ValueError
    except (OSError, ValueError, TypeError):
        raise UserError(
            f"{path}: cannot be read as JSON with {', '.join(needed)}; remove its folder and make "
            "that run again"
        ) from None
    return objects


def run_config(run_dir: Path) -> dict:
    """The config of a run; UserError if it is not there, damaged, or of other keys than today's."""
    try:
        return load_config([run_dir / "config.yaml"], [])
    except UserError as error:
        raise UserError(
            f"{error}; if another version of the project made this run, remove its folder and make "
            "it again"
        ) from None


def find_runs(root: Path) -> tuple[dict[str, list[Run]], list[str]]:
    """Read every run below a folder.

    Returns:
        experiment ("tuned", "augment/flip-0.3") → its finished runs by seed, and a line for each
        run that did not finish.

    Raises:
        UserError: a file is damaged, or the seeds of an experiment were not trained alike.
    """
    found: dict[str, list[Run]] = {}
    unfinished = []
    folders = [f for f in root.rglob("seed*") if f.is_dir() and f.name[4:].isdigit()]
    for folder in sorted(folders, key=lambda f: (f.parent, int(f.name[4:]))):
        experiment = folder.parent.relative_to(root).as_posix()
        if not (folder / "summary.json").exists():
            unfinished.append(f"{folder} (no summary.json: crashed, interrupted or still running)")
            continue
        untested = experiment.split("/")[0] in UNTESTED
        if not untested and not (folder / "testing.json").exists():
            unfinished.append(f"{folder} (no testing.json: trained but not tested)")
            continue
        run = Run(
            experiment,
            int(folder.name[4:]),
            folder,
            run_config(folder),
            read_json(folder / "environment.json", ("device", "threads", "precision", "torch"))[0],
            read_json(folder / "metrics.jsonl", ("epoch", "training", "validation"), lines=True),
            read_json(folder / "summary.json", ("images_seen", "train_seconds", "validation"))[0],
            None if untested else read_results(folder / "testing.json")[0],
            load_checkpoint(folder / "best.pt", torch.device("cpu")).get("data_digest", "unknown"),
        )
        found.setdefault(experiment, []).append(run)
    for runs in found.values():
        for other in runs[1:]:
            keys = [k for k in runs[0].config if k not in ("seed", "device", "data")]
            changed = [k for k in keys if other.config[k] != runs[0].config[k]]
            if changed:
                refuse(runs[0], other, changed)
    return found, unfinished


def refuse(first: Run, other: Run, differ: list[str]) -> None:
    """Raise the UserError of two runs that must not share a table."""
    raise UserError(
        f"{other.folder} and {first.folder} differ in {', '.join(differ)}; such runs cannot share "
        "a table: train them alike or report them apart"
    )


def differences(first: Run, other: Run, budget: bool) -> list[str]:
    """What keeps two runs out of one table: data, split, profile and, if `budget`, the budget."""

    def terms(run: Run) -> dict:
        made = {"profile": run.config["profile"], "training data (digest)": run.digest}
        if run.test:
            made |= {"split": run.test["split"], "test data (digest)": run.test["digest"]}
        if budget:
            made |= {key: run.config[key] for key in BUDGET}
            made["images seen"] = run.summary["images_seen"]
        return made

    a, b = terms(first), terms(other)
    return [
        key if "digest" in key else f"{key} ({b[key]}, not {a[key]})"
        for key in a
        if key in b and a[key] != b[key]
    ]


def must_agree(groups: dict[str, list[Run]], budget: bool) -> None:
    """Refuse experiments that cannot share a table, see `differences`."""
    runs = [run for group in groups.values() for run in group]
    for other in runs[1:]:
        if differ := differences(runs[0], other, budget):
            refuse(runs[0], other, differ)


# ---- groups


def folder_of(groups: dict[str, list[Run]], folder: str) -> dict[str, list[Run]]:
    """The experiments of a folder under their own names."""
    return {n.split("/")[1]: r for n, r in groups.items() if n.startswith(folder + "/")}


def with_base(groups: dict[str, list[Run]], folder: str, base: str) -> dict[str, list[Run]]:
    """The experiments of a folder and, as `base`, what they vary: the tuned model.

    The runs of `tuned` stand for it where the folder has none and their budget is the same.
    """
    mine, tuned = folder_of(groups, folder), groups.get("tuned")
    if mine and base not in mine and tuned:
        first = next(iter(mine.values()))[0]
        if not differences(first, tuned[0], budget=True):
            mine = {base: tuned, **mine}
    return mine


def missing_runs(groups: dict[str, list[Run]]) -> dict[str, list[str]]:
    """`make` target → the experiments it makes of which no finished run was found."""
    configs = Path(__file__).parent / "configs"
    missing = {f"train-{name}": [name] for name in MODELS if name not in groups}
    missing |= {"final": ["final"]} if "final" not in groups else {}
    for folder in ("augment", "tune", "overfit"):
        names = sorted(path.stem for path in (configs / folder).glob("*.yaml"))
        names = [name for name in names if f"{folder}/{name}" not in groups]
        missing |= {folder: names} if names else {}
    return missing
