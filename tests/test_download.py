"""download.py against a server on this machine and against damaged and hostile archives."""

import hashlib
import http.server
import io
import re
import stat
import subprocess
import sys
import threading
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import download
from errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def png(seed: int) -> bytes:
    """Noise, so that the archive does not compress to nothing."""
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


NAME = "000001_square_red_000001.png"
PNGS = {
    f"{split}/{folder}/{prefix}{NAME}": png(2 * i + j)
    for i, split in enumerate(("training", "validation", "testing"))
    for j, (folder, prefix) in enumerate((("image", ""), ("gt_image", "gt_")))
}
DIGEST = hashlib.sha256(
    "".join(f"{hashlib.sha256(PNGS[n]).hexdigest()}  {n}\n" for n in sorted(PNGS)).encode()
).hexdigest()
PREFIX = "ArtificialFlyingObjects-0123abc/data/FlyingObjectDataset_10K/"
OTHERS = {  # what else the repository holds
    "ArtificialFlyingObjects-0123abc/": b"",
    "ArtificialFlyingObjects-0123abc/README.md": b"# Artificial Flying Objects\n",
    "ArtificialFlyingObjects-0123abc/logs/image/gen_1.png": b"not of the data set",
    PREFIX + ".DS_Store": b"\0",
    PREFIX + "testing/.DS_Store": b"\0",
}


def archive_bytes(*extra, pngs=PNGS, prefix=PREFIX, method=zipfile.ZIP_DEFLATED) -> bytes:
    """A zip with the data set, the other files and `extra`, pairs of (name or ZipInfo, data)."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as opened:
        for name, data in [*OTHERS.items(), *((prefix + n, d) for n, d in pngs.items()), *extra]:
            opened.writestr(name, data)
    return file.getvalue()


ARCHIVE = archive_bytes()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.body` the way the test has set it up, and notes what was asked and sent."""

    def do_GET(self):
        server = self.server
        start, whole = 0, server.body
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = self.headers.get("If-Range", server.etag) == server.etag
        if server.location:
            self.send_response(302)
            self.send_header("Location", server.location)
        elif server.status != 200:
            self.send_response(server.status)
        elif asked and same and server.ranges:
            start = int(asked[1])
            if start >= len(whole):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(whole)}")
                whole, start = b"", 0
            else:
                self.send_response(206)
                first = start + server.shift
                self.send_header("Content-Range", f"bytes {first}-{len(whole) - 1}/{len(whole)}")
        else:
            self.send_response(200)
        body = whole[start:]
        if server.etag:
            self.send_header("ETag", server.etag)
        if server.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif server.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts else None
        sent = body[:cut]
        server.log.append((self.headers.get("Range"), len(sent)))
        if server.chunked:
            sent = b"%x\r\n%s\r\n" % (len(sent), sent) + (b"0\r\n\r\n" if cut is None else b"")
        self.wfile.write(sent)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.body, server.status, server.location, server.etag = ARCHIVE, 200, None, '"v1"'
        server.length, server.chunked, server.ranges, server.shift = True, False, True, 0
        server.cuts, server.log = [], []  # bytes to cut the next responses after; what happened
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


# -- fetching ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["length", "chunked", "until closed"])
def test_fetches_the_data_set(server, tmp_path, how):
    server.chunked, server.length = how == "chunked", how == "length"
    out = tmp_path / "data" / "afo"
    assert download.download(out, url=server.url, digest=DIGEST.upper()) == DIGEST
    check_data(out)
    assert download.folder_digest(out) == DIGEST


def test_known_digest_is_the_default(server, tmp_path, monkeypatch):
    message = refused(tmp_path / "afo", "expected digest", url=server.url, digest=None)
    assert DIGEST in message and all(known in message for known in download.DIGESTS)
    monkeypatch.setitem(download.DIGESTS, DIGEST, "the set of these tests")
    download.download(tmp_path / "afo", url=server.url)
    check_data(tmp_path / "afo")


def test_wrong_digest_leaves_nothing(server, tmp_path):
    message = refused(tmp_path / "afo", "expected digest", url=server.url, digest="0" * 64)
    assert server.url in message and "0" * 64 in message and DIGEST in message
    assert list(tmp_path.iterdir()) == []


