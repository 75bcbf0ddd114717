"""Fetch the Artificial Flying Objects data set, or read a local copy, into a folder.

An archive is not trusted: only PNGs of the known layout are taken from it, their target paths
are built from checked parts, and the folder gets its name once its digest is the expected one.
"""

import hashlib
import http.client
import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tqdm import tqdm

from errors import UserError

REPOSITORY = "https://github.com/aksoyeren/ArtificialFlyingObjects"
URL = f"{REPOSITORY}/archive/790fd2b4879df409706ecd77edbd09564e13177c.zip"
DIGESTS = {  # training/validation/testing pairs: the full set, and half of the test sequences
    "cab3c8360e7ca46bcf8e4881cbb3222bbc2c13abab3bb4f5ea7044fd1a902bd9": "10,817/2,241/2,220 pairs",
    "b0a28cd560703cae8f233943237d6a813bd30487b743174dfc95a17af5a0b148": "10,817/2,241/1,138 pairs",
}

TIMEOUT = 30  # seconds without a byte before a connection counts as cut
BLOCK = 1 << 16  # bytes read from the network at most at once
MAX_FILE = 1 << 20  # bytes in one PNG; the real ones have at most 1,472
MAX_TOTAL = 1 << 30  # bytes in an archive, and in all PNGs of one
MAX_MEMBERS = 60_000  # the real archive has about 31,000
# What zipfile raises for damaged and crafted archives, besides OSError for seeks to nowhere.
BAD_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError)

# (prefix, path in the data set)
MEMBER = re.compile(r"(?sa)(.*/|)((?:training|validation|testing)/(?:gt_)?image/\w+\.png)")
# Absolute, a drive letter, a backslash, a NUL (which zipfile cuts names at), a `..` component.
UNSAFE = re.compile(r"^/|^[A-Za-z]:|\\|\0|(?:^|/)\.\.(?:/|$)")


def download(
    out: Path, archive: Path | None = None, url: str = URL, digest: str | None = None
) -> str:
    """Create the data-set folder `out` and return the `folder_digest` of its contents.

    `archive` is a local zip to read instead of fetching `url`; contents must have `digest`, by
    default one of `DIGESTS`. A download cut short stays in `<out>.zip.partial` to be resumed.
    Raises UserError for an archive that is unreachable, unsafe or other, or an unusable `out`.
    """
    expected = list(DIGESTS) if digest is None else [digest.lower()]
    if not re.fullmatch("[0-9a-f]{64}", expected[0]):
        raise UserError(f"--digest {digest!r}: not a SHA-256: give 64 hexadecimal digits")
    try:
        out = out.resolve()
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()  # not every system renames over a folder
        if out.exists():
            raise UserError(f"{out}: exists already: remove it or give another --out")
        out.parent.mkdir(parents=True, exist_ok=True)
        if archive is not None:
            return install(archive, str(archive), out, expected)
        partial = Path(f"{out}.zip.partial")
        fetch(url, partial)
        try:
            return install(partial, url, out, expected)
        finally:
            for path in (partial, Path(f"{partial}.etag")):
                path.unlink(missing_ok=True)  # used, or of no use: the next run starts clean
    except OSError as error:
        raise UserError(f"{error.filename or out}: {reason(error)}: change that or --out") from None


def folder_digest(folder: Path) -> str:
    """Return the SHA-256 over `<SHA-256>  <relative path>` lines of all PNGs, sorted by path."""
    names = sorted(path.relative_to(folder).as_posix().encode() for path in folder.rglob("*.png"))
    digest = hashlib.sha256()
    for name in names:
        png = (folder / name.decode()).read_bytes()
        digest.update(hashlib.sha256(png).hexdigest().encode() + b"  " + name + b"\n")
    return digest.hexdigest()


def reason(error: Exception) -> str:
    """Return what an exception says, in one line without file names."""
    text = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
    return " ".join(str(text).split()) or type(error).__name__


def install(archive: Path, source: str, out: Path, expected: list[str]) -> str:
    """Unpack `archive`, which errors call `source`, beside `out`; rename it if it is right."""
    staging = Path(f"{out}.partial")
    if staging in archive.resolve().parents:
        raise UserError(f"{source}: {staging} will be cleared: move the file elsewhere")
    shutil.rmtree(staging, ignore_errors=True)  # left by a run that was killed
    try:
        for name, png in read_pngs(archive, source):
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            with (staging / name).open("xb") as file:
                file.write(png)
        found = folder_digest(staging)
        if found not in expected:
            wanted = f"expected digest {' or '.join(expected)}, found {found}"
            raise UserError(f"{source}: {wanted}: use the original archive or another --digest")
        staging.rename(out)
        return found
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def read_pngs(archive: Path, source: str) -> Iterator[tuple[str, bytes]]:
    """Yield (path in the data set, contents) of each PNG; UserError if the archive is bad."""
    total = 0
    try:
        if archive.stat().st_size > MAX_TOTAL:
            raise UserError(f"{source}: over {MAX_TOTAL:,} bytes: use the original archive")
        with zipfile.ZipFile(archive) as opened:
            members = select_members(opened.infolist(), source)
            for name, info in tqdm(members, "unpack", unit=" files", leave=False, disable=None):
                with opened.open(info) as member:
                    png = member.read(MAX_FILE + 1)  # not the size in the header: it can lie
                total += len(png)
                if len(png) > MAX_FILE or total > MAX_TOTAL:
                    raise UserError(f"{source}: {name} is too large: use the original archive")
                yield name, png
    except (*BAD_ZIP, OSError) as error:
        raise UserError(f"{source}: no readable zip ({reason(error)}): get it again") from None


