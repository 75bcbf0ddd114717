"""Write a stamp that changes when a data set may have changed, for make to compare.

    python -m tools.stamp DIR --out FILE
    python -m tools.stamp --config my.yaml --out FILE

The stamp is a digest of the names, sizes and times of all files below the data's folder. FILE is
written only if the stamp is another one, so that make sees by its time when the data changed.
"""

import argparse
import os
from hashlib import sha256
from pathlib import Path

from common import UserError, run, write_atomically
from config import load_config


def stamp_of(folder: Path) -> str:
    """Compute the digest of names, sizes and times of the files below a folder.

    Hidden files and folders do not count, nor does the cache among them. UserError if there is no
    such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; run make data, or set `data`")
    digest = sha256()
    seen = set()  # a link may lead back to a folder above it
    for path, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(path) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(path))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                status = os.stat(os.path.join(path, name))
                digest.update(f"{path}/{name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", type=Path, metavar="DIR", help="the folder of the data")
    parser.add_argument("--config", type=Path, metavar="FILE", help="or a config that names it")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    folder = args.data
    if args.config is not None:
        folder = Path(load_config([args.config])["data"]).expanduser()
    stamp = stamp_of(folder) + "\n"
    if not args.out.exists() or args.out.read_text(encoding="utf-8") != stamp:
        write_atomically(args.out, stamp.encode())


if __name__ == "__main__":
    run(main)
