"""Read finished runs from their folders, and sort runs into tables."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from common import ROOT, UserError, reading, require
from runs import read_history
from table import LAB, read_results

LAB_MODELS = ("initial", "modified", "tuned")
MODELS = (*LAB_MODELS, "best")
UNTESTED = ("tune", "overfit", "heads")  # they look at validation, and never at the test split
SWEEPS = ("augment", *UNTESTED)  # folders of experiments that have a section of their own
# In these keys the runs of an experiment may differ: the seed, and what depends on the machine.
OF_ONE_RUN = ("seed", "data", "precision")
TESTS = {"test": "testing.json", "on_afo": "on-afo.json", "on_scenes": "on-scenes.json"}

MACHINE = {"commit": str, "device": str, "precision": str, "threads": int, "torch": str}
CONFIG = {
    "name": str,
    "seed": int,
    "profile": str,
    "data": str,
    "classes": dict,
    "batch_size": int,
    "images_per_epoch": int,
    "limit_images": int,
}
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

    @property
    def name(self) -> str:
        """Give the experiment without its folder: "flip-0.3"."""
        return self.experiment.split("/")[-1]

    @property
    def folder_name(self) -> str:
        """Give the folder of the experiment: "augment"; or its name if it is in none."""
        return self.experiment.split("/")[0]

    @property
    def is_augmented(self) -> bool:
        """Tell whether training flipped, blurred or jittered images."""
        keys = ("horizontal_flip", "vertical_flip", "blur", "jitter")
        return any(self.config.get(key, 0) > 0 for key in keys)


Runs = dict[str, list[Run]]  # experiment → its runs by seed


# ---- folders


def find_runs(root: Path) -> tuple[list[Run], list[str]]:
    """Read the finished runs below a folder; also say in a line each which are unfinished.

    UserError if two runs are the same experiment with the same seed, as a copied folder is.
    """
    folders = []
    for folder in root.rglob("seed*"):
        if folder.is_dir() and folder.name.removeprefix("seed").isdecimal():
            folders.append(folder)
    folders.sort(key=lambda folder: (folder.parent, int(folder.name.removeprefix("seed"))))

    finished, unfinished = [], []
    first_folder = {}  # of each experiment and seed
    for folder in folders:
        experiment = experiment_of(folder, root)
        is_tested = any((folder / name).exists() for name in TESTS.values())
        needs_test = experiment.split("/")[0] not in UNTESTED
        if not (folder / "summary.json").exists():
            unfinished.append(f"`{folder}` is not finished: it has no summary.json.")
        elif needs_test and not is_tested:
            unfinished.append(f"`{folder}` is not tested: it has no testing.json.")
        else:
            run = read_folder(folder, root)
            first = first_folder.setdefault((run.experiment, run.seed), folder)
            if first != folder:
                text = f"has seed {run.seed} of `{run.experiment}`, as {first} has"
                raise UserError(f"{folder}: {text}; move one of them out of {root}")
            finished.append(run)
    return finished, unfinished


def check_one_profile(runs: list[Run], root: Path) -> None:
    """Raise UserError if a folder holds runs of several profiles, which share no table."""
    for run in runs:
        if {"quick", "full"} & set(run.experiment.split("/")):
            raise UserError(f"{root}: holds several profiles; give one, as in runs/afo/quick")


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
        history=read_history(folder / "metrics.jsonl", "remove summary.json and run make again"),
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
    rows = read_results(path)
    with reading(path, "remove this file and run make again"):
        [row] = rows
        require(row, kinds)
    return row


# ---- tables


@dataclass
class Study:
    """Hold the runs of one data set and profile, sorted into tables: experiment → runs."""

    data: str
    profile: str
    figures: Path  # folder that figures are drawn into
    link: str  # this folder, as the page names it
    all_runs: list[Run]  # that share this page
    runs: Runs  # those of them that saw as many images as their table asks
    models: Runs  # the lab's three and best
    augment: Runs  # tuned, and augment/*
    tune: Runs  # tuned, and tune/*
    heads: Runs
    overfit: Runs
    others: Runs  # tested runs that are not in the tables above
    left_out: list[str]  # a sentence for each run in no table
    variables: str | None = None  # that make was called with; None: those of data and profile

    @property
    def settings(self) -> str:
        """Give the variables that make needs for these runs, with a space in front."""
        if self.variables is not None:
            return f" {self.variables}" if self.variables else ""
        text = ""
        if self.data == "afo":
            text += " DATA=afo"
        elif self.data != "generated":
            text += f" DATA={self.config_of_data}"
        if self.profile != "quick":
            text += f" PROFILE={self.profile}"
        return text

    @property
    def config_of_data(self) -> str:
        """Name the config of own data, whose runs lie in a folder of its name, with - for /."""
        for name in (f"{self.data}.yaml", f"{self.data.replace('-', '/')}.yaml"):
            if (ROOT / name).exists():
                return name
        return f"{self.data}.yaml"

    @property
    def group(self) -> str:
        """Name what images that belong together are: a flight in the lab's data."""
        config = next(iter(self.runs.values()))[0].config
        has_flights = list(config["classes"]) == LAB["classes"] and config["group"] != ""
        return "flight" if has_flights else "group"


def by_experiment(runs: list[Run]) -> Runs:
    """Collect the runs of each experiment, sorted by seed."""
    groups: Runs = {}
    for run in runs:
        groups.setdefault(run.experiment, []).append(run)
    for members in groups.values():
        members.sort(key=lambda run: run.seed)
    return groups


