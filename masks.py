"""Turn the values of a mask into classes.

The keys `mask_format`, `classes`, `other_values`, `ignore` and `mask_tolerance` of default.yaml say
which class a value is. images.py reads the files.
"""

from pathlib import Path

import numpy as np

from common import UserError
from metrics import IGNORE

NO_CLASS = 254  # marks pixels of a mask that fit no class; indices of classes stay below it
LARGEST_INDEX = 2**31 - 1


# ---- keys of the config


def is_colour(value: object) -> bool:
    """Tell whether a value of a config is a colour: a list of three whole numbers in 0…255."""
    if type(value) is not list or len(value) != 3:
        return False
    return all(type(number) is int and 0 <= number <= 255 for number in value)


def is_index(value: object) -> bool:
    """Tell whether a value of a config is an index of a class."""
    return type(value) is int and 0 <= value <= LARGEST_INDEX


def list_colours(value: object) -> list:
    """Make a list of colours from one colour or several."""
    if type(value) is list and value and type(value[0]) is list:
        return value
    return [value]


def ignored_values(config: dict) -> list[list[int]]:
    """List what ignored pixels hold in a mask: [red, green, blue], or [index]."""
    ignore = config["ignore"]
    if not ignore:
        return []
    if config["mask_format"] == "indices":
        return [[index] for index in ignore]
    return list_colours(ignore)


def listed_values(config: dict) -> list[tuple[list[int], int]]:
    """List (value, class): what pixels hold in a mask, and the index of its class, or IGNORE."""
    ignored = ignored_values(config)
    listed = [(value, IGNORE) for value in ignored]
    if config["mask_format"] == "colours":
        for target, colours in enumerate(config["classes"].values()):
            listed += [(colour, target) for colour in list_colours(colours)]
        return listed
    index = 0
    for target in range(len(config["classes"])):
        while [index] in ignored:  # the classes of masks with ignore: [0] are 1, 2, …
            index += 1
        listed.append(([index], target))
        index += 1
    return listed


def file_values(config: dict) -> list[int]:
    """List the number that each class gets in a predicted mask.

    With mask_format: indices it is the number in the training masks, else 0, 1, 2 ….
    """
    numbers = list(range(len(config["classes"])))
    if config["mask_format"] == "indices":
        for value, target in listed_values(config):
            if target != IGNORE:
                numbers[target] = value[0]
    return numbers


def check_mask_keys(config: dict) -> None:
    """Raise UserError unless the keys of masks say what their pixels mean."""
    classes = config["classes"]
    if not 2 <= len(classes) <= NO_CLASS:
        raise UserError(f"classes: there are {len(classes)}; give 2 to {NO_CLASS} of them")
    advice = "give [red, green, blue], each 0 to 255, or a list of several such colours"
    for name, colours in classes.items():
        if type(name) is not str:
            raise UserError(f"classes: {name}: is no text; write the name in quotes")
        if not all(is_colour(colour) for colour in list_colours(colours)):
            raise UserError(f"classes: {name}: is {colours}; {advice}")
    ignore = config["ignore"]
    if config["mask_format"] == "indices":
        if not all(is_index(index) for index in ignore):
            raise UserError(f"ignore: is {ignore}; give indices of 0 or more, as in [255]")
        if config["mask_tolerance"]:
            raise UserError("mask_tolerance: fits colours alone; remove it or mask_format: indices")
    elif not all(is_colour(colour) for colour in ignored_values(config)):
        raise UserError(f"ignore: is {ignore}; {advice}")
    values = [value for value, _ in listed_values(config)]
    for value in values:
        if values.count(value) > 1:
            raise UserError(f"classes, ignore: {value} stands twice; give each its own value")
    if max(file_values(config)) > 255:
        raise UserError("classes, ignore: have numbers above 255, which no predicted mask can hold")
    if config["other_values"] and config["other_values"] not in classes:
        names = ", ".join(classes)
        raise UserError(f"other_values: is {config['other_values']!r}; give a class of {names}")


# ---- values → classes


def number_pixels(pixels: np.ndarray) -> np.ndarray:
    """Turn the channels of each pixel into one number: (…, channels) integers to (…) int64."""
    numbers = np.zeros(pixels.shape[:-1], np.int64)
    for channel in range(pixels.shape[-1]):
        numbers = numbers * 256 + pixels[..., channel]
    return numbers


def label(values: np.ndarray, config: dict) -> tuple[np.ndarray, int]:
    """Give each pixel its class: (H, W, channels) integers to (H, W) uint8.

    Pixels that count nowhere are IGNORE, those with a value that is no class are NO_CLASS. Also
    returns how many pixels have a class through `mask_tolerance` alone.
    """
    listed = listed_values(config)
    numbers = number_pixels(values)
    mask = np.full(numbers.shape, NO_CLASS, np.uint8)
    for value, target in listed:
        mask[numbers == number_pixels(np.array(value))] = target
    n_near = 0
    if config["mask_tolerance"]:
        strays = mask == NO_CLASS
        near = nearest_class(values[strays], listed, config["mask_tolerance"])
        mask[strays] = near
        n_near = int((near != NO_CLASS).sum())
    if config["other_values"]:
        mask[mask == NO_CLASS] = list(config["classes"]).index(config["other_values"])
    return mask, n_near


