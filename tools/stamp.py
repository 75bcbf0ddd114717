"""Write a stamp that changes when a data set may have changed, for make to compare.

    python -m tools.stamp DIR --out FILE [--set key=value ...]
    python -m tools.stamp --config my.yaml --out FILE [--set key=value ...]

The stamp is a digest of the names, sizes and times of the images and masks. FILE is written only if
the stamp is another one, so that make sees by its time when the data changed.
"""

import argparse
import os
from hashlib import sha256
from pathlib import Path

from common import UserError, reading, run, write_atomically
from config import data_override, load_config
from patterns import find_files


def stamp_of(config: dict) -> str:
    """Compute the digest of names, sizes and times of the images and masks of all splits.

    UserError if there is no such folder. It does not use pairs.py, which imports torch: make calls
    this each time, and it should take no seconds.
    """
    root = Path(config["data"]).expanduser()
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; run make data, or set `data`")
    patterns = set()
    for folder in config["split_folders"]:
        for key in ("images", "masks"):
            patterns.add(config[key].replace("{split}", folder))
    digest = sha256()
    for pattern in sorted(patterns):
        for file in find_files(root, pattern):
            with reading(file.path):  # a link may lead nowhere
                status = file.path.stat()
            digest.update(os.fsencode(file.path))
            digest.update(f" {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", metavar="DIR", help="the folder of the data")
    parser.add_argument("--config", type=Path, metavar="FILE", help="or a config that names it")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="as for train.py")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    paths = [] if args.config is None else [args.config]
    overrides = [] if args.data is None else [data_override(args.data)]
    stamp = stamp_of(load_config(paths, overrides + args.set)) + "\n"
    if not args.out.exists() or args.out.read_text(encoding="utf-8") != stamp:
        write_atomically(args.out, stamp.encode())


if __name__ == "__main__":
    run(main)
