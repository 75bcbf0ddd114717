"""Fetch the Artificial Flying Objects data set, or read a local copy, into a folder.

    python data.py download --out data/afo [--archive FILE.zip]

Only PNGs of the known layout are taken from the archive, to paths of known parts, and the folder
gets its name once its content has a digest of `DIGESTS`: nothing else can be installed.
"""

import argparse
import hashlib
import re
import shutil
import zipfile
from pathlib import Path
from urllib.request import urlopen

from common import UserError, reading

from tqdm import tqdm

REPOSITORY = "https://github.com/aksoyeren/ArtificialFlyingObjects"
URL = f"{REPOSITORY}/archive/790fd2b4879df409706ecd77edbd09564e13177c.zip"
DIGESTS = {  # training/validation/testing pairs: the full set, and half of the test sequences
    "cab3c8360e7ca46bcf8e4881cbb3222bbc2c13abab3bb4f5ea7044fd1a902bd9": "10,817/2,241/2,220 pairs",
    "b0a28cd560703cae8f233943237d6a813bd30487b743174dfc95a17af5a0b148": "10,817/2,241/1,138 pairs",
}
MEMBER = re.compile(r"(?s)(?:.*/)?((?:training|validation|testing)/(?:gt_)?image/\w+\.png)", re.A)
TIMEOUT = 30  # seconds without a byte before a connection counts as cut
MAX_FILE = 1 << 20  # bytes of one PNG; the real ones have at most 1,472


def download(out: Path, archive: Path | None = None) -> str:
    """Create the data-set folder `out`; returns the `folder_digest` of its content.

    Args:
        out: a new or empty folder; it appears only when all is there.
        archive: a local zip to read instead of fetching `URL`.

    Raises:
        UserError: the archive cannot be read, or holds something else.
    """
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    if out.exists():
        raise UserError(f"{out}: is there already; remove it or give another --out")
    fetched, unpacked = (Path(f"{out}.{kind}.partial") for kind in ("zip", "folder"))
    shutil.rmtree(unpacked, ignore_errors=True)  # left by a process that was killed
    unpacked.mkdir(parents=True)
    try:
        if archive is None:
            with reading(URL, "try later, or give a local copy: AFO_ARCHIVE=file.zip"):
                fetch(fetched)
        with reading(archive or URL, "get the archive again"):
            unpack(archive or fetched, unpacked)
        digest = folder_digest(unpacked)
        if digest not in DIGESTS:
            raise UserError(f"{archive or URL}: holds other files, {digest}; use the original")
        unpacked.rename(out)
    finally:
        fetched.unlink(missing_ok=True)
        shutil.rmtree(unpacked, ignore_errors=True)
    return digest


def fetch(path: Path) -> None:
    """Download `URL` to a file."""
    with urlopen(URL, timeout=TIMEOUT) as response, path.open("wb") as file:
        options = {"desc": "download", "total": response.length, "disable": None}
        with tqdm.wrapattr(response, "read", **options) as body:
            shutil.copyfileobj(body, file)


def unpack(archive: Path, folder: Path) -> None:
    """Write the PNGs of an archive below a folder; ValueError if one is too large."""
    with zipfile.ZipFile(archive) as opened:
        for info in tqdm(opened.infolist(), "unpack", unit="file", disable=None):
            if match := MEMBER.fullmatch(info.filename):
                with opened.open(info) as member:
                    png = member.read(MAX_FILE + 1)  # the size in the header can lie
                if len(png) > MAX_FILE:
                    raise ValueError(f"{info.filename} is too large")
                path = folder / match[1]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png)


def folder_digest(folder: Path) -> str:
    """Hash the `<SHA-256>  <relative path>` lines of all PNGs in a folder, sorted by path."""
    digest = hashlib.sha256()
    for name in sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png")):
        png = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        digest.update(f"{png}  {name}\n".encode())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--archive", type=Path, metavar="FILE", help="a local zip, not the network")
    args = parser.parse_args()
    print(f"{args.out}: SHA-256 {download(args.out, args.archive)}")
