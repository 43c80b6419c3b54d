"""The tables of README.md and docs/ are made from the samples in bench/results/, and are what these give."""

import pytest

from bench import figures

PAGE = (
    "Before.\n\n<!-- figures: a -->\nold\n<!-- figures end -->\n\n<!-- figures: b -->\n<!-- figures end -->\n"
)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with one page, in a folder of docs/."""
    page = tmp_path / "docs" / "sub" / "page.md"
    page.parent.mkdir(parents=True)
    page.write_text(PAGE)
    (tmp_path / "README.md").write_text("none here\n")
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "FIGURES", {"a": lambda: "| 1 |\n", "b": lambda: "| 2 |\n"})
    return page


def test_the_documents_have_what_the_samples_give():
    """Run `make figures`, and see what it changes."""
    figures.main(["--check"])


def test_every_table_has_a_place_in_one_document():
    places = [name for page in figures.pages() for _, name, _ in figures.PLACE.findall(page.read_text())]
    assert sorted(places) == sorted(figures.FIGURES)


def test_tables_are_replaced_and_nothing_else(checkout, capsys):
    with pytest.raises(SystemExit, match="not what the samples"):
        figures.main(["--check"])
    assert checkout.read_text() == PAGE
    figures.main([])
    written = PAGE.replace("old\n", "\n| 1 |\n\n").replace("b -->\n", "b -->\n\n| 2 |\n\n")
    assert checkout.read_text() == written
    assert capsys.readouterr().out.splitlines() == ["docs/sub/page.md differs", "docs/sub/page.md rewritten"]
    figures.main(["--check"])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<!-- figures: c -->\n<!-- figures end -->", "no figures are called c; there are a, b"),
        ("<!-- figures: a -->\n", "does not end"),
        ("<!-- figures: a -->\n<!-- figures: b -->\n<!-- figures end -->", "does not end"),
        ("<!-- figures end -->\n", "does not end"),
    ],
)
def test_a_place_that_makes_no_sense_is_refused(checkout, text, why):
    checkout.write_text(text)
    with pytest.raises(ValueError, match=why):
        figures.main([])
    assert checkout.read_text() == text
