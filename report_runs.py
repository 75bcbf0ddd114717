"""Read finished runs, from their folders or from results/runs.jsonl, and sort them into tables."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from common import ROOT, UserError, reading, require
from runs import read_history
from table import LAB, ROW, differences, read_results

PUBLISHED = ROOT / "results/runs.jsonl"  # a run a line; tools/publish.py writes it
LAB_MODELS = ("initial", "modified", "tuned")
MODELS = (*LAB_MODELS, "best")
UNTESTED = ("tune", "overfit", "heads")  # these look at validation, and never at the test split
SWEEPS = ("augment", *UNTESTED)  # folders of experiments that have a section of their own
TESTS = {"test": "testing.json", "on_afo": "on-afo.json", "on_scenes": "on-scenes.json"}

MACHINE = {"commit": str, "device": str, "precision": str, "threads": int, "torch": str}
CONFIG = {"name": str, "seed": int, "profile": str, "data": str, "classes": dict}
CONFIG_OF_REPORT = {"epochs": int, "batch_size": int, "images_per_epoch": int, "limit_images": int}
COST = {"images_seen": int, "train_seconds": float}
TEST = {"images": int, "groups": int, "interval": (list, type(None)), "confusion_matrix": list}


@dataclass
class Run:
    """Hold what is stored of one finished run. A file that it does not have is None or empty."""

    experiment: str  # "tuned", "augment/flip-0.3": its folder below the runs of a profile
    data: str  # name of the data it was trained on
    profile: str  # "quick" or "full"
    seed: int
    folder: Path | None = None  # None: it comes from results/runs.jsonl
    config: dict = field(default_factory=dict)
    machine: dict = field(default_factory=dict)  # environment.json: commit, device, precision …
    history: list[dict] = field(default_factory=list)  # metrics.jsonl, an entry for each epoch
    validation: dict | None = None  # a row for a table: cost, and scores on the validation split
    test: dict | None = None  # a row for a table: scores on the test split
    on_afo: dict | None = None  # the same on the real test split, for models of generated data
    on_scenes: dict | None = None  # the same on generated flights

    @property
    def label(self) -> str:
        return f"`{self.experiment}`, seed {self.seed}"


Runs = dict[str, list[Run]]  # experiment → its runs by seed


# ---- folders


def find_runs(root: Path) -> tuple[list[Run], list[str]]:
    """Read the finished runs below a folder; also say in a line each which are unfinished."""
    folders = []
    for folder in root.rglob("seed*"):
        if folder.is_dir() and folder.name.removeprefix("seed").isdecimal():
            folders.append(folder)
    folders.sort(key=lambda folder: (folder.parent, int(folder.name.removeprefix("seed"))))

    finished, unfinished = [], []
    for folder in folders:
        experiment = experiment_of(folder, root)
        is_tested = any((folder / name).exists() for name in TESTS.values())
        needs_test = experiment.split("/")[0] not in UNTESTED
        if not (folder / "summary.json").exists():
            unfinished.append(f"`{folder}` is not finished: it has no summary.json.")
        elif needs_test and not is_tested:
            unfinished.append(f"`{folder}` is not tested: it has no testing.json.")
        else:
            finished.append(read_folder(folder, root))
    return finished, unfinished


def experiment_of(folder: Path, root: Path) -> str:
    """Name the experiment of a run: the folders between root and seedN, or root's own name."""
    name = folder.parent.relative_to(root).as_posix()
    return root.resolve().name if name == "." else name


def read_folder(folder: Path, root: Path) -> Run:
    """Read one finished run; UserError names the file that is damaged."""
    advice = "remove the folder of this run and make it again"
    with reading(folder / "config.yaml", advice):
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        require(config, CONFIG)
        require(config, CONFIG_OF_REPORT)
    with reading(folder / "environment.json", advice):
        machine = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        require(machine, MACHINE)
    run = Run(
        experiment=experiment_of(folder, root),
        data=Path(config["data"]).name,
        profile=config["profile"],
        seed=config["seed"],
        folder=folder,
        config=config,
        machine=machine,
        history=read_history(folder / "metrics.jsonl", advice),
        validation=read_row(folder / "summary.json", COST),
    )
    if root.resolve().name in ("quick", "full"):  # runs/DATA/PROFILE
        run.data, run.profile = root.resolve().parent.name, root.resolve().name
    for key, name in TESTS.items():
        if (folder / name).exists():
            setattr(run, key, read_row(folder / name, TEST))
    return run


