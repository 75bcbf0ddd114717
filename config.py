"""Read a config: YAML files on top of configs/default.yaml, then key=value overrides.

    python config.py --config configs/tuned.yaml configs/quick.yaml --set batch_size=64

prints the resolved config or, with --run-dir as in the Makefile, starts a run directory with it. It
is a flat mapping, read at the entrance of a script and passed on as plain values.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Hashable
from pathlib import Path

import yaml

from errors import UserError, run
from files import lock_run, write_atomically

DEFAULT = Path(__file__).parent / "configs" / "default.yaml"
LOSSES = ("cross_entropy", "dice_pooled", "dice_per_class")
CHOICES = {
    "mask_format": ("colours", "indices"),
    "skip": ("pooled", "full"),
    "upsampling_init": ("random", "bilinear"),
    "schedule": ("constant", "one_cycle"),
    "device": ("auto", "cpu", "cuda"),
    "precision": ("auto", "float32", "bfloat16"),
    "in_channels": (1, 3, 4),
}
# Inclusive ranges; what they leave open is checked in `load_config`.
RANGES = {
    "published_iou": (0, 1),
    "dropout": (0, 0.99),
    "learning_rate": (1e-12, 1e3),
    "epochs": (1, 1_000_000),
    "images_per_epoch": (0, 1_000_000_000),
    "limit_groups": (0, 1_000_000_000),
    "limit_images": (0, 1_000_000_000),
    "batch_size": (1, 1_000_000),
    "seed": (0, 2**31 - 1),
    "crop": (0, 1_000_000),
    "blur_kernel": (1, 999),
}
PROBABILITIES = ("crop_on_objects", "horizontal_flip", "vertical_flip", "blur", "jitter")
RANGES |= dict.fromkeys(PROBABILITIES, (0, 1))


class _Loader(yaml.SafeLoader):
    """YAML that builds plain data only and refuses a key given twice instead of taking the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        mapping: dict = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable) or key in mapping:
                raise UserError(
                    f"key '{key}' (line {key_node.start_mark.line + 1}) is given twice or no name; "
                    "keep one"
                )
            mapping[key] = self.construct_object(value_node, deep=True)
        return mapping


def _parse(text: str) -> object:
    """Plain data from YAML; ValueError, with a reason in one line, if that is not what it is."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        # Beside its own errors PyYAML lets those of the values it builds through: a date that is
        # none, a number of thousands of digits, brackets nested a thousand deep.
        raise ValueError(f"not valid YAML ({' '.join(str(error).split())[:200]})") from None


def _read_yaml(path: Path) -> dict:
    try:
        values = _parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file; see configs/ for those there are") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; a config is YAML in UTF-8") from None
    except OSError as error:
        reason = error.strerror
        raise UserError(f"{path}: cannot be read ({reason}); a config is a YAML file") from None
    except (UserError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold 'key: value' lines, as configs/default.yaml does")
    return values


def _layers(path: Path, above: tuple[Path, ...] = ()) -> dict:
    """The values of a file on top of those of its `base`, and of the base's base."""
    if path in above:
        raise UserError(f"{path}: its chain of bases leads back to itself; remove one `base`")
    values = _read_yaml(path)
    base = values.pop("base", None)
    if base is None or (path.parent / str(base)).resolve() == DEFAULT:  # below everything anyway
        return values
    if not isinstance(base, str):
        raise UserError(f"{path}: base: must be the name of a config file")
    return _layers((path.parent / base).resolve(), (*above, path)) | values


def _fit(key: str, value: object, default: object) -> object:
    """`value` as the type that `default` shows; UserError if it is not of that type."""
    if default is None or isinstance(default, float):
        if value is None and default is None:
            return None
        if isinstance(value, str):
            try:  # YAML 1.1 reads 1e-3 (no dot) as text
                value = float(value)
            except ValueError:
                value = None
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not abs(value) < 1e300  # nor a NaN, nor a whole number too large for a float
        ):
            raise UserError(
                f"{key}: must be a number, as in '{key}: {0.5 if default is None else default}'"
            )
        return float(value)
    wanted = {
        bool: "true or false",
        int: "a whole number",
        str: "text",
        list: "a list",
        dict: "a mapping",
    }
    if type(value) is not type(default):  # exactly: to Python, true is a whole number as well
        example = str(default).lower() if isinstance(default, bool) else default
        raise UserError(f"{key}: must be {wanted[type(default)]}, as in '{key}: {example}'")
    return value


