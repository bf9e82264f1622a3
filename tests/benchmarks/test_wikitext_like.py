"""The calibration text in WikiText's format."""

from pathlib import Path

import pytest
import wikitext_like

from converters.package_data import PackageError

FIRST = (
    "A '''well-known''' [[kiln|oven]], built in 1,204 days, is 3.5 metres (11 ft) high; "
    "it isn't lit.<ref>A book</ref>"
)
SECOND = (
    "It stood beside the old river mill for two hundred years until the great flood of that year."
)
MARKUP = f"""{{{{Infobox|a=b}}}}
[[File:kiln.jpg|thumb|A kiln with a long caption that nobody wants to find in a text]]
{FIRST}
* a short item

== Early history ==
{SECOND}
{{| class="wikitable"
| cell of a table
|}}

== References ==
{SECOND.upper()}
"""
PADDING = "<!-- " + "x" * wikitext_like.MIN_MARKUP + " -->"


def page(title: str, text: str, namespace: int = 0) -> str:
    """One page of a dump."""
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return (
        f"<page><title>{title}</title><ns>{namespace}</ns>"
        f"<revision><text>{text}</text></revision></page>"
    )


def dump(*pages: str) -> bytes:
    """A dump of pages."""
    return f'<mediawiki xmlns="http://x/">{"".join(pages)}</mediawiki>'.encode()


def test_articles_become_lines_as_in_wikitext() -> None:
    xml = dump(page("Lime kiln", MARKUP + PADDING))
    assert wikitext_like.wikitext(wikitext_like.long_articles(xml), set()).split("\n") == [
        "",
        " = Lime kiln = ",
        "",
        " A well @-@ known oven , built in 1 @,@ 204 days , is 3 @.@ 5 metres ( 11 ft ) high ;"
        " it isn 't lit . ",
        "",
        " = = Early history = = ",
        "",
        f" {SECOND[:-1]} . ",
    ]


def test_redirects_stubs_and_other_namespaces_are_left_out() -> None:
    xml = dump(
        page("A", "#REDIRECT [[B]]" + PADDING),
        page("B", MARKUP),
        page("Talk:C", MARKUP + PADDING, namespace=1),
    )
    assert list(wikitext_like.articles(xml)) == []


def test_stubs_become_articles_without_their_short_lines() -> None:
    text = f'<doc id="1" title="Kiln">\nKiln\n\n{SECOND}\nHistory.\n{SECOND}\n\n</doc>\n'
    text += '<doc id="2" title="Oven">\nOven\n\nA stub.\n\n</doc>\nplain text of another kind'
    assert list(wikitext_like.stubs(text)) == [[(1, "Kiln"), (0, SECOND), (0, SECOND)]]


def test_paragraphs_that_share_ten_words_with_an_excluded_text_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    xml = dump(page("Lime kiln", MARKUP + PADDING))
    monkeypatch.setattr(wikitext_like, "download", lambda: xml)
    measured, out = tmp_path / "test.raw", tmp_path / "out.txt"
    measured.write_text("As told: beside the OLD river-mill for two hundred years, until the end.")
    monkeypatch.setattr("sys.argv", ["x", str(out), "--exclude", str(measured)])
    wikitext_like.main()
    text = out.read_text()
    assert "river mill" not in text and "well @-@ known" in text
    assert text.startswith("\n\n = Lime kiln = \n\n\n")  # joined as the measured rows are
    assert f"{len(text):,} characters" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"out.txt", "test.raw"}


def test_a_missing_file_or_package_ends_the_command_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable() -> bytes:
        raise PackageError("gensim from PyPI: no network")

    monkeypatch.setattr(wikitext_like, "download", unreachable)
    out, missing = tmp_path / "out.txt", tmp_path / "no.raw"
    for arguments, why in (
        ([], "gensim from PyPI: no network"),
        (["--exclude", str(missing)], f"[Errno 2] No such file or directory: '{missing}'"),
    ):
        monkeypatch.setattr("sys.argv", ["wikitext_like.py", str(out), *arguments])
        with pytest.raises(SystemExit, match="1"):
            wikitext_like.main()
        assert capsys.readouterr().err == f"wikitext_like.py: {why}\n"
        assert not out.exists()
