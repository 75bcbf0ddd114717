"""Find the files that a pattern such as 'photos/*.jpg' describes.

A * matches any text within one name, and **/ any folders. {jpg,png} lists alternatives. The ending
of a file matches in any case, and a pattern without an ending, as 'photos/*', finds images of any
kind. Every other character is meant as it stands. Links to folders are followed.
"""

import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from common import UserError, reading

# The endings that a bare * stands for.
ENDINGS = ("png", "jpg", "jpeg", "jfif", "bmp", "gif", "tif", "tiff", "webp", "ppm", "pgm")
# Endings of other images; `data.py check` says that such files are left out.
CAMERA_ENDINGS = ("heic", "heif", "dng", "cr2", "cr3", "nef", "arw")
OTHER_ENDINGS = (*CAMERA_ENDINGS, "jp2", "jxl", "avif", "psd", "svg", "dcm", "nii", "czi", "svs")
STARS = re.compile(r"\*+")
WILDCARD = re.compile(r"\*+|\{[^{}/]*,[^{}/]*\}")  # * or {jpg,png}


class File(NamedTuple):
    """A file that matches a pattern."""

    path: Path
    matches: tuple[str, ...]  # what each wildcard of the pattern stands for
    name: str


# ---- patterns


def parts_of(pattern: str) -> list[str]:
    """Split a pattern into the names of folders and of the file, which gets an ending.

    'photos/*' and 'photos/*.*' are ['photos', '*.{png,jpg,…}'].
    """
    parts = [part for part in pattern.split("/") if part not in ("", ".")]
    name = parts.pop() if parts else ""
    if name.endswith("*"):
        name = name.removesuffix(".*") + ".{" + ",".join(ENDINGS) + "}"
    return [*parts, name]


def expression_of(part: str) -> str:
    """Translate a name with wildcards to a regular expression with a group for each *."""
    expression = ""
    end = 0
    for wildcard in WILDCARD.finditer(part):
        expression += re.escape(part[end : wildcard.start()])
        end = wildcard.end()
        if wildcard[0].startswith("*"):
            expression += "(.*)"
        else:
            choices = [re.escape(choice) for choice in wildcard[0][1:-1].split(",")]
            expression += "(?:" + "|".join(choices) + ")"
    return expression + re.escape(part[end:])


def split_ending(name: str) -> tuple[str, str]:
    """Split the last part of a pattern before the ending of the files, which may be ""."""
    start = name.rfind(".")
    if start < 0:
        return name, ""
    brace = name.rfind("{", 0, start)
    if brace > name.rfind("}", 0, start):  # the dot is between braces, as in *{.jpg,_x.png}
        start = brace
    return name[:start], name[start:]


def file_expression(name: str) -> re.Pattern:
    """Translate the last part of a pattern, the name of a file, to a regular expression.

    Capitals in the ending do not matter.
    """
    stem, ending = split_ending(name)
    return re.compile(f"{expression_of(stem)}(?i:{expression_of(ending)})")


def count_stars(pattern: str) -> int:
    """Count the wildcards of a pattern that stand for a part of the name of a pair."""
    return len(STARS.findall("/".join(parts_of(pattern))))


def fill(pattern: str, matches: tuple[str, ...]) -> str:
    """Replace the stars of a pattern by the texts in `matches`."""
    pieces = STARS.split("/".join(parts_of(pattern)))
    filled = pieces[0]
    for text, piece in zip(matches, pieces[1:], strict=True):
        filled += text + piece
    return os.path.normpath(filled)  # **/ may stand for no folder


def specificity(pattern: str) -> tuple[int, int]:
    """Count the characters of a pattern that are no wildcards: before the ending, and in it.

    The ending counts only if all else is equal: *.png is less specific than *_mask.{png,tif}.
    """
    *folders, name = parts_of(pattern)
    stem, ending = split_ending(name)
    before = "/".join([*folders, stem])
    return len(WILDCARD.sub("", before)), len(WILDCARD.sub("", ending))


# ---- files


def list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """List the names of the files and of the folders in a folder, sorted, without hidden ones.

    A link that leads nowhere counts as a file: whoever reads it says so. UserError if the folder
    cannot be read.
    """
    files = []
    folders = []
    with reading(folder, "let it be read, or move it"), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):  # macOS leaves such files behind
                continue
            try:
                is_folder = entry.is_dir()  # a link to a folder is one
            except OSError:  # a link to itself
                is_folder = False
            if is_folder:
                folders.append(entry.name)
            elif entry.is_symlink() or entry.is_file():
                files.append(entry.name)
    return sorted(files), sorted(folders)


def folders_below(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield a folder and all folders below it, except links back to a folder that they are in."""
    real = os.path.realpath(folder)
    if real in above:
        return
    yield folder
    for name in list_folder(folder)[1]:
        yield from folders_below(folder / name, (*above, real))


def find_folders(root: Path, parts: list[str]) -> list[tuple[Path, tuple[str, ...]]]:
    """Find the folders that the parts of a pattern lead to, and what their wildcards match."""
    places = [(root, ())] if root.is_dir() else []
    for part in parts:
        reached = []
        for folder, matches in places:
            if part == "**":
                for below in folders_below(folder):
                    text = "" if below == folder else below.relative_to(folder).as_posix()
                    reached.append((below, (*matches, text)))
            elif WILDCARD.search(part):
                expression = re.compile(expression_of(part))
                for name in list_folder(folder)[1]:
                    match = expression.fullmatch(name)
                    if match:
                        reached.append((folder / name, (*matches, *match.groups())))
            elif (folder / part).is_dir():
                reached.append((folder / part, matches))
        places = reached
    return places


def check_name(path: Path) -> None:
    """Raise UserError if the name of a file is not in UTF-8, as on disks of old computers."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        readable = os.fsencode(path).decode(errors="replace")
        raise UserError(f"{readable}: its name is not in UTF-8; rename it") from None


def find_files(root: Path, pattern: str) -> list[File]:
    """Find the files of a pattern below a folder; UserError if a name cannot be printed."""
    parts = parts_of(pattern)
    expression = file_expression(parts[-1])
    files = []
    for folder, matches in find_folders(root, parts[:-1]):
        for file_name in list_folder(folder)[0]:
            match = expression.fullmatch(file_name)
            if match is None:  # Macs write ä as two characters, which look the same
                match = expression.fullmatch(unicodedata.normalize("NFC", file_name))
            if match:
                texts = (*matches, *match.groups())
                name = "/".join(text for text in texts if text)
                path = folder / file_name
                check_name(path)
                files.append(File(path, texts, name))
    return files
