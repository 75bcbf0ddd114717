"""List every problem of a data set, and describe its splits.

    python data.py check [DIR] [--config FILE] [--set key=value] [--picture FILE.png]

Prints a table of pairs, groups, sizes and class shares, then notes, which may be meant, and
problems, which must be fixed. Of many files with the same problem three are named. Without --config
the data have the layout of the Artificial Flying Objects.
"""

import argparse
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from common import ROOT, SPLITS, UserError
from config import add_arguments as add_config_arguments
from config import data_override, load_config
from data import evenly, in_parallel, padded_size
from figures import class_colours, grid, legend_of, overlay, save, thumbnail
from images import (
    count_near,
    describe_cut_off,
    read_pair,
    read_palette,
    share_cut_off,
    turned_alone,
)
from masks import missing_classes_problem
from metrics import IGNORE, MIN_GROUPS
from pairs import (
    Pair,
    check_data_keys,
    data_root,
    find_pairs,
    find_unread,
    patterns_of,
    stand_in_note,
)

SAMPLES = 6  # pairs of each split in the picture
MOST_ALIKE = 3  # unusable files that are named if all have the same mistake
MOST_GROUPS = 3  # that are named of those in several splits


class CheckedPair(NamedTuple):
    """What is known of a pair that was read."""

    counts: Tensor  # (256,) int64: pixels by their value in the mask
    size: tuple[int, int]  # height and width of the files, turned upright
    digest: str  # of the image's pixels
    is_plain: bool  # the image is of a single colour
    turned_alone: str  # "image" or "mask" if EXIF data turn one of them upright alone, else ""
    n_near: int  # pixels of the mask that have a class through `mask_tolerance` alone
    cut_off: float  # the share of the image's values that `value_range` cuts off
    palette: dict[int, list[int]]  # of a mask of indices that is a palette file: number → colour


class Checked(NamedTuple):
    """What is known of a split."""

    pairs: list[Pair]
    readable: list[Pair]
    sizes: list[str]  # that differ, as in 640×480
    counts: Tensor  # (256,) int64: pixels by their value in the mask
    problems: list[str]
    unusable: list[str]  # problems of single files
    notes: list[str]


# ---- reading


def check_pair(pair: Pair, config: dict) -> CheckedPair:
    """Read a pair in its own size."""
    image, mask = read_pair(pair.image, pair.mask, dict(config, resize=[]))
    pixels = image.flatten(1)
    return CheckedPair(
        counts=mask.flatten().bincount(minlength=256),
        size=(mask.shape[0], mask.shape[1]),
        digest=sha256(image.numpy().tobytes()).hexdigest(),
        is_plain=bool((pixels == pixels[:, :1]).all()),
        turned_alone=turned_alone(pair.image, pair.mask),
        n_near=count_near(pair.mask, config) if config["mask_tolerance"] else 0,
        cut_off=share_cut_off(pair.image, config["value_range"]) if config["value_range"] else 0.0,
        palette=read_palette(pair.mask) if config["mask_format"] == "indices" else {},
    )


def check_split(
    config: dict, split: str, seen: dict[str, tuple[Path, str]], used: dict[Path, Pair]
) -> Checked:
    """Read all pairs of a split and list their problems.

    `seen` has the images of the splits before, digest → (path, split), and `used` their masks, mask
    → pair. Both get those of this split.
    """
    pairs, problems = find_pairs(config, split)
    for pair in pairs:
        first = used.setdefault(pair.mask, pair)
        if first is not pair:
            text = f"is the mask of {first.image} and of {pair.image}"
            problems.append(f"{pair.mask}: {text}; give each image a mask of its own")
    readable = []
    checked_pairs = []
    unusable = []
    results = in_parallel(partial(check_pair, config=config), pairs)
    for pair, future in tqdm(results, f"checking {split}", len(pairs), disable=None):
        try:
            checked_pair = future.result()
        except UserError as error:
            unusable.append(str(error))
            continue
        readable.append(pair)
        checked_pairs.append(checked_pair)
        first_path, first_split = seen.setdefault(checked_pair.digest, (pair.image, split))
        if first_split != split and not checked_pair.is_plain:
            problems.append(f"{pair.image}: is also in {first_split} ({first_path}); keep one")
    counts = torch.zeros(256, dtype=torch.int64)
    for checked_pair in checked_pairs:
        counts += checked_pair.counts
    notes = find_unread(data_root(config), patterns_of(config, split))
    sizes = [checked_pair.size for checked_pair in checked_pairs]
    size_problems, size_notes = look_at_sizes(split, sizes, config)
    problems += size_problems
    notes += size_notes
    notes += describe_exceptions(split, readable, checked_pairs)
    notes += note_palettes(split, readable, checked_pairs)
    if readable:
        missing = [name for i, name in enumerate(config["classes"]) if counts[i] == 0]
        if missing and split == "training":
            problems.append(f"{data_root(config)}: {missing_classes_problem(missing, config)}")
        elif missing:
            names = ", ".join(missing)
            notes.append(f"{split}: no mask has {names}; scores of this split say nothing of it")
        notes += note_few_groups(split, readable)
    size_texts = sorted({f"{width}×{height}" for height, width in sizes})
    return Checked(pairs, readable, size_texts, counts, problems, unusable, notes)