def test_digest_that_is_none(server, tmp_path):
    refused(tmp_path / "afo", "not a SHA-256", url=server.url, digest="cab3c8")
    assert server.log == []


@pytest.mark.parametrize("etag", ['"v1"', ""])
def test_cut_download_is_resumed(server, tmp_path, etag):
    server.etag, half = etag, len(ARCHIVE) // 2
    server.cuts = [half]
    message = refused(tmp_path / "afo", "again to resume", url=server.url)
    assert server.url in message and f"{half} of {len(ARCHIVE)} bytes" in message
    assert (tmp_path / "afo.zip.partial").read_bytes() == ARCHIVE[:half]
    download.download(tmp_path / "afo", url=server.url, digest=DIGEST)
    assert server.log == [(None, half), (f"bytes={half}-", len(ARCHIVE) - half)]
    check_data(tmp_path / "afo")


def test_cut_twice(server, tmp_path):
    server.cuts = [100, 50]
    refused(tmp_path / "afo", "100 of", url=server.url)
    refused(tmp_path / "afo", "150 of", url=server.url)
    download.download(tmp_path / "afo", url=server.url, digest=DIGEST)
    assert [asked for asked, _ in server.log] == [None, "bytes=100-", "bytes=150-"]
    check_data(tmp_path / "afo")


def test_cut_without_length_is_resumed(server, tmp_path):
    server.chunked, server.cuts = True, [100]
    refused(tmp_path / "afo", "100 of unknown bytes", url=server.url)
    download.download(tmp_path / "afo", url=server.url, digest=DIGEST)
    assert server.log[1] == ("bytes=100-", len(ARCHIVE) - 100)
    check_data(tmp_path / "afo")


def test_cut_then_no_ranges_starts_again(server, tmp_path):
    server.cuts, server.ranges = [100], False
    refused(tmp_path / "afo", "cut after 100", url=server.url)
    download.download(tmp_path / "afo", url=server.url, digest=DIGEST)
    assert server.log[1] == ("bytes=100-", len(ARCHIVE))
    check_data(tmp_path / "afo")


def test_cut_then_another_file_starts_again(server, tmp_path):
    server.body, server.cuts = b"x" * 1000, [500]
    refused(tmp_path / "afo", "500 of 1000", url=server.url)
    server.body, server.etag = ARCHIVE, '"v2"'
    download.download(tmp_path / "afo", url=server.url, digest=DIGEST)
    assert server.log[1] == ("bytes=500-", len(ARCHIVE))
    check_data(tmp_path / "afo")


def test_wrong_range_starts_again(server, tmp_path):
    server.cuts, server.shift = [100], 1
    refused(tmp_path / "afo", "cut after 100", url=server.url)
    download.download(tmp_path / "afo", url=server.url, digest=DIGEST)
    assert server.log[2] == (None, len(ARCHIVE))
    check_data(tmp_path / "afo")


def test_partial_longer_than_the_file_starts_again(server, tmp_path):
    (tmp_path / "afo.zip.partial").write_bytes(b"x" * (len(ARCHIVE) + 10))
    download.download(tmp_path / "afo", url=server.url, digest=DIGEST)
    check_data(tmp_path / "afo")


def test_stalled_server_counts_as_cut(tmp_path, monkeypatch, server):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    done = threading.Event()

    def stall(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"x" * 10)
        done.wait(5)

    monkeypatch.setattr(Handler, "do_GET", stall)
    refused(tmp_path / "afo", "cut after 10 of 1000 bytes", url=server.url)
    done.set()


def test_bad_partial_is_deleted(server, tmp_path):
    server.body, server.cuts = b"x" * 1000, [500]
    server.etag = ""  # so that nothing tells the two files apart
    refused(tmp_path / "afo", "cut after", url=server.url)
    server.body = ARCHIVE
    refused(tmp_path / "afo", "no readable zip", url=server.url)
    assert list(tmp_path.iterdir()) == []
    download.download(tmp_path / "afo", url=server.url, digest=DIGEST)
    check_data(tmp_path / "afo")


@pytest.mark.parametrize("chunked", [True, False])
def test_endless_download_is_stopped(server, tmp_path, monkeypatch, chunked):
    monkeypatch.setattr(download, "MAX_TOTAL", 2000)
    monkeypatch.setattr(download, "BLOCK", 512)
    server.body, server.chunked = b"x" * 100_000, chunked
    refused(tmp_path / "afo", "over 2,000 bytes", url=server.url)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("status", [403, 404, 500])
