"""download.py against a server on this machine and against damaged and hostile archives."""

import hashlib
import http.server
import io
import random
import re
import stat
import threading
import urllib.request
import zipfile
from pathlib import Path
from unittest.mock import Mock

import pytest

import download
from errors import UserError


def png(seed: int) -> bytes:
    """What stands for a PNG: noise, so that the archive does not compress to nothing."""
    return random.Random(seed).randbytes(1800)


NAME = "000001_square_red_000001.png"
PNGS = {
    f"{split}/{folder}/{prefix}{NAME}": png(2 * i + j)
    for i, split in enumerate(("training", "validation", "testing"))
    for j, (folder, prefix) in enumerate((("image", ""), ("gt_image", "gt_")))
}
DIGEST = hashlib.sha256(
    "".join(f"{hashlib.sha256(PNGS[n]).hexdigest()}  {n}\n" for n in sorted(PNGS)).encode()
).hexdigest()
REPOSITORY = "ArtificialFlyingObjects-0123abc/"
PREFIX = REPOSITORY + "data/FlyingObjectDataset_10K/"
OTHERS = [REPOSITORY + name for name in ("", "README.md", "logs/image/gen_1.png")]
OTHERS += [PREFIX + name for name in (".DS_Store", "testing/.DS_Store")]


def archive_bytes(*extra, pngs=PNGS, prefix=PREFIX, method=zipfile.ZIP_DEFLATED) -> bytes:
    """A zip with the data set, the other files and `extra`, pairs of (name or ZipInfo, data)."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as opened:
        for name in OTHERS:
            opened.writestr(name, b"not of the data set" if name[-1] != "/" else b"")
        for name, data in [*((prefix + n, d) for n, d in pngs.items()), *extra]:
            opened.writestr(name, data)
    return file.getvalue()


ARCHIVE = archive_bytes()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.body` the way the test has set it up, and notes what was asked and sent."""

    def do_GET(self):
        server, body = self.server, self.server.body
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = self.headers.get("If-Range", server.etag) == server.etag
        status, headers = server.status, {"ETag": server.etag, **server.headers}
        if status == 200 and asked and same and server.ranges:
            start = int(asked[1])
            status = 206 if start < len(body) else 416
            headers["Content-Range"] = f"bytes {start + server.shift}-{len(body) - 1}/{len(body)}"
            body = body[start:]
        if server.chunked:
            headers["Transfer-Encoding"] = "chunked"
        elif server.length:
            headers["Content-Length"] = len(body)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts else None
        sent = body[:cut]
        server.log.append((self.headers.get("Range"), len(sent)))
        if server.chunked:
            sent = b"%x\r\n%s\r\n" % (len(sent), sent) + (b"0\r\n\r\n" if cut is None else b"")
        self.wfile.write(sent)
        if server.stall:
            self.wfile.flush()
            server.stall.wait(5)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.body, server.status, server.headers, server.etag = ARCHIVE, 200, {}, '"v1"'
        server.length, server.chunked, server.ranges, server.shift = True, False, True, 0
        server.cuts, server.stall = [], None  # bytes to cut the next responses after; when to go on
        server.log = []  # what was asked for and how much was sent
        server.url = f"http://127.0.0.1:{server.server_port}/archive.zip"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def check_data(out: Path) -> None:
    """`out` is the data set, and nothing else lies beside it."""
    files = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert files == PNGS
    assert sorted(p.name for p in out.parent.iterdir()) == [out.name]


def refused(out: Path, match: str, **arguments) -> str:
    """The one-line message of the UserError that `download` must raise."""
    with pytest.raises(UserError, match=match) as caught:
        download.download(out, **{"digest": DIGEST, **arguments})
    message = str(caught.value)
    assert "\n" not in message
    assert not out.exists()
    assert not Path(f"{out}.partial").exists()
    return message


@pytest.mark.parametrize("how", ["length", "chunked", "until closed"])
def test_fetches_the_data_set(server, tmp_path, how):
    server.chunked, server.length = how == "chunked", how == "length"
    out = tmp_path / "data" / "afo"
    assert download.download(out, url=server.url, digest=DIGEST.upper()) == DIGEST
    check_data(out)