def nearest_class(
    values: np.ndarray, listed: list[tuple[list[int], int]], tolerance: int
) -> np.ndarray:
    """Find the class of the nearest colour: (N, 3) integers to (N,) uint8.

    The distance is the largest difference of a channel; NO_CLASS above the tolerance.
    """
    nearest = np.full(len(values), NO_CLASS, np.uint8)
    smallest = np.full(len(values), tolerance + 1)
    for value, target in listed:
        distances = np.abs(values.astype(np.int64) - value).max(axis=1)
        is_nearer = distances < smallest
        nearest[is_nearer] = target
        smallest[is_nearer] = distances[is_nearer]
    return nearest


# ---- messages


def refuse_strays(path: Path, values: np.ndarray, strays: np.ndarray, config: dict) -> None:
    """Raise UserError that says where a mask holds a value that is no class, and why it may be.

    `values` are (H, W, channels) integers, `strays` is (H, W) bool.
    """
    y, x = np.argwhere(strays)[0].tolist()
    kind = "value" if config["mask_format"] == "indices" else "colour"
    first = values[y, x].tolist()
    text = f"has {strays.sum()} pixels with a {kind} that is no class, the first is {first}"
    text += f" at x={x}, y={y}"
    is_grey = bool((values == values[..., :1]).all())
    greys = np.unique(values[..., 0]).tolist() if is_grey else []
    if 1 < len(greys) <= 8:
        text += f" (it holds {', '.join(map(str, greys))})"
    if config["mask_format"] == "indices":
        advice = advise_for_indices(greys, config)
    else:
        is_jpeg = path.suffix.lower() in (".jpg", ".jpeg", ".jfif")
        advice = advise_for_colours(values, strays, greys, is_jpeg, config)
    raise UserError(f"{path}: {text}; {advice}")


def advise_for_indices(present: list[int], config: dict) -> str:
    """Say what to do about a mask of indices with the values in `present`, some of them no class.

    If 255 is the only object, the advice must not be to ignore it.
    """
    names = list(config["classes"])
    if set(present) <= {0, 255}:
        keys = "mask_format: indices and ignore" if config["ignore"] else "mask_format: indices"
        return f"0 and 255 are colours, black and white: remove {keys}, and list them in `classes`"
    allowed = {value[0] for value, _ in listed_values(config)}
    strays = set(present) - allowed
    if strays == {255}:
        ignore = [*config["ignore"], 255]
        return f"if 255 marks pixels without a label, set ignore: {ignore}"
    others = f"if values number single objects, set other_values: {names[-1]}"
    if max(strays) > 255:
        return f"correct `classes`, or {others}"
    values = sorted(allowed | strays)
    if values == list(range(values[0], values[0] + len(values))):  # no gap
        return f"if each value is a class, add those that are missing to `classes`; {others}"
    gaps = "if each value is a class, list all as colours (7 is [7, 7, 7])"
    return f"{gaps} and remove mask_format: indices; {others}"


def advise_for_colours(
    values: np.ndarray, strays: np.ndarray, greys: list[int], is_jpeg: bool, config: dict
) -> str:
    """Say what to do about a mask with colours that are no class."""
    names = list(config["classes"])
    others = f"if such values number single objects, set other_values: {names[-1]}"
    indices = set(range(len(names)))
    only_indices = set(greys) <= indices | {255}
    has_object = bool(set(greys) & (indices - {0}))
    if only_indices and has_object:
        return "these are indices: set mask_format: indices"
    if greys and greys[-1] > 255:
        return f"values above 255 are no colours: set mask_format: indices; {others}"
    if is_jpeg or looks_smoothed(values, strays):
        cause = "JPEG changes colours" if is_jpeg else "its edges are smoothed"
        remedy = "save masks as PNG without smoothing, or set mask_tolerance: 128"
        return f"{cause}: {remedy} to take the nearest class"
    advice = "correct the mask, or list the colour in `classes` or `ignore`"
    if greys:
        advice += f"; {others}"
    return advice


def looks_smoothed(values: np.ndarray, strays: np.ndarray) -> bool:
    """Tell whether pixels without a class look like smoothed edges.

    They have many different values, and most differ from the pixels beside them.
    """
    as_above = (values[1:, 1:] == values[:-1, 1:]).all(axis=2)
    as_left = (values[1:, 1:] == values[1:, :-1]).all(axis=2)
    inside = strays[1:, 1:] & as_above & as_left
    n_values = len(np.unique(number_pixels(values[strays])))
    return n_values >= 4 and inside.sum() < strays.sum() / 2


def missing_classes_problem(names: list[str], config: dict) -> str:
    """Say what to do about classes that no pixel of the training masks has."""
    has_indices = config["mask_format"] == "indices"
    advice = "correct its value, or add masks that have it"
    if len(config["classes"]) > 2:  # two are the fewest
        advice = "correct its value, add masks that have it, or remove the class"
        if has_indices:  # without `ignore` the classes after a removed one would move up by one
            values = file_values(config)
            missing = [values[list(config["classes"]).index(name)] for name in names]
            advice += f" and set ignore: {sorted(config['ignore'] + missing)}"
    if has_indices and 255 in config["ignore"]:  # it may be the object, white in a black mask
        advice = f"if 255 is its colour, remove ignore and mask_format: indices; else {advice}"
    return f"classes: no pixel of the training masks is {', '.join(names)}; {advice}"
