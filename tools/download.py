"""Download the Artificial Flying Objects data set, or read a local copy of it.

    python data.py download --out data/afo [--archive FILE.zip]

Only PNGs of the known layout are taken from the archive, and they are written only if their content
has a digest of `DIGESTS`: nothing else can be installed.
"""

import argparse
import io
import re
import zipfile
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO
from urllib.request import urlopen

from common import UserError, reading, user_path
from tools.generate import new_folder

REPOSITORY = "https://github.com/aksoyeren/ArtificialFlyingObjects"
URL = f"{REPOSITORY}/archive/790fd2b4879df409706ecd77edbd09564e13177c.zip"
DIGESTS = {  # training/validation/testing pairs: the full set, and half of the test sequences
    "cab3c8360e7ca46bcf8e4881cbb3222bbc2c13abab3bb4f5ea7044fd1a902bd9": "10,817/2,241/2,220 pairs",
    "b0a28cd560703cae8f233943237d6a813bd30487b743174dfc95a17af5a0b148": "10,817/2,241/1,138 pairs",
}
MEMBER = re.compile(r"(?s)(?:.*/)?((?:training|validation|testing)/(?:gt_)?image/\w+\.png)", re.A)
MAX_FILE_BYTES = 1 << 14  # a larger file is not read; the real PNGs have at most 1,472
TIMEOUT = 30  # seconds without a byte


def read_pngs(archive: Path | BinaryIO) -> dict[str, bytes]:
    """Read the PNGs of the known layout from a zip: path below the data folder → content."""
    pngs = {}
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            match = MEMBER.fullmatch(info.filename)
            if match and info.file_size <= MAX_FILE_BYTES:
                pngs[match[1]] = opened.read(info)
    return pngs


def digest_of(pngs: dict[str, bytes]) -> str:
    """Compute the SHA-256 of the lines that sha256sum would print for the files, sorted by path."""
    lines = [f"{sha256(png).hexdigest()}  {name}\n" for name, png in sorted(pngs.items())]
    return sha256("".join(lines).encode()).hexdigest()


def download(out: Path, archive: Path | None = None) -> str:
    """Create the data-set folder `out`, new or empty before; returns the digest of its content.

    `archive` is a zip to read instead of `URL`. UserError if it is unreadable or holds other files.
    """
    source = archive or URL
    with new_folder(out) as folder:
        with reading(source, "get it again, or give a local copy: AFO_ARCHIVE=file.zip"):
            if archive is None:
                print(f"fetching {URL} (28 MB)", flush=True)
                archive = io.BytesIO(urlopen(URL, timeout=TIMEOUT).read())
            pngs = read_pngs(archive)
        digest = digest_of(pngs)
        if digest not in DIGESTS:
            raise UserError(f"{source}: holds other files (SHA-256 {digest}); use the original")
        for name, png in pngs.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(png)
    return digest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python data.py download`."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    local = "read this zip instead of the network"
    parser.add_argument("--archive", type=user_path, metavar="FILE", help=local)


def main(args: argparse.Namespace) -> None:
    digest = download(args.out, args.archive)
    print(f"{args.out}: {DIGESTS[digest]}, SHA-256 {digest}")