def test_digest_is_a_known_one_or_the_given_one(server, tmp_path, monkeypatch):
    refused(tmp_path / "afo", "not a SHA-256", url=server.url, digest="cab3c8")
    assert server.log == []
    message = refused(tmp_path / "afo", "expected digest", url=server.url, digest="0" * 64)
    assert server.url in message and "0" * 64 in message and DIGEST in message
    assert list(tmp_path.iterdir()) == []
    message = refused(tmp_path / "afo", "expected digest", url=server.url, digest=None)
    assert DIGEST in message and all(known in message for known in download.DIGESTS)
    monkeypatch.setitem(download.DIGESTS, DIGEST, "the set of these tests")
    download.download(tmp_path / "afo", url=server.url)
    check_data(tmp_path / "afo")


@pytest.mark.parametrize("how", ["with an ETag", "without an ETag", "without a length"])
def test_cut_download_is_resumed(server, tmp_path, how):
    server.etag = '"v1"' if how == "with an ETag" else ""
    server.chunked = how == "without a length"
    server.cuts = [100, 50]
    for have, known in ((100, not server.chunked), (150, True)):  # a range tells the length
        message = refused(tmp_path / "afo", "again to resume", url=server.url)
        total = len(ARCHIVE) if known else "unknown"
        assert server.url in message and f"{have} of {total} bytes" in message
        assert (tmp_path / "afo.zip.partial").read_bytes() == ARCHIVE[:have]
    download.download(tmp_path / "afo", url=server.url, digest=DIGEST)
    assert server.log[:2] == [(None, 100), ("bytes=100-", 50)]
    assert server.log[2:] == [("bytes=150-", len(ARCHIVE) - 150)]
    check_data(tmp_path / "afo")


@pytest.mark.parametrize(
    ("kept", "change", "asked"),
    [
        (100, {"ranges": False}, [None, "bytes=100-"]),
        (100, {"etag": '"v2"'}, [None, "bytes=100-"]),  # another file by now
        (100, {"shift": 1}, [None, "bytes=100-", None]),  # not the range that was asked for
        (99_999, {}, [None, "bytes=99999-", None]),  # longer than the file
    ],
)
def test_cut_download_that_cannot_be_resumed_starts_again(server, tmp_path, kept, change, asked):
    server.body, server.cuts = b"x" * 100_000, [kept]
    refused(tmp_path / "afo", f"cut after {kept} of 100000 bytes", url=server.url)
    server.body = ARCHIVE
    vars(server).update(change)
    download.download(tmp_path / "afo", url=server.url, digest=DIGEST)
    assert [start for start, _ in server.log] == asked
    assert server.log[-1][1] == len(ARCHIVE)
    check_data(tmp_path / "afo")


def test_stalled_server_counts_as_cut(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.cuts, server.stall = [10], threading.Event()
    refused(tmp_path / "afo", f"cut after 10 of {len(ARCHIVE)} bytes", url=server.url)
    server.stall.set()


def test_bad_partial_is_deleted(server, tmp_path):
    server.body, server.cuts, server.etag = b"x" * 9000, [8000], ""  # nothing tells the two apart
    refused(tmp_path / "afo", "cut after", url=server.url)
    server.body = ARCHIVE
    refused(tmp_path / "afo", "no readable zip", url=server.url)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("chunked", [True, False])
def test_endless_download_is_stopped(server, tmp_path, monkeypatch, chunked):
    monkeypatch.setattr(download, "MAX_TOTAL", 2000)
    monkeypatch.setattr(download, "BLOCK", 512)
    server.body, server.chunked = b"x" * 100_000, chunked
    refused(tmp_path / "afo", "over 2,000 bytes", url=server.url)
    assert list(tmp_path.iterdir()) == []


def test_http_error_and_refused_connection(server, tmp_path):
    server.status = 500
    assert server.url in refused(tmp_path / "afo", "HTTP 500 ", url=server.url)
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}/"
    assert url in refused(tmp_path / "afo", "refused", url=url)
    assert list(tmp_path.iterdir()) == []