def look_at_sizes(
    split: str, sizes: list[tuple[int, int]], config: dict
) -> tuple[list[str], list[str]]:
    """List the problem, or the note, that images of several sizes (height, width) are."""
    n_sizes = len(set(sizes))
    if n_sizes < 2 or config["resize"]:
        return [], []
    if config["crop"] == 0:
        advice = "set resize: [height, width], or crop, to train on parts of images"
        return [f"{split}: images of {n_sizes} sizes; {advice}"], []
    try:
        height, width = padded_size(sizes, config)
    except UserError as error:
        return [f"{split}: {error}"], []
    text = f"images of {n_sizes} sizes are padded to {width}×{height}"
    return [], [f"{split}: {text}; what is added counts nowhere"]


def describe_exceptions(
    split: str, pairs: list[Pair], checked_pairs: list[CheckedPair]
) -> list[str]:
    """Write notes on images of a single colour, turned images and masks with a tolerance."""
    plain = []
    turned = {"image": [], "mask": []}
    n_near = 0
    n_pixels = 0
    cut_off: dict[Path, float] = {}  # image → the share of its values
    for pair, checked_pair in zip(pairs, checked_pairs, strict=True):
        if checked_pair.is_plain:
            plain.append(pair.image)
        if checked_pair.turned_alone == "image":
            turned["image"].append(pair.image)
        elif checked_pair.turned_alone == "mask":
            turned["mask"].append(pair.mask)
        n_near += checked_pair.n_near
        n_pixels += int(checked_pair.counts.sum())
        if checked_pair.cut_off > 0:
            cut_off[pair.image] = checked_pair.cut_off
    notes = []
    if plain:
        text = f"{len(plain)} images are of a single colour (empty slices?), as {plain[0]} is"
        notes.append(f"{split}: {text}")
    for kind, other in (("image", "masks"), ("mask", "images")):
        if turned[kind]:
            number = len(turned[kind])
            text = f"EXIF data turn {number} {kind}s upright, as {turned[kind][0]}"
            advice = "check in the picture that they fit"
            notes.append(f"{split}: {text}, but not their {other}; {advice}")
    if n_near:
        share = n_near / n_pixels
        text = f"gives {n_near} pixels ({share:.2%}) the nearest class"
        notes.append(f"{split}: mask_tolerance {text}")
    if cut_off:
        notes.append(f"{split}: value_range {describe_cut_off(cut_off)}")
    return notes


def note_palettes(split: str, pairs: list[Pair], checked_pairs: list[CheckedPair]) -> list[str]:
    """Write the note that a number has several colours in masks of indices; [] if none has.

    Programs that save space renumber the colours of each file by themselves.
    """
    first_use = {}  # number → its colour, and the first mask that has it
    for pair, checked_pair in zip(pairs, checked_pairs, strict=True):
        for number, colour in checked_pair.palette.items():
            first_colour, first_path = first_use.setdefault(number, (colour, pair.mask))
            if colour != first_colour:
                text = f"{number} is {first_colour} in {first_path} and {colour} in {pair.mask}"
                advice = "if its colour says the class, set mask_format: colours, and `classes`"
                return [f"{split}: {text}; {advice}"]
    return []


def note_few_groups(split: str, pairs: list[Pair]) -> list[str]:
    """Write the note that the images of a split come from too few groups; [] if it has enough."""
    groups = len({pair.group for pair in pairs})
    if split == "training" or groups >= MIN_GROUPS:
        return []
    number = "one group" if groups == 1 else f"{groups} groups"
    return [f"{split}: has {number} only; its scores may be luck, and say little of other images"]


