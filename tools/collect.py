"""The finished runs below a folder, and the tables that they share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common import code_digest, read_json, reading

import numpy as np
import torch

from config import load_config
from evaluate import format_mean_std, published
from metrics import compare, mean_std, scores

MODELS = ("initial", "modified", "tuned", "best")
UNTESTED = ("tune", "overfit")  # folders of experiments that never read the test split


class Run(NamedTuple):
    """A finished run: what its files hold; `test` is None where the test split is never read."""

    experiment: str
    seed: int
    folder: Path
    config: dict
    environment: dict
    history: list[dict]
    summary: dict
    test: dict | None


Groups = dict[str, list[Run]]  # experiment → its runs by seed


# ---- reading the runs


def require(values: dict, **types: type) -> None:
    """Raise KeyError or ValueError unless a mapping has these keys, with values of these types."""
    for key, kind in types.items():
        if not isinstance(values[key], kind):
            raise ValueError(f"{key} is {values[key]!r}")


def read_run(folder: Path, experiment: str) -> Run:
    """Read the files of a finished run; UserError names the one that cannot be used."""
    config, environment = load_config([folder / "config.yaml"]), folder / "environment.json"
    advice = "remove this file and run make again"
    with reading(environment, advice):
        where = read_json(environment)
        require(where, device=str, threads=int, precision=str, torch=str)
    with reading(metrics := folder / "metrics.jsonl", advice):
        history = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        for entry in history:
            require(entry["validation"], mean_iou=float, loss=float, dead_classes=list)
            require(entry["training"], mean_iou=(float, type(None)), loss=float)
        require(history[-1], epoch=int)
    with reading(path := folder / "summary.json", advice):
        summary = read_json(path)
        require(summary, images_seen=int, train_seconds=float, code=str, digest=str)
        require(summary["validation"], mean_iou=float)
    test = None
    if experiment.split("/")[0] not in UNTESTED:
        with reading(path := folder / "testing.json", advice):
            [test] = read_json(path)
            require(test, name=str, images=int, parameters=int, digest=str, split=str)
            require(test, boundary_iou=float, per_class_iou=dict)
            found = scores(torch.tensor(test["confusion_matrix"]), list(config["classes"]))
            if any(test[key] != value for key, value in found.items()):
                raise ValueError("its scores are not those of its confusion matrix")
    return Run(experiment, int(folder.name[4:]), folder, config, where, history, summary, test)


def read_arrays(one: Run) -> dict[str, np.ndarray] | None:
    """Read testing.npz of a run; None if results were published without it."""
    path = one.folder / "testing.npz"
    if not path.exists():
        return None
    with reading(path, "remove testing.json beside it and run make again"):
        return dict(np.load(path))


def find_runs(root: Path) -> tuple[Groups, list[str]]:
    """Read every run below a folder.

    Returns:
        The finished runs, and a line for each one that is not finished.
    """
    groups: Groups = {}
    left_out = []
    folders = [f for f in root.rglob("seed*") if f.is_dir() and f.name[4:].isdigit()]
    for folder in sorted(folders, key=lambda f: (f.parent, int(f.name[4:]))):
        experiment = folder.parent.relative_to(root).as_posix()
        needed = ["summary.json"] + ["testing.json"] * (experiment.split("/")[0] not in UNTESTED)
        lacking = [name for name in needed if not (folder / name).exists()]
        if lacking:
            left_out.append(f"`{folder}` is not finished, it has no {' and no '.join(lacking)}.")
        else:
            groups.setdefault(experiment, []).append(read_run(folder, experiment))
    return groups, left_out


def comparable(groups: Groups, same_budget: bool, left_out: list[str]) -> Groups:
    """Leave out the runs that cannot share a table with the first one, and list them."""
    kept: Groups = {}
    first: dict = {}
    for name, runs in groups.items():
        for one in runs:
            terms = {"profile": one.config["profile"], "training data": one.summary["digest"]}
            if one.test:
                terms |= {"test data": one.test["digest"], "split": one.test["split"]}
            if same_budget and name != "best":  # ours may take another budget: a column says so
                terms |= {"images seen": one.summary["images_seen"]}
            first = terms | first
            differ = [key for key, value in terms.items() if first[key] != value]
            if differ:
                left_out.append(f"`{one.folder}` differs from its table in {', '.join(differ)}.")
            else:
                kept.setdefault(name, []).append(one)
    return kept


def in_folder(groups: Groups, folder: str, base: str, left_out: list[str]) -> Groups:
    """Take the experiments of a folder; the tuned model, which they vary, stands for `base`."""
    mine = {n.split("/")[1]: runs for n, runs in groups.items() if n.startswith(f"{folder}/")}
    mine = comparable(mine, True, left_out)
    if mine and base not in mine and "tuned" in groups:
        return comparable({**mine, base: groups["tuned"]}, True, [])
    return mine


# ---- tables


def stat(runs: list[Run], key: str, split: str = "testing") -> dict | None:
    """Compute mean and standard deviation of a score over the seeds of an experiment."""
    return mean_std([(one.test if split == "testing" else one.summary[split])[key] for one in runs])


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Format a Markdown table."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def label(name: str, runs: list[Run]) -> str:
    """Mark the name of an experiment of which a run was trained by other code than today's."""
    return name + "*" * any(one.summary["code"] != code_digest() for one in runs)


def table(
    groups: Groups, split: str, columns: dict[str, Callable], first: dict | None = None
) -> str:
    """Format a row for each experiment: mean IoU, n, the mark, given columns, and the cost.

    Args:
        groups: experiment → runs.
        split: whose mean IoU is shown, "testing" or "validation".
        columns: header → function of the runs of an experiment to the text of a cell; a column
            with nothing but "–" is left out.
        first: a row on top, header → text.
    """
    stats = {name: stat(runs, "mean_iou", split) for name, runs in groups.items()}
    ranked = sorted(stats, key=lambda name: -stats[name]["mean"])
    leads = len(ranked) > 1 and compare(stats[ranked[0]], stats[ranked[1]]) == "more"
    columns = {
        "n": lambda runs: str(len(runs)),
        "mark": lambda runs: "**best**" if leads and runs is groups[ranked[0]] else "",
        **{k: c for k, c in columns.items() if any(c(runs) != "–" for runs in groups.values())},
        "images seen": lambda runs: f"{runs[0].summary['images_seen']:,}",
        "train time": lambda runs: (
            f"{mean_std([r.summary['train_seconds'] for r in runs])['mean']:.0f} s"
        ),
    }
    header = ["", f"{split.removesuffix('ing')} mean IoU", *columns]
    rows = [[first.get(key, "–") for key in header]] if first else []
    for name, runs in groups.items():
        cells = [column(runs) for column in columns.values()]
        rows.append([label(name, runs), format_mean_std(stats[name]), *cells])
    note = "\n\n\\* trained by other code than today's." if any("*" in r[0] for r in rows) else ""
    return markdown(header, rows) + note


def lab_iou(runs: list[Run]) -> str:
    """Format the test IoU in the lab's report."""
    return format_mean_std(mean_std([published(runs[0].test)]))


def dead(runs: list[Run]) -> str:
    """Name the classes that at least one seed never predicts on the test split."""
    return ", ".join(sorted({c for one in runs for c in one.test["dead_classes"]})) or "none"