URLS = ["http://example.com/a.zip", "http://127.0.0.1.example.com/", "http://127.0.0.1@x.com/"]
URLS += ["ftp://example.com/a.zip", "file:///etc/hosts", "https:///a.zip", "https://[/a.zip"]
URLS += ["https://127.0.0.1:port/", "http://127.0.0.1/ "]


@pytest.mark.parametrize("url", [*URLS, "a.zip"])
def test_bad_addresses(tmp_path, url):
    refused(tmp_path / "afo", "only https|check the address", url=url)


@pytest.mark.parametrize("url", URLS)
def test_redirect_to_a_bad_address(server, tmp_path, url):
    server.status, server.headers = 302, {"Location": url}
    refused(tmp_path / "afo", "only https|HTTP 302|check the address", url=server.url)


def test_redirects_never_leave_https():
    def redirect(source, target):
        request = urllib.request.Request(source, headers={"Range": "bytes=5-"})
        return download.SafeRedirects().redirect_request(request, None, 302, "", {}, target)

    for target in ("http://127.0.0.1/a.zip", "http://example.com/a.zip", "file:///etc/hosts"):
        with pytest.raises(UserError, match="only https"):
            redirect("https://example.com/a.zip", target)
    followed = redirect("https://example.com/a.zip", "https://example.org/b.zip")
    assert followed.full_url == "https://example.org/b.zip"
    assert followed.get_header("Range") == "bytes=5-"


@pytest.fixture
def box(tmp_path):
    """A folder two levels down, so that what escapes from it is seen in `tmp_path`."""
    box = tmp_path / "a" / "b"
    box.mkdir(parents=True)
    return box


def refused_archive(box: Path, data: bytes, match: str) -> str:
    """The message for an archive with contents `data`, which stays the only file anywhere."""
    archive = box / "local.zip"
    archive.write_bytes(data)
    message = refused(box / "afo", match, archive=archive)
    assert str(archive) in message
    assert [p for p in box.parent.parent.rglob("*") if not p.is_dir()] == [archive]
    assert archive.read_bytes() == data
    return message


@pytest.mark.parametrize("prefix", [PREFIX, "FlyingObjectDataset_10K/", "", "training/image/"])
def test_local_archive(box, prefix):
    archive, data = box / "local.zip", archive_bytes(prefix=prefix)
    archive.write_bytes(data)
    (box / "out" / "afo.partial" / "left").mkdir(parents=True)  # by a run that was killed
    (box / "out" / "afo").mkdir()  # an empty folder is no obstacle
    assert download.download(box / "out" / "afo", archive, digest=DIGEST) == DIGEST
    check_data(box / "out" / "afo")
    assert archive.read_bytes() == data


TESTING = PREFIX + "testing/image/"
UNSAFE = ["../evil.png", "../../evil.png", "/testing/image/evil.png", "C:/testing/image/evil.png"]
UNSAFE += ["..\\evil.png", PREFIX + "testing\\image\\evil.png", PREFIX + ".."]


@pytest.mark.parametrize("name", [*UNSAFE, TESTING + "../../../../../evil.png"])
def test_unsafe_paths(box, name):
    assert repr(name) in refused_archive(box, archive_bytes((name, png(9))), "unsafe path")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
@pytest.mark.parametrize("name", [TESTING + "link.png", "link"])
def test_links_and_special_files(box, kind, name):
    info = zipfile.ZipInfo(name)
    info.external_attr = (kind | 0o777) << 16
    refused_archive(box, archive_bytes((info, "../../../../evil")), "link or special file")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", [TESTING + NAME, "README.md"])
def test_duplicates(box, name):
    data = archive_bytes((name, png(9)), (name, png(9)))
    assert repr(name) in refused_archive(box, data, "duplicate")


def test_too_large_or_too_many(box, monkeypatch):
    monkeypatch.setattr(download, "MAX_TOTAL", len(ARCHIVE))
    refused_archive(box, archive_bytes(pngs={name: bytes(5000) for name in PNGS}), "too large")
    monkeypatch.setattr(download, "MAX_MEMBERS", len(OTHERS))
    refused_archive(box, ARCHIVE, "members")


