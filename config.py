"""Read a config: YAML files on top of configs/default.yaml, then key=value overrides.

    python config.py --config configs/tuned.yaml configs/quick.yaml --set batch_size=64

prints the resolved config. default.yaml has every key, by type; allowed.yaml has their ranges.
"""

import argparse
import difflib
import json
import sys
from pathlib import Path

from common import ROOT, UserError, reading, run, write_atomically

import yaml

DEFAULT, ALLOWED = ROOT / "configs/default.yaml", ROOT / "configs/allowed.yaml"


def read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict:
    """Read the keys of a YAML file on top of those of its `base`."""
    path = path.resolve()
    with reading(path, "a config holds 'key: value' lines, as configs/default.yaml does"):
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        base = values.pop("base", None)
        # default.yaml is below everything anyway; on top of other files it would undo them
        if base is None or (path.parent / base).resolve() == DEFAULT:
            return values
        if path in above:
            raise UserError(f"{path}: base: leads back to this file; remove one `base`")
        return read_yaml(path.parent / base, (*above, path)) | values


def convert(value: object, example: object) -> object:
    """Return a value as the type of an example; ValueError if it is of another one."""
    if isinstance(example, list) and example and not isinstance(example[0], list):
        return [convert(v, e) for v, e in zip(value, example, strict=True)]  # of one length
    if isinstance(example, float) and type(value) in (int, str):
        value = float(value)  # YAML reads 1 as a whole number, and 1e-3 as text
    if type(value) is not type(example) or value != value:
        raise ValueError
    return value


def check_value(source: str, key: str, value: object, default: dict, allowed: dict) -> object:
    """Return the value of a key as the type it has in default.yaml; UserError if it is none."""
    if key not in default:
        close = difflib.get_close_matches(str(key), default, n=1, cutoff=0)
        raise UserError(f"{source}: unknown key '{key}'; did you mean '{close[0]}'?")
    try:
        converted = convert(value, default[key])
    except (TypeError, ValueError):
        example = json.dumps(default[key])
        raise UserError(f"{source}: {key}: {value!r}; write it as in '{key}: {example}'") from None
    low, high, choices = (allowed.get(key, {}).get(limit) for limit in ("from", "to", "one_of"))
    for v in converted if isinstance(converted, list) else [converted]:
        if (choices and v not in choices) or (low is not None and not low <= v <= high):
            said = choices or f"{low} to {high}"
            raise UserError(f"{source}: {key}: is {value}; allowed: {said}")
    return converted


def load_config(paths: list[Path], overrides: list[str] = ()) -> dict:
    """Resolve a config: a value for every key of configs/default.yaml, of the type it has there.

    Later `paths` win; the first names the experiment unless `name` is set. `overrides` are
    "key=value" strings, the values in YAML, and win over the files. UserError if a file cannot be
    read, or a key is unknown, of the wrong type or out of range.
    """
    default, allowed = read_yaml(DEFAULT), read_yaml(ALLOWED)
    layers = [(str(path), read_yaml(Path(path))) for path in paths]
    for text in overrides:
        key, _, value = text.partition("=")
        with reading(f"--set {text}", "give key=value, as in --set batch_size=16"):
            layers.append((f"--set {text}", {key: yaml.safe_load(value)}))
    config = dict(default)
    for source, values in layers:
        for key, value in values.items():
            config[key] = check_value(source, key, value, default, allowed)
    if "{split}" not in config["images"] and not any("group" in values for _, values in layers):
        fix = "say what in a name stays together: '^[^_]+' (all before the first _), '' (nothing)"
        raise UserError(f"group: the splits are chosen at random; {fix}")
    config["name"] = config["name"] or (Path(paths[0]).stem if paths else "default")
    return config


def dump(config: dict) -> str:
    """Format a config as YAML text that `load_config` reads back to the same values."""
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True, default_flow_style=None)


def add_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add --config and --set, the same for every script that takes a config."""
    files = {"type": Path, "nargs": "+", "default": [], "metavar": "FILE"}
    parser.add_argument("--config", required=required, help="later files win", **files)
    pairs = {"nargs": "+", "default": [], "metavar": "KEY=VALUE", "action": "extend"}
    parser.add_argument("--set", dest="overrides", **pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the resolved config.")
    add_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write it there, if it changed")
    args = parser.parse_args()
    text = dump(load_config(args.config, args.overrides))
    if not args.out:
        sys.stdout.write(text)
    elif not args.out.exists() or args.out.read_text(encoding="utf-8") != text:
        for first, last in zip(args.config, args.config[1:], strict=False):
            was, now = read_yaml(first), read_yaml(last)
            if lost := [f"{key}: {was[key]}" for key in now if was.get(key, now[key]) != now[key]]:
                print(f"note: {last} overrides {', '.join(lost)} of {first}", file=sys.stderr)
        write_atomically(args.out, text.encode())


if __name__ == "__main__":
    run(main)
