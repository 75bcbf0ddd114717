"""Tests of tools/results.py: RESULTS.md and the README are what the files in results/ say."""

from pathlib import Path

from common import ROOT

from tools import results

MARK = "* trained by other code than today's; remove its folder to train it again"


def plain(path: Path) -> list[str]:
    """Read the words of a page without the marks that runs get when somebody edits train.py."""
    return path.read_text().replace(MARK, "").replace("\\*", "").replace("*", "").split()


def test_pages_are_up_to_date(tmp_path: Path, call) -> None:
    assert call(results.main, "--out", tmp_path)[0] == 0
    for name in ("RESULTS.md", "README.md"):
        assert plain(tmp_path / name) == plain(ROOT / name), f"{name}: run make results"
    assert "{" not in (tmp_path / "RESULTS.md").read_text()
    for link in (ROOT / "results/figures").rglob("*.png"):
        assert (tmp_path / link.relative_to(ROOT)).exists()


def test_a_table_is_replaced_where_it_stands() -> None:
    table = "<!-- table: make {} -->\n```\n{}\n```\n<!-- end -->\n"
    page = "a\n" + table.format("x", "old") + "b\n" + table.format("y", "old")
    new = results.fill_table(page, "make x", "new \\1")
    assert new == page.replace("old", "new \\1", 1)
    assert results.fill_table(page, "make z", "new") == page