def note_shared_groups(names: dict[str, list[tuple[str, str]]]) -> list[str]:
    """Write the note that some groups are in several splits; [] if none is.

    `names` has the (group, name) of each image, by split. If an image of each of two splits has the
    same name, each split probably numbers its groups from 1: equal groups are then different ones.
    """
    if share_names(names):
        return []
    splits_of = {}  # group → its splits
    for split, images in names.items():
        for group in {group for group, _ in images}:
            splits_of.setdefault(group, []).append(split)
    shared = []
    for group, splits in sorted(splits_of.items()):
        if len(splits) > 1:
            shared.append(f"{group} has images in {' and '.join(splits)}")
    if not shared:
        return []
    text = ", ".join(shared[:MOST_GROUPS])
    if len(shared) > MOST_GROUPS:
        text += f" (and {len(shared) - MOST_GROUPS} more groups are in several splits)"
    return [f"group {text}: their scores look better than they are"]


def share_names(names: dict[str, list[tuple[str, str]]]) -> bool:
    """Tell whether images of two splits have the same name."""
    seen = set()  # names in the splits before
    for images in names.values():
        names_of_split = {name for _, name in images}
        if names_of_split & seen:
            return True
        seen |= names_of_split
    return False


def shorten_alike(errors: list[str]) -> list[str]:
    """Keep a few of the errors that give the same advice, and say how many more there are."""
    alike: dict[str, list[str]] = {}  # by advice
    for error in errors:
        advice = error.partition("; ")[2]
        alike.setdefault(advice, []).append(error)
    kept = []
    for group in alike.values():
        kept += group[:MOST_ALIKE]
        if len(group) > MOST_ALIKE:
            number = len(group) - MOST_ALIKE
            files = "file" if number == 1 else "files"
            kept[-1] += f" (and {number} more {files} like this)"
    return kept


# ---- table and picture


def format_line(
    split: str, pairs: object, groups: object, sizes: str, shares: list[str], names: list[str]
) -> str:
    """Align the cells of a line of the table; the columns of shares are as wide as their names."""
    line = f"{split:<12}{pairs:>7}{groups:>8}  {sizes:<12}"
    for name, share in zip(names, shares, strict=True):
        line += f"  {share:>{max(10, len(name))}}"
    return line


def format_split(split: str, checked: Checked, names: list[str]) -> str:
    """Write the line of a split: numbers, sizes if there are few, shares of the pixels."""
    groups = {pair.group for pair in checked.pairs}
    values = list(range(len(names) - 1))
    values.append(IGNORE)
    pixels = checked.counts.sum().clamp(min=1)
    shares = [f"{checked.counts[value] / pixels:.4f}" for value in values]
    sizes = ", ".join(checked.sizes[:2])
    if len(checked.sizes) > 2:
        sizes = f"{len(checked.sizes)} sizes"
    return format_line(split, len(checked.pairs), len(groups), sizes, shares, names)


def draw_samples(pairs: list[Pair], config: dict) -> list[tuple[str, Tensor]]:
    """Draw a few pairs, evenly spaced: their names, and their masks over their images."""
    pictures = []
    for i in evenly(len(pairs), SAMPLES):
        image, mask = read_pair(pairs[i].image, pairs[i].mask, config)
        pictures.append((pairs[i].name, thumbnail(overlay(image, mask, class_colours(config)))))
    return pictures


# ---- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python data.py check`."""
    parser.add_argument("data", nargs="?", metavar="DIR", help="short for --set data=DIR")
    add_config_arguments(parser, required=False)
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw samples, a row a split")


def main(args: argparse.Namespace) -> None:
    paths = args.config or [ROOT / "configs/afo.yaml"]
    overrides = list(args.overrides)
    if args.data:
        overrides.append(data_override(args.data))
    config = load_config(paths, overrides)
    check_data_keys(config)
    columns = [*config["classes"], "ignored"]

    print(format_line("split", "pairs", "groups", "size", columns, columns))
    problems = []
    unusable = []
    notes = []
    rows = []
    seen = {}
    used = {}
    names = {}
    stand_in = stand_in_note(config)
    if stand_in:
        notes.append(stand_in)
    for split in SPLITS:
        if stand_in and split == "testing":
            continue  # the same files as validation
        checked = check_split(config, split, seen, used)
        problems += checked.problems
        unusable += checked.unusable
        notes += checked.notes
        names[split] = [(pair.group, pair.name) for pair in checked.pairs]
        print(format_split(split, checked, columns))
        if args.picture:
            rows.append(draw_samples(checked.readable, config))
    notes += note_shared_groups(names)
    if any(rows):
        save(grid(rows, legend_of(config), tuple(names)), args.picture)

    # Splits drawn from one folder repeat the same notes and problems: each is printed once.
    for note in dict.fromkeys(notes):
        print(f"note: {note}")
    problems = shorten_alike(list(dict.fromkeys(problems)) + unusable)
    for problem in problems:
        print(f"problem: {problem}")
    if problems:
        raise UserError(f"{config['data']}: {len(problems)} problem(s), listed above; fix them")