def _fit_structure(config: dict) -> None:
    """Check the keys that hold lists and mappings; UserError names the key and the right form."""
    for key in ("encoder", "decoder"):
        stages = config[key]
        for i, stage in enumerate(stages):
            ok = isinstance(stage, list) and len(stage) == 2
            if ok:
                width, kernel = stage
                named = key == "decoder" and width == "classes"
                ok = (named or _is_int(width)) and _is_int(kernel) and kernel % 2 == 1
            if not ok:
                raise UserError(
                    f"{key}: stage {i + 1} is {stage}; must be [channels, kernel] with an odd "
                    "kernel, as in [64, 3]"
                )
        if not stages:
            raise UserError(f"{key}: is empty; name at least one stage, as in [[16, 3]]")
    wanted = len(config["encoder"]) + (config["skip"] == "full")
    if len(config["decoder"]) != wanted:
        raise UserError(
            f"decoder: has {len(config['decoder'])} stages; skip: {config['skip']} with "
            f"{len(config['encoder'])} encoder stages needs {wanted}"
        )
    weights = config["loss"]
    for name, weight in weights.items():
        if name not in LOSSES:
            raise UserError(f"loss: unknown loss '{name}'{_nearest(name, LOSSES)}")
        weights[name] = _fit(f"loss: {name}", weight, 1.0)
        if weights[name] < 0:
            raise UserError(f"loss: {name}: must not be negative")
    if not sum(weights.values()) > 0:
        raise UserError("loss: needs at least one positive weight, as in {cross_entropy: 1.0}")
    colours = config["classes"]
    for name, colour in colours.items():
        if not isinstance(name, str) or not (
            isinstance(colour, list)
            and len(colour) == 3
            and all(_is_int(c, 0) and c <= 255 for c in colour)
        ):
            raise UserError(
                f"classes: {name}: must be a name and a colour of three numbers from 0 to 255, "
                "as in 'square: [255, 0, 0]'"
            )
    if not 2 <= len(colours) <= 255 or len({tuple(c) for c in colours.values()}) < len(colours):
        raise UserError("classes: needs 2 to 255 classes, each with a colour of its own")
    for key, length in (("blur_sigma", 2), ("jitter_strength", 4), ("split_shares", 3)):
        values = config[key]
        if len(values) != length:
            raise UserError(f"{key}: must be {length} numbers")
        config[key] = [_fit(key, value, 1.0) for value in values]
        if min(config[key]) < 0:
            raise UserError(f"{key}: must not be negative")
    low, high = config["blur_sigma"]
    if not 0 < low <= high:
        raise UserError(f"blur_sigma: must be 0 < low ≤ high, is [{low}, {high}]")
    if config["jitter_strength"][3] > 0.5:
        raise UserError("jitter_strength: hue (the fourth) must be at most 0.5")
    if config["blur_kernel"] % 2 == 0:
        raise UserError(f"blur_kernel: must be odd, is {config['blur_kernel']}")


def _fit_data(config: dict, group_given: bool) -> None:
    """Check the keys that say where the files lie and what masks hold; UserError names the key."""
    for key in ("images", "masks"):
        pattern = config[key]
        if pattern.count("*") != 1 or set("?[]") & set(pattern) or pattern.startswith("/"):
            raise UserError(
                f"{key}: is '{pattern}'; must be a path below `data` with one * for the name, and "
                "none of ? [ ], as in 'photos/*.jpg'"
            )
    if ("{split}" in config["images"]) != ("{split}" in config["masks"]):
        raise UserError("images, masks: name {split} in both, or in neither")
    if "{split}" not in config["images"] and not group_given:
        raise UserError(
            "group: splits are drawn, so say what in a name stays together, as in '^[^_]+' (all "
            "before the first _), or '' if each image is by itself"
        )
    if config["images"] == config["masks"]:
        raise UserError("images, masks: are the same; name where the masks are")
    names = config["split_folders"]
    plain = all(isinstance(n, str) and n and not set("*?[]") & set(n) for n in names)
    if (
        len(names) != 3
        or not plain
        or any(n[0] == "/" for n in names)
        or len({*map(Path, names)}) < 3
    ):
        raise UserError("split_folders: must be three folder names, as in [train, val, test]")
    if min(config["split_shares"]) <= 0:
        raise UserError("split_shares: must be positive")
    try:
        re.compile(config["group"])
    except re.error as error:
        raise UserError(f"group: '{config['group']}' is no regular expression ({error})") from None
    wanted = 3 if config["mask_format"] == "colours" else 1
    ignore = config["ignore"]
    if ignore and not (len(ignore) == wanted and all(_is_int(v, 0) and v <= 255 for v in ignore)):
        raise UserError(
            f"ignore: is {ignore}; with mask_format: {config['mask_format']} it must be "
            f"{'a colour, as in [255, 255, 255]' if wanted == 3 else 'an index, as in [255]'}"
        )
    known = (
        list(config["classes"].values())
        if wanted == 3
        else [[i] for i in range(len(config["classes"]))]
    )
    if ignore in known:
        raise UserError(f"ignore: {ignore} is one of the classes")
    size = config["resize"]
    if size and not (len(size) == 2 and all(_is_int(side, 8) and side <= 16384 for side in size)):
        raise UserError(f"resize: is {size}; must be [height, width] from 8 to 16384")