def test_http_errors(server, tmp_path, status):
    server.status = status
    message = refused(tmp_path / "afo", f"HTTP {status} ", url=server.url)
    assert server.url in message
    assert list(tmp_path.iterdir()) == []


def test_refused_connection(server, tmp_path):
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}/"
    assert url in refused(tmp_path / "afo", "refused", url=url)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/a.zip",
        "http://127.0.0.1.example.com/a.zip",
        "http://127.0.0.1@example.com/a.zip",
        "ftp://example.com/a.zip",
        "file:///etc/hosts",
        "https:///a.zip",
        "a.zip",
        "",
    ],
)
def test_only_https(tmp_path, url):
    refused(tmp_path / "afo", "only https", url=url)


@pytest.mark.parametrize(
    "url", ["https://[/a.zip", "https://127.0.0.1:port/", "http://127.0.0.1/ "]
)
def test_malformed_addresses(tmp_path, url):
    refused(tmp_path / "afo", "check the address", url=url)


@pytest.mark.parametrize("target", ["http://example.com/a.zip", "file:///etc/hosts", "ftp://x/a"])
def test_redirect_to_a_bad_address(server, tmp_path, target):
    server.location = target
    refused(tmp_path / "afo", "only https|HTTP 302", url=server.url)


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


# -- archives ------------------------------------------------------------------------------


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
    top = box.parent.parent
    message = refused(box / "afo", match, archive=archive)
    assert str(archive) in message
    assert [p for p in top.rglob("*") if not p.is_dir()] == [archive]
    assert archive.read_bytes() == data
    return message


@pytest.mark.parametrize("prefix", [PREFIX, "FlyingObjectDataset_10K/", "", "training/image/"])
def test_local_archive(box, prefix):
    data = archive_bytes(prefix=prefix)
    archive = box / "local.zip"
    archive.write_bytes(data)
    (box / "out" / "afo.partial" / "left").mkdir(parents=True)  # by a run that was killed
    (box / "out" / "afo").mkdir()  # an empty folder is no obstacle
    assert download.download(box / "out" / "afo", archive, digest=DIGEST) == DIGEST
    check_data(box / "out" / "afo")
    assert archive.read_bytes() == data


@pytest.mark.parametrize(
    "name",
    [
        "../evil.png",
        "../../evil.png",
        PREFIX + "../../../../../testing/image/evil.png",
        PREFIX + "testing/image/../../../../../evil.png",
        "/testing/image/evil.png",
        "C:/testing/image/evil.png",
        "c:evil.png",
        "..\\evil.png",
        PREFIX + "testing\\image\\evil.png",
        PREFIX + "..",
    ],
)
def test_unsafe_paths(box, name):
    absolute = str(box.parent.parent / "testing/image/evil.png")
    for bad in (name, absolute):
        assert repr(bad) in refused_archive(box, archive_bytes((bad, png(9))), "unsafe path")


def test_null_in_a_path(box):
    data = archive_bytes((PREFIX + "testing/image/evil.png~.txt", png(9)))
    refused_archive(box, data.replace(b"evil.png~", b"evil.png\0"), "unsafe path")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK])
@pytest.mark.parametrize("name", [PREFIX + "testing/image/link.png", "link"])
def test_links_and_special_files(box, kind, name):
    info = zipfile.ZipInfo(name)
    info.external_attr = (kind | 0o777) << 16
    refused_archive(box, archive_bytes((info, "../../../../evil")), "link or special file")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", [PREFIX + "testing/image/" + NAME, "README.md"])
def test_duplicates(box, name):
    data = archive_bytes((name, png(9)), (name, png(9)))
    assert repr(name) in refused_archive(box, data, "duplicate")


def test_two_data_sets(box):
    extra = ("copy/testing/image/" + NAME, png(9))
    refused_archive(box, archive_bytes(extra), "2 data sets")


def test_no_data_set(box):
    refused_archive(box, archive_bytes(pngs={}), "0 data sets")