def page_key(run: Run) -> dict[str, object]:
    """Say of which data a run is: the runs of one page share all values that they have."""
    key = {
        "training images": run.validation["digest"],
        "classes": tuple(run.validation["per_class_iou"]),
    }
    if run.test is not None:
        key["test images"] = run.test["digest"]
        key["profile"] = run.test["profile"]
    return key


def shorten(value: object) -> object:
    """Round all floats to eight digits."""
    if isinstance(value, float):
        return float(f"{value:.8g}")
    if isinstance(value, list):
        return [shorten(item) for item in value]
    if isinstance(value, dict):
        return {key: shorten(item) for key, item in value.items()}
    return value


def config_key(run: Run) -> dict[str, str]:
    """Give the config of a run as text, key by key, without what seeds need not share."""
    key = {}
    for name, value in run.config.items():
        if name not in OF_ONE_RUN:
            key[name] = json.dumps(shorten(value))
    return key


def most_common(values: list) -> object:
    """Take the value that is most frequent, the first of several."""
    return Counter(values).most_common(1)[0][0]


def unlike(keys: list[dict]) -> list[list[str]]:
    """Name, for each of several dicts, the items that differ from the most usual of the dicts.

    An item that a dict lacks is not compared: runs of older code lack newer keys.
    """
    values: dict[str, list] = {}
    for key in keys:
        for name, value in key.items():
            values.setdefault(name, []).append(value)
    usual = {name: most_common(values_of_name) for name, values_of_name in values.items()}
    # Perhaps no dict has all usual values: compare with the dict that has most of them.
    reference = dict(usual)
    reference.update(min(keys, key=lambda key: len(differing(key, usual)), default={}))
    return [differing(key, reference) for key in keys]


def differing(key: dict, reference: dict) -> list[str]:
    return [name for name, value in key.items() if value != reference[name]]


def share_page(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """Keep the runs that were scored as most are, and write a sentence on each of the others."""
    kept, left_out = [], []
    for run, reasons in zip(runs, unlike([page_key(run) for run in runs]), strict=True):
        if run.test is None and run.folder_name not in UNTESTED:
            left_out.append(f"{run.label}, was not tested on its own data.")
        elif reasons:
            left_out.append(f"{run.label}, differs from the other runs in {', '.join(reasons)}.")
        else:
            kept.append(run)
    return kept, left_out


def share_config(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """Keep the runs that differ from most of their experiment only in the keys OF_ONE_RUN.

    Also writes a sentence on each of the others.
    """
    kept, left_out = [], []
    for experiment, members in by_experiment(runs).items():
        reasons_of_members = unlike([config_key(run) for run in members])
        for run, reasons in zip(members, reasons_of_members, strict=True):
            if reasons:
                left_out.append(
                    f"{run.label}, has another config than other runs of `{experiment}`:"
                    f" {', '.join(reasons)}."
                )
            else:
                kept.append(run)
    return kept, left_out


def family_of(run: Run) -> str:
    """Name the runs that a run is compared with: all of them should see as many images."""
    if run.experiment in LAB_MODELS or run.folder_name in ("augment", "tune"):
        return "tuned"
    return "heads" if run.folder_name == "heads" else run.experiment


def split_by_length(runs: list[Run]) -> tuple[list[Run], list[Run]]:
    """Separate the runs that saw as many images as most of their family from the others."""
    lengths: dict[str, list[int]] = {}
    for run in runs:
        lengths.setdefault(family_of(run), []).append(run.validation["images_seen"])
    usual, longer_or_shorter = [], []
    for run in runs:
        if run.validation["images_seen"] == most_common(lengths[family_of(run)]):
            usual.append(run)
        else:
            longer_or_shorter.append(run)
    return usual, longer_or_shorter


def sort_runs(runs: list[Run], figures: Path, link: str, variables: str | None = None) -> Study:
    """Sort the runs of one data set and profile into the tables of a page.

    A tested run that saw another number of images than its family stands with the others.
    UserError if no run can be shown.
    """
    tested, not_tested = share_page(runs)
    if not tested:
        raise UserError(f"{runs[0].folder}: no table can show it; it has no testing.json")
    kept, of_other_config = share_config(tested)
    left_out = not_tested + of_other_config
    usual, longer_or_shorter = split_by_length(kept)
    others = [run for run in longer_or_shorter if run.test]
    for run in longer_or_shorter:
        if run.test is None:
            left_out.append(f"{run.label}, saw another number of images than its table.")
    models = []
    sweeps: dict[str, list[Run]] = {name: [] for name in SWEEPS}
    for run in usual:
        if run.experiment in MODELS:
            models.append(run)
        elif run.folder_name in SWEEPS:
            sweeps[run.folder_name].append(run)
        else:
            others.append(run)
    models.sort(key=lambda run: MODELS.index(run.experiment))
    tuned = [run for run in models if run.experiment == "tuned"]
    augment = by_experiment(tuned + sweeps["augment"])
    if len(augment) == 1:  # a single experiment is nothing to compare
        augment = {}
        others += sweeps["augment"]
    return Study(
        data=kept[0].data,
        profile=kept[0].profile,
        figures=figures,
        link=link,
        all_runs=kept,
        runs=by_experiment(usual),
        models=by_experiment(models),
        augment=augment,
        tune=by_experiment(tuned + sweeps["tune"]) if sweeps["tune"] else {},
        heads=by_experiment(sweeps["heads"]),
        overfit=by_experiment(sweeps["overfit"]),
        others=by_experiment(others),
        left_out=left_out,
        variables=variables,
    )