def _is_int(value: object, low: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _nearest(name: object, known: list[str] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known are: {', '.join(known)}"


def load_config(paths: list[Path], overrides: list[str]) -> dict:
    """Resolve a config.

    Args:
        paths: YAML files; later ones win. The first names the experiment unless `name` is set.
        overrides: "key=value" strings, the values in YAML; they win over the files.

    Returns:
        A value for every key of configs/default.yaml, of the type it has there.

    Raises:
        UserError: a file is missing or not YAML; a key is unknown (the nearest known one is
            named), given twice, of the wrong type or out of range.
    """
    default = _read_yaml(DEFAULT)
    sources = [(str(path), _layers(path.resolve())) for path in paths]
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--set {override}: must be key=value, as in --set batch_size=16")
        try:
            sources.append(("--set", {key.strip(): _parse(text)}))
        except (UserError, ValueError) as error:
            raise UserError(f"--set {override}: {error}") from None
    config = dict(default)
    for source, values in sources:
        for key, value in values.items():
            if key not in default:
                raise UserError(f"{source}: unknown key '{key}'{_nearest(key, list(default))}")
            try:
                config[key] = _fit(key, value, default[key])
            except UserError as error:
                raise UserError(f"{source}: {error}") from None
    config["name"] = config["name"] or (paths[0].stem if paths else "default")
    for key, known in CHOICES.items():
        if config[key] not in known:
            raise UserError(
                f"{key}: is {config[key]!r}; must be one of {', '.join(map(str, known))}"
            )
    for key, (low, high) in RANGES.items():
        if config[key] is not None and not low <= config[key] <= high:
            raise UserError(f"{key}: is {config[key]}; must be from {low:g} to {high:g}")
    _fit_structure(config)
    _fit_data(config, any("group" in values for _, values in sources))
    return config


def prepare_run(config: dict, run_dir: Path) -> None:
    """Make the config.yaml of a run directory say `config`, and remove what it no longer describes.

    Nothing is written where nothing but comments changed, nor, of a finished run, the device.

    Raises:
        UserError: the run is being trained with other settings.
    """
    path, text = run_dir / "config.yaml", dump(config)
    old = path.read_text(encoding="utf-8") if path.exists() else ""

    def lines(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.startswith("device:")]

    same = lines(old) == lines(text)
    if old == text or (same and (run_dir / "summary.json").exists()):
        return
    with lock_run(run_dir):
        if old and not same:
            print(f"{run_dir}: its settings changed, it starts over", flush=True)
        if not same:
            for name in ("last.pt", "previous.pt", "summary.json"):
                (run_dir / name).unlink(missing_ok=True)
        write_atomically(path, text.encode())


def check_sizes(config: dict, size: tuple[int, int], per_epoch: int) -> None:
    """UserError where the sizes of a config cannot go together with images of (height, width)."""
    height, width = size
    if 0 < config["crop"] < min(size):
        height = width = config["crop"]
    if config["blur"] > 0 and config["blur_kernel"] // 2 >= min(height, width):
        raise UserError(
            f"blur_kernel: {config['blur_kernel']} is too wide for images of {width}×{height}"
        )
    smallest = per_epoch % config["batch_size"] or config["batch_size"]
    if smallest == 1 and max(height, width) <= 2 ** len(config["encoder"]):
        raise UserError(
            f"batch_size: {config['batch_size']} leaves a batch of one image of {width}×{height}, "
            "whose deepest features are one value, too few for batch norm; change it, or the crop"
        )


def dump(config: dict) -> str:
    """The config as YAML text that `load_config` reads back to the same values."""
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True, default_flow_style=None)


def add_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add --config and --set, the same for every script that takes a config."""
    parser.add_argument(
        "--config",
        type=Path,
        nargs="+",
        required=required,
        default=[],
        metavar="FILE",
        help="later files win",
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", dest="overrides", action="extend"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the resolved config.")
    add_arguments(parser)
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="write it there")
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    if args.run_dir:
        prepare_run(config, args.run_dir)
    else:
        sys.stdout.write(dump(config))


if __name__ == "__main__":
    run(main)