def read_row(path: Path, kinds: dict) -> dict:
    """Read the only row of a file of results."""
    with reading(path, "remove this file and run make again"):
        [row] = read_results(path)
        require(row, kinds)
    return row


# ---- results/runs.jsonl


def shorten(value: object) -> object:
    """Round all floats to eight digits, and leave out the Dice of each class."""
    if isinstance(value, float):
        return float(f"{value:.8g}")
    if isinstance(value, list):
        return [shorten(item) for item in value]
    if isinstance(value, dict):
        return {key: shorten(item) for key, item in value.items() if key != "per_class_dice"}
    return value


def to_line(run: Run) -> str:
    """Write a run as one line of JSON."""
    validation = dict(run.validation or {})
    for key in ("training", "validation"):  # scores of the best epoch, which the history has too
        validation.pop(key, None)
    kept = {
        "data": run.data,
        "profile": run.profile,
        "experiment": run.experiment,
        "seed": run.seed,
        "config": run.config,
        "machine": run.machine,
        "validation": shorten(validation),
        "test": shorten(run.test),
        "on_afo": shorten(run.on_afo),
        "on_scenes": shorten(run.on_scenes),
        "history": shorten(run.history),
    }
    present = {key: value for key, value in kept.items() if value not in (None, {}, [])}
    return json.dumps(present, ensure_ascii=False, separators=(",", ":"))


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


# ---- tables


@dataclass
class Study:
    """Hold the runs of one data set and profile, sorted into tables: experiment → runs."""

    data: str
    profile: str
    figures: Path  # folder that figures are drawn into
    link: str  # this folder, as the page names it
    runs: Runs  # all of them
    models: Runs = field(default_factory=dict)  # the lab's three and best
    augment: Runs = field(default_factory=dict)
    tune: Runs = field(default_factory=dict)
    heads: Runs = field(default_factory=dict)
    overfit: Runs = field(default_factory=dict)
    others: Runs = field(default_factory=dict)  # tested runs that share no table with the models
    left_out: list[str] = field(default_factory=list)  # a sentence for each run in no table

    @property
    def settings(self) -> str:
        """Give the variables that make needs for these runs, with a space in front."""
        text = ""
        if self.data == "afo":
            text += " DATA=afo"
        elif self.data != "generated":  # own data: the name of their config
            text += f" DATA={self.data}.yaml"
        if self.profile != "quick":
            text += f" PROFILE={self.profile}"
        return text

    @property
    def group(self) -> str:
        """Name what images that belong together are: a flight in the lab's data."""
        first = next(iter(self.runs.values()))[0]
        return "flight" if list(first.config["classes"]) == LAB["classes"] else "group"


def by_experiment(runs: list[Run]) -> Runs:
    """Collect the runs of each experiment, sorted by seed."""
    groups: Runs = {}
    for run in runs:
        groups.setdefault(run.experiment, []).append(run)
    for members in groups.values():
        members.sort(key=lambda run: run.seed)
    return groups


def reasons_apart(run: Run, first: Run) -> list[str]:
    """List why two runs cannot stand in one table.

    They share it if they were scored on the same images and classes and saw the same number of
    images in training. `best` may have its own number, which the table shows.
    """
    reasons = differences(run.validation, first.validation)
    if run.test and first.test:
        for reason in differences(run.test, first.test):
            if reason not in reasons:
                reasons.append(reason)
    own_number = run.experiment == "best" and first.experiment != "best"
    if run.validation["images_seen"] != first.validation["images_seen"] and not own_number:
        reasons.append("images seen")
    return reasons


