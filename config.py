"""Read a config: YAML files on top of configs/default.yaml, then key=value overrides.

    python config.py --config configs/tuned.yaml configs/quick.yaml --set batch_size=64

prints the resolved config. default.yaml has every key, by type; allowed.yaml has their ranges.
"""

import argparse
import difflib
import json
import math
import sys
from pathlib import Path

import yaml

from common import ROOT, UserError, reading, require, run, write_atomically

DEFAULT = ROOT / "configs/default.yaml"
ALLOWED = ROOT / "configs/allowed.yaml"
UNFINISHED = 3  # the exit code by which make learns that there is something to train


class UniqueKeyLoader(yaml.SafeLoader):
    """Read YAML as yaml.safe_load does, but refuse a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"{key} stands twice")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict:
    """Read the keys of a YAML file on top of the keys of its `base`.

    `above` are the files that led here, each the base of the one before. UserError if the file
    cannot be read, or its bases go round in a circle.
    """
    path = path.resolve()
    if path in above:
        raise UserError(f"{path}: base: leads back to this file; remove one `base`")
    with reading(path, "a config is UTF-8 text, 'key: value' lines as in configs/default.yaml"):
        values = yaml.load(path.read_text(encoding="utf-8"), UniqueKeyLoader)
        if values is None:  # an empty file
            values = {}
        if not isinstance(values, dict):
            raise ValueError("it has other lines; does a space follow each colon?")
    base = values.pop("base", None)
    base_path = DEFAULT
    if base is not None:
        base_path = path.parent / str(base)
        with reading(f"{path}: base: {base_path}", "correct the name"):
            if not base_path.is_file():
                raise ValueError("there is no such file")
    # default.yaml is below everything anyway; on top of other files it would undo them.
    if base_path.resolve() == DEFAULT:
        return values
    merged = read_yaml(base_path, (*above, path))
    if "images" in values:
        merged.pop("group", None)  # it belongs to the images of the base
    merged.update(values)
    return merged


def convert(value: object, example: object) -> object:
    """Return a value as the type of an example; ValueError if it is of another one."""
    if isinstance(example, list):
        return convert_list(value, example)
    if isinstance(example, float) and type(value) in (int, str):
        value = float(value)  # YAML reads 1 as a whole number, and 1e-3 as text
    if type(value) is not type(example):
        raise ValueError
    if isinstance(value, float) and math.isnan(value):
        raise ValueError
    return value


def convert_list(value: object, example: list) -> list:
    """Return a list with items of the types in an example; ValueError if it is another one."""
    if type(value) is not list:
        raise ValueError
    if not example or isinstance(example[0], list):
        return value  # as `ignore` and `encoder`: checked where they are used
    if isinstance(example[0], str):  # names, of any number
        return [convert(name, "") for name in value]
    if len(value) != len(example):
        raise ValueError
    return [convert(v, e) for v, e in zip(value, example, strict=True)]


def check_value(source: str, key: str, value: object, default: dict, allowed: dict) -> object:
    """Return the value of a key as the type it has in default.yaml; UserError if it is none."""
    if key not in default:
        close = difflib.get_close_matches(str(key), default, n=1)
        hint = f"did you mean '{close[0]}'?" if close else "configs/default.yaml has all keys"
        raise UserError(f"{source}: unknown key '{key}'; {hint}")
    try:
        converted = convert(value, default[key])
    except (TypeError, ValueError):
        example = json.dumps(default[key])
        raise UserError(f"{source}: {key}: {value!r}; write it as in '{key}: {example}'") from None
    check_range(source, key, converted, allowed.get(key, {}))
    return converted


def check_range(source: str, key: str, value: object, limits: dict) -> None:
    """Raise UserError unless a value, or each value of a list, is within the limits of its key.

    `limits` is {}, {one_of: [...]} or {from: lowest, to: highest}.
    """
    values = value if isinstance(value, list) else [value]
    for v in values:
        if "one_of" in limits and v not in limits["one_of"]:
            raise UserError(f"{source}: {key}: is {v}; allowed: {limits['one_of']}")
        if "from" in limits and not limits["from"] <= v <= limits["to"]:
            bounds = f"{limits['from']} to {limits['to']}"
            raise UserError(f"{source}: {key}: is {v}; allowed: {bounds}")


def parse_override(text: str) -> dict:
    """Parse a "key=value" string, the value in YAML, to {key: value}; UserError if it is none."""
    key, equals, value = text.partition("=")
    advice = "give key=value, as in --set batch_size=16"
    if equals:
        advice += """; a value with spaces needs quotes, as in SET="'loss={cross_entropy: 1}'\""""
    with reading(f"--set {text}", advice):
        if not equals:
            raise ValueError("there is no =")
        return {key: yaml.load(value, UniqueKeyLoader)}


