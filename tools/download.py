"""Fetch the Artificial Flying Objects data set, or read a local copy, into a folder.

    python data.py download --out data/afo [--archive FILE.zip]

Only PNGs of the known layout are taken from the archive, and they are written once their content
has a digest of `DIGESTS`: nothing else can be installed.
"""

import argparse
import io
import re
import zipfile
from hashlib import sha256
from pathlib import Path
from urllib.request import urlopen

from common import UserError, reading

from tools.generate import new_folder

REPOSITORY = "https://github.com/aksoyeren/ArtificialFlyingObjects"
URL = f"{REPOSITORY}/archive/790fd2b4879df409706ecd77edbd09564e13177c.zip"
DIGESTS = {  # training/validation/testing pairs: the full set, and half of the test sequences
    "cab3c8360e7ca46bcf8e4881cbb3222bbc2c13abab3bb4f5ea7044fd1a902bd9": "10,817/2,241/2,220 pairs",
    "b0a28cd560703cae8f233943237d6a813bd30487b743174dfc95a17af5a0b148": "10,817/2,241/1,138 pairs",
}
MEMBER = re.compile(r"(?s)(?:.*/)?((?:training|validation|testing)/(?:gt_)?image/\w+\.png)", re.A)
MAX_FILE = 1 << 14  # bytes of one PNG, or it is not read; the real ones have at most 1,472


def download(out: Path, archive: Path | None = None) -> str:
    """Create the data-set folder `out`, new or empty before; returns the digest of its content.

    `archive` is a zip to read instead of `URL`. UserError if it is unreadable or holds other files.
    """
    source = archive or URL
    with new_folder(out) as folder:
        with reading(source, "get it again, or give a local copy: AFO_ARCHIVE=file.zip"):
            if archive is None:
                print(f"fetching {URL} (28 MB)", flush=True)
                archive = io.BytesIO(urlopen(URL, timeout=30).read())  # seconds without a byte
            with zipfile.ZipFile(archive) as opened:
                small = [info for info in opened.infolist() if info.file_size <= MAX_FILE]
                matches = {info: MEMBER.fullmatch(info.filename) for info in small}
                pngs = {match[1]: opened.read(info) for info, match in matches.items() if match}
        lines = [f"{sha256(png).hexdigest()}  {name}\n" for name, png in sorted(pngs.items())]
        digest = sha256("".join(lines).encode()).hexdigest()
        if digest not in DIGESTS:
            raise UserError(f"{source}: holds other files, {digest}; use the original")
        for name, png in pngs.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(png)
    return digest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--archive", type=Path, metavar="FILE", help="a local zip, not the network")
    args = parser.parse_args()
    print(f"{args.out}: SHA-256 {download(args.out, args.archive)}")