def set_in_headers(data: bytes, local: int, central: int, value: int, size: int = 2) -> bytes:
    """`data` with a field of the member "x" overwritten in its local and central header."""
    data = bytearray(data)
    for signature, name, field in ((b"PK\3\4", 30, local), (b"PK\1\2", 46, central)):
        at = next(
            i.start()
            for i in re.finditer(re.escape(signature), data)
            if data[i.start() + name :].startswith(PREFIX.encode() + b"testing/image/")
        )
        data[at + field : at + field + size] = value.to_bytes(size, "little")
    return bytes(data)


def test_encrypted(box):
    refused_archive(box, set_in_headers(ARCHIVE, 6, 8, 1), "encrypted")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_unusual_compression(box, method):
    refused_archive(box, archive_bytes(method=method), "not stored or deflated")


def test_bomb_in_one_file(box):
    bomb = (PREFIX + "testing/image/bomb.png", bytes(download.MAX_FILE + 1))
    refused_archive(box, archive_bytes(bomb), r"testing/image/bomb\.png is too large")


def test_bomb_in_total(box, monkeypatch):
    monkeypatch.setattr(download, "MAX_TOTAL", len(ARCHIVE))
    pngs = {name: bytes(5000) for name in PNGS}
    refused_archive(box, archive_bytes(pngs=pngs), "too large")


def test_too_many_members(box, monkeypatch):
    monkeypatch.setattr(download, "MAX_MEMBERS", len(OTHERS))
    refused_archive(box, ARCHIVE, "members")


def test_size_in_the_header_is_not_trusted(box):
    data = set_in_headers(ARCHIVE, 22, 24, 10, size=4)
    refused_archive(box, data, "Bad CRC|expected digest")


def test_corrupt_member(box):
    data = archive_bytes(method=zipfile.ZIP_STORED)
    changed = png(4)[:-20] + b"!" + png(4)[-19:]
    assert png(4) in data
    refused_archive(box, data.replace(png(4), changed), "Bad CRC")


@pytest.mark.parametrize("data", [ARCHIVE[: len(ARCHIVE) // 2], ARCHIVE[:-1], b"<html>", b""])
def test_truncated_or_not_a_zip(box, data):
    refused_archive(box, data, "no readable zip")


def test_missing_archive(box):
    for archive in (box / "none.zip", box):
        assert str(archive) in refused(box / "afo", "no readable zip", archive=archive)


# -- the output folder ---------------------------------------------------------------------


def test_existing_output_is_refused(tmp_path, server):
    (tmp_path / "afo").mkdir()
    (tmp_path / "afo" / "mine.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for out in (tmp_path / "afo", tmp_path / "file"):
        with pytest.raises(UserError, match="exists already: remove it or give another --out"):
            download.download(out, url=server.url, digest=DIGEST)
    assert server.log == []
    assert (tmp_path / "afo" / "mine.txt").read_text() == "keep"


def test_output_that_cannot_be_written(tmp_path, server):
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file" / "afo", "Not a directory|exists", url=server.url)


def test_archive_in_the_folder_to_clear_is_kept(tmp_path):
    archive = tmp_path / "afo.partial" / "local.zip"
    archive.parent.mkdir()
    archive.write_bytes(ARCHIVE)
    with pytest.raises(UserError, match="cleared"):
        download.download(tmp_path / "afo", archive, digest=DIGEST)
    assert archive.read_bytes() == ARCHIVE


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_interrupted_unpacking_leaves_nothing(tmp_path, monkeypatch, error):
    archive = tmp_path / "local.zip"
    archive.write_bytes(ARCHIVE)

    def fail(folder):
        raise error

    monkeypatch.setattr(download, "folder_digest", fail)
    expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="afo: No space left" if expected is UserError else None):
        download.download(tmp_path / "afo", archive, digest=DIGEST)
    assert list(tmp_path.iterdir()) == [archive]


# -- the command line ----------------------------------------------------------------------


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "data.py", "download", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_command_line(tmp_path):
    archive, out = tmp_path / "local.zip", tmp_path / "data" / "afo"
    archive.write_bytes(ARCHIVE)
    done = run("--out", out, "--archive", archive, "--digest", DIGEST)
    assert done.returncode == 0, done.stderr
    check_data(out)


def test_command_line_failure(tmp_path, server):
    server.status = 404
    done = run("--out", tmp_path / "afo", "--url", server.url)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {server.url}: HTTP 404")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