def share_table(runs: list[Run]) -> tuple[Runs, list[tuple[Run, list[str]]]]:
    """Find the runs that can share a table, and list the others with the reasons.

    The table has the number of images seen that most runs have (of the lab's models, if any).
    """
    of_lab = [run for run in runs if run.experiment in LAB_MODELS]
    counts = Counter(run.validation["images_seen"] for run in of_lab or runs)
    most = counts.most_common(1)[0][0]
    first = next(run for run in of_lab or runs if run.validation["images_seen"] == most)
    first_of_best = next((run for run in runs if run.experiment == "best"), None)

    together, apart = [], []
    for run in runs:
        reasons = reasons_apart(run, first)
        if run.experiment == "best" and not reasons:
            reasons = reasons_apart(run, first_of_best)
        if reasons:
            apart.append((run, reasons))
        else:
            together.append(run)
    return by_experiment(together), apart


def place(runs: list[Run], others: list[Run], left_out: list[str]) -> Runs:
    """Take the runs that share a table.

    A tested run that only saw another number of images is added to the others. For any other run a
    sentence is added to `left_out`.
    """
    if not runs:
        return {}
    together, apart = share_table(runs)
    for run, reasons in apart:
        if reasons == ["images seen"] and run.test:
            others.append(run)
            continue
        sentence = f"{run.label}, differs from its table in {', '.join(reasons)}."
        if sentence not in left_out:
            left_out.append(sentence)
    return together


def by_length(runs: list[Run]) -> Runs:
    """Collect the runs of each experiment, apart if they saw unlike numbers of images."""
    groups: Runs = {}
    for experiment, members in by_experiment(runs).items():
        lengths = sorted({run.validation["images_seen"] for run in members})
        for seen in lengths:
            name = experiment if len(lengths) == 1 else f"{experiment} ({seen:,} images)"
            groups[name] = [run for run in members if run.validation["images_seen"] == seen]
    return groups


def sort_runs(runs: list[Run], figures: Path, link: str) -> Study:
    """Sort the runs of one data set and profile into the tables of the page."""
    scored = []
    left_out = []
    for run in runs:
        if run.test is not None or run.experiment.split("/")[0] in UNTESTED:
            scored.append(run)
        else:
            left_out.append(f"{run.label}, was not tested on its own data.")
    if not scored:
        raise UserError(f"{runs[0].folder}: no table can show it; it has no testing.json")
    first = scored[0]
    groups = by_experiment(scored)
    study = Study(first.data, first.profile, figures, link, groups, left_out=left_out)
    models: list[Run] = []
    others: list[Run] = []
    sweeps: dict[str, list[Run]] = {name: [] for name in SWEEPS}
    for experiment, members in groups.items():
        folder = experiment.split("/")[0]
        if experiment in MODELS:
            models += members
        elif folder in SWEEPS:
            sweeps[folder] += members
        else:
            others += members

    models.sort(key=lambda run: MODELS.index(run.experiment))
    study.models = place(models, others, study.left_out)
    tuned = study.models.get("tuned", [])
    tables = len(by_experiment(tuned + sweeps["augment"]))
    if sweeps["augment"] and tables > 1:
        study.augment = place(tuned + sweeps["augment"], others, study.left_out)
    else:
        others += sweeps["augment"]  # a single experiment is nothing to compare
    if sweeps["tune"]:
        study.tune = place(tuned + sweeps["tune"], others, study.left_out)
    study.heads = place(sweeps["heads"], others, study.left_out)
    study.overfit = by_experiment(sweeps["overfit"])  # each has a length of its own
    study.others = by_length(scored_alike(others, models, study.left_out))
    return study


def scored_alike(others: list[Run], models: list[Run], left_out: list[str]) -> list[Run]:
    """Keep the tested runs whose scores are on the same images and classes as the models'."""
    tested = [run for run in models + others if run.test]
    kept = []
    for run in others:
        reasons = differences(run.test, tested[0].test)
        if reasons:
            left_out.append(f"{run.label}, differs from the other runs in {', '.join(reasons)}.")
        else:
            kept.append(run)
    return kept
