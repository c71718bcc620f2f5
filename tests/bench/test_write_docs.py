"""README and docs show the committed results and the code: what `python -m tools.write_docs` has written."""

from __future__ import annotations

import pytest

from tools import write_docs


def test_every_generated_part_is_as_the_results_and_the_code_are():
    differing, wrong = write_docs.write_docs(check=True)
    assert not differing and not wrong, f"run python -m tools.write_docs: {differing + wrong}"


def test_a_part_goes_between_its_markers():
    page = "a\n<!-- begin: text -->\nold\n<!-- end: text -->\nb\n"
    new = "a\n<!-- begin: text -->\n\n| new |\n\n<!-- end: text -->\nb\n"
    assert write_docs.with_part(page, "text", "| new |") == new == write_docs.with_part(new, "text", "| new |")
    for text, reason in (
        ("nothing", "needs one line <!-- begin: text -->, has 0"),
        ("<!-- begin: text -->\n", "needs one line <!-- end: text -->, has 0"),
        (page + page, "needs one line <!-- begin: text -->, has 2"),
        ("<!-- end: text -->\n<!-- begin: text -->\n", "has <!-- end: text --> before <!-- begin: text -->"),
    ):
        with pytest.raises(ValueError, match=reason):
            write_docs.with_part(text, "text", "")


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """A README with one part, "one", and no pictures."""
    monkeypatch.setattr(write_docs, "ROOT", tmp_path)
    monkeypatch.setattr(write_docs, "pictures", lambda: [])
    monkeypatch.setattr(write_docs, "PAGES", {"README.md": {"one": lambda: "made"}})
    readme = tmp_path / "README.md"
    readme.write_text("<!-- begin: one -->\n<!-- end: one -->\n", encoding="utf-8")
    return readme


def test_the_check_writes_nothing_and_names_what_differs(pages, capsys):
    before = pages.read_text()
    with pytest.raises(SystemExit) as stop:
        write_docs.main(["--check"])
    assert stop.value.code == 1 and pages.read_text() == before
    assert "README.md: one differs" in capsys.readouterr().out
    write_docs.main([])
    assert "\nmade\n" in pages.read_text() and "README.md: one written" in capsys.readouterr().out
    write_docs.main(["--check"])
    assert not capsys.readouterr().out


def test_a_page_without_its_marker_is_named_and_the_others_are_written(pages, monkeypatch, capsys):
    parts = {"one": lambda: "made", "two": lambda: "made"}
    monkeypatch.setattr(write_docs, "PAGES", {"docs/none.md": {"three": str}, "README.md": parts})
    with pytest.raises(SystemExit):
        write_docs.main([])
    said = capsys.readouterr().err
    assert "README.md needs one line <!-- begin: two -->, has 0" in said and "docs/none.md is not there" in said
    assert "made" in pages.read_text()


def test_a_picture_of_other_results_is_drawn_anew(pages, tmp_path, monkeypatch, capsys):
    pages.write_text(write_docs.with_part(pages.read_text(), "one", "made"))
    picture = tmp_path / "picture.svg"
    picture.write_text("of older results")
    monkeypatch.setattr(write_docs, "DOCS", tmp_path)
    draw = [([picture.name], "abc", lambda: picture.write_text("abc"))]
    monkeypatch.setattr(write_docs, "pictures", lambda: draw)
    with pytest.raises(SystemExit):
        write_docs.main(["--check"])
    assert "docs/picture.svg differs" in capsys.readouterr().out and "abc" not in picture.read_text()
    write_docs.main([])
    assert picture.read_text() == "abc"
    write_docs.main(["--check"])