SIZE = len(next(iter(PNGS.values()))).to_bytes(4, "little")
BOMB = TESTING + "bomb.png", bytes(download.MAX_FILE + 1)
NUL = archive_bytes((TESTING + "evil.png~.txt", b"")).replace(b"evil.png~", b"evil.png\0")
ENCRYPTED = ARCHIVE.replace(b"PK\1\2\x14\3\x14\0\0\0", b"PK\1\2\x14\3\x14\0\1\0")
CHANGED = archive_bytes(method=zipfile.ZIP_STORED).replace(png(4), png(4)[:-20] + bytes(20))
BAD = {
    "NUL in a path": (NUL, "unsafe path"),
    "encrypted": (ENCRYPTED, "encrypted"),
    "bzip2": (archive_bytes(method=zipfile.ZIP_BZIP2), "not stored or deflated"),
    "no data set": (archive_bytes(pngs={}), "0 data sets"),
    "two data sets": (archive_bytes(("copy/testing/image/" + NAME, b"")), "2 data sets"),
    "large file": (archive_bytes(BOMB), r"testing/image/bomb\.png is too large"),
    "wrong size in headers": (ARCHIVE.replace(SIZE, b"\n\0\0\0"), "Bad CRC|expected digest"),
    "changed member": (CHANGED, "Bad CRC"),
    "half": (ARCHIVE[: len(ARCHIVE) // 2], "no readable zip"),
    "cut by a byte": (ARCHIVE[:-1], "no readable zip"),
    "page": (b"<html>", "no readable zip"),
    "empty": (b"", "no readable zip"),
}


@pytest.mark.parametrize(("data", "match"), BAD.values(), ids=BAD)
def test_bad_archives(box, data, match):
    refused_archive(box, data, match)


def test_no_archive(box):
    for archive in (box / "none.zip", box):
        assert str(archive) in refused(box / "afo", "no readable zip", archive=archive)


def test_output_that_is_taken_or_cannot_be_made(tmp_path, server):
    (tmp_path / "afo").mkdir()
    (tmp_path / "afo" / "mine.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for out in (tmp_path / "afo", tmp_path / "file"):
        with pytest.raises(UserError, match="exists already: remove it or give another --out"):
            download.download(out, url=server.url, digest=DIGEST)
    refused(tmp_path / "file" / "afo", "Not a directory|exists", url=server.url)
    assert server.log == []
    assert (tmp_path / "afo" / "mine.txt").read_text() == "keep"


def test_archive_in_the_folder_to_clear_is_kept(tmp_path):
    archive = tmp_path / "afo.partial" / "local.zip"
    archive.parent.mkdir()
    archive.write_bytes(ARCHIVE)
    with pytest.raises(UserError, match="cleared"):
        download.download(tmp_path / "afo", archive, digest=DIGEST)
    assert archive.read_bytes() == ARCHIVE


@pytest.mark.parametrize(
    ("error", "expected"),
    [(OSError(28, "No space left"), UserError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_interrupted_unpacking_leaves_nothing(tmp_path, monkeypatch, error, expected):
    archive = tmp_path / "local.zip"
    archive.write_bytes(ARCHIVE)
    monkeypatch.setattr(download, "folder_digest", Mock(side_effect=error))
    with pytest.raises(expected, match=r"afo: No space left|^$"):
        download.download(tmp_path / "afo", archive, digest=DIGEST)
    assert list(tmp_path.iterdir()) == [archive]


def test_command_line(tmp_path, server, script):
    archive, out = tmp_path / "local.zip", tmp_path / "data" / "afo"
    archive.write_bytes(ARCHIVE)
    done = script("data.py", "download", "--out", out, "--archive", archive, "--digest", DIGEST)
    assert done.returncode == 0 and DIGEST in done.stdout, done.stderr
    check_data(out)
    server.status = 404
    done = script("data.py", "download", "--out", tmp_path / "other", "--url", server.url)
    assert done.returncode == 2 and not (tmp_path / "other").exists()
    assert done.stderr.startswith(f"error: {server.url}: HTTP 404")
    assert done.stderr.count("\n") == 1