def load_config(paths: list[Path], overrides: list[str] = ()) -> dict:
    """Resolve a config: a value for every key of configs/default.yaml, of the type it has there.

    Later `paths` win; the first names the experiment unless `name` is set. `overrides` are
    "key=value" strings and win over the files. UserError if a file cannot be read, or a key is
    unknown, of the wrong type or out of range.
    """
    files = [(str(path), read_yaml(Path(path))) for path in paths]  # of (source, its keys)
    on_command_line = [(f"--set {text}", parse_override(text)) for text in overrides]

    default = read_yaml(DEFAULT)
    allowed = read_yaml(ALLOWED)
    config = dict(default)
    for source, values in files + on_command_line:
        for key, value in values.items():
            config[key] = check_value(source, key, value, default, allowed)
    given = {}  # on the command line, in whatever order
    for _, values in on_command_line:
        given.update(values)
    config["group"] = pick_group(config, [values for _, values in files] + [given])
    if not config["name"]:
        config["name"] = Path(paths[0]).stem if paths else "default"
    return config


def pick_group(config: dict, layers: list[dict]) -> str:
    """Pick the `group` that belongs to the `images` of a config; later `layers` of keys win.

    A file with `images` describes other data: a group that was given before it does not fit them.
    UserError if splits are drawn at random and nobody said what stays together: images of one video
    in two splits would make every score look better than it is.
    """
    fits_images = False
    for values in layers:
        if "images" in values:
            fits_images = False
        if "group" in values:
            fits_images = True
    if fits_images:
        return config["group"]
    if "{split}" not in config["images"]:
        fix = "say what in a name stays together: '^[^_]+' (all before the first _), '' (nothing)"
        raise UserError(f"group: the splits are drawn at random; {fix}")
    return ""


def with_todays_keys(earlier: dict) -> dict:
    """Give the config of an earlier run today's keys, so that it can still be used.

    ValueError if it has a value of another type than today's.
    """
    require(earlier, {})
    default = load_config([])
    config = {}
    for key, value in default.items():
        config[key] = earlier.get(key, value)
    require(config, {key: type(value) for key, value in default.items()})
    return config


def read_run_config(run_dir: Path) -> dict:
    """Read the config of a run, with today's keys; UserError if it is damaged."""
    path = run_dir / "config.yaml"
    with reading(path, "train this run again"):
        return with_todays_keys(yaml.safe_load(path.read_text(encoding="utf-8")))


def dump(config: dict) -> str:
    """Format a config as YAML text that `load_config` reads back to the same values."""
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True, default_flow_style=None)


def data_override(folder: str) -> str:
    """Write --data FOLDER as an override, data="FOLDER", whatever signs the name has."""
    return f"data={json.dumps(folder, ensure_ascii=False)}"


def add_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add --config and --set, the same for every script that takes a config."""
    parser.add_argument(
        "--config",
        type=Path,
        nargs="+",
        default=[],
        required=required,
        metavar="FILE",
        help="YAML files; later ones win",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        nargs="+",
        default=[],
        action="extend",
        metavar="KEY=VALUE",
        help="values that win over the files",
    )


def note_overridden(paths: list[Path]) -> None:
    """Print which values of earlier files each file overrides."""
    given = {}  # key → (value, the file that gave it last)
    for path in paths:
        values = read_yaml(path)
        for key, value in values.items():
            # Another `images` is other data, whose `group` has nothing to do with that before.
            is_of_other_data = key == "group" and "images" in values
            if key in given and not is_of_other_data:
                before, source = given[key]
                if not is_same(before, value):
                    text = f"{path} overrides {key}: {before} of {source} or its base"
                    print(f"note: {text}", file=sys.stderr)
            given[key] = (value, path)


def is_same(value: object, other: object) -> bool:
    """Tell whether two configs, or two values of a key, are the same, in the same order.

    Python compares dicts without their order, but it decides which index a class has.
    """
    return str(value) == str(other)


def is_finished(run_dir: Path, config: dict, stamp: Path | None) -> bool:
    """Tell whether a run directory holds a finished run of a config, newer than a stamp file."""
    summary = run_dir / "summary.json"
    if not summary.exists() or not (run_dir / "config.yaml").exists():
        return False
    if stamp is not None and stamp.stat().st_mtime_ns > summary.stat().st_mtime_ns:
        return False
    return is_same(read_run_config(run_dir), config)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the resolved config.")
    add_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write it there, if it changed")
    parser.add_argument(
        "--finished",
        type=Path,
        metavar="RUN_DIR",
        help=f"exit with {UNFINISHED} unless a finished run of this config is there",
    )
    parser.add_argument("--since", type=Path, metavar="FILE", help="a finished run is newer")
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    text = dump(config)
    if args.out is None:
        sys.stdout.write(text)
    elif not args.out.exists() or args.out.read_text(encoding="utf-8") != text:
        note_overridden(args.config)
        write_atomically(args.out, text.encode())
    if args.finished is not None and not is_finished(args.finished, config, args.since):
        sys.exit(UNFINISHED)


if __name__ == "__main__":
    run(main)