def select_members(infos: list[zipfile.ZipInfo], source: str) -> list[tuple[str, zipfile.ZipInfo]]:
    """Return (path in the data set, member) of the PNGs; UserError if any member is suspect."""
    if len(infos) > MAX_MEMBERS:
        raise UserError(f"{source}: over {MAX_MEMBERS:,} members: use the original archive")
    seen, prefixes, members = set(), set(), []
    for info in infos:
        path = info.orig_filename  # as stored; zipfile has altered .filename
        kind = stat.S_IFMT(info.external_attr >> 16)
        for suspect, problem in (
            (UNSAFE.search(path), "has an unsafe path"),
            (kind not in (0, stat.S_IFREG, stat.S_IFDIR), "is a link or special file"),
            (info.flag_bits & 1, "is encrypted"),
            (info.compress_type not in (0, zipfile.ZIP_DEFLATED), "is not stored or deflated"),
            (path in seen, "is a duplicate"),
        ):
            if suspect:
                raise UserError(f"{source}: member {path!r} {problem}: use the original archive")
        seen.add(path)
        if match := MEMBER.fullmatch(path):
            prefixes.add(match[1])
            members.append((match[2], info))
    if len(prefixes) != 1:
        raise UserError(f"{source}: {len(prefixes)} data sets, not 1: use the original archive")
    return members


class SafeRedirects(HTTPRedirectHandler):
    """Follow redirects to allowed addresses only."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        check_url(newurl, req.type)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def check_url(url: str, before: str = "http") -> None:
    """Raise UserError unless `url` is https, or http on this machine and never https `before`."""
    scheme, host = urlsplit(url).scheme, urlsplit(url).hostname
    local = before == scheme == "http" and host in ("127.0.0.1", "::1", "localhost")
    if not local and not (scheme == "https" and host):
        raise UserError(f"{url}: only https:// is read: give another --url or --archive FILE.zip")


def connect(url: str, start: int = 0, etag: str = "") -> http.client.HTTPResponse | HTTPError:
    """Return the response to a GET from byte `start` on; 416, no such range, is one too."""
    headers = {"Range": f"bytes={start}-"} if start else {}
    if headers and etag:
        headers["If-Range"] = etag  # a file changed since then is sent whole
    try:
        check_url(url)
        return build_opener(SafeRedirects).open(Request(url, headers=headers), timeout=TIMEOUT)
    except (OSError, http.client.HTTPException, ValueError) as error:
        code = f"HTTP {error.code} " if isinstance(error, HTTPError) else ""
        if start and code == "HTTP 416 ":
            return error
        raise UserError(f"{url}: {code}{reason(error)}: check the address or try later") from None


def fetch(url: str, partial: Path) -> None:
    """Download `url` to `partial`, from where an earlier call was cut if the server can."""
    have = partial.stat().st_size if partial.exists() else 0
    etag = Path(f"{partial}.etag")
    response = connect(url, have, etag.read_text() if etag.exists() else "")
    content_range = response.headers.get("Content-Range", "")
    part = re.fullmatch(rf"bytes {have}-\d+/(\d{{1,18}})", content_range)
    if response.status == 416 or (response.status == 206 and not part):
        response.close()
        response = connect(url)  # what was kept is of no use
    if response.status == 206 and part:
        total = int(part[1])
    else:
        have, total = 0, response.length  # None where the server does not say
        etag.write_text(response.headers.get("ETag", ""))
    bar = tqdm(desc="download", total=total, initial=have, unit="B", unit_scale=True, disable=None)
    block = b""
    with response, partial.open("ab" if have else "wb") as file, bar:
        while have != total and have <= MAX_TOTAL:
            try:
                block = response.read1(BLOCK)
            except (OSError, http.client.HTTPException):
                block = None
            if not block:
                break
            file.write(block)
            have += len(block)
            bar.update(len(block))
    if block is None or have < min(total or 0, MAX_TOTAL):
        size = f"{have} of {total or 'unknown'} bytes"
        raise UserError(f"{url}: connection cut after {size}: run the command again to resume")
