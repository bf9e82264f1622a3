"""docs/FEATURES.md says what the tests did, and every marked test is in it."""

import json

import pytest

from tests.features import RESULTS, TABLE, is_claimed, marked_tests, merged, row_line, table


def test_features_are_up_to_date() -> None:
    results = json.loads(RESULTS.read_text())
    assert table(results) == TABLE.read_text(), "run python -m tests.features"
    marked = marked_tests()
    assert {test.partition("[")[0] for test in results["tests"]} == set(marked)
    for test, entry in results["tests"].items():
        assert is_claimed(entry, marked[test.partition("[")[0]]), test


def test_a_run_replaces_its_own_entries_and_keeps_those_of_tests_that_exist() -> None:
    exist = ["a.py::plain", "a.py::given", "a.py::both"]
    before = dict.fromkeys(
        ["a.py::gone", "a.py::plain[x]", "a.py::given", "a.py::both[x]", "a.py::both[y]"], "old"
    )
    collected = dict.fromkeys(["a.py::plain", "a.py::given[x]", "a.py::both[y]"], "not run")
    assert merged(before, collected, {"a.py::both[y]": "ran"}, exist) == {
        "a.py::both[x]": "old",
        "a.py::both[y]": "ran",
        "a.py::given[x]": "not run",
        "a.py::plain": "not run",
    }
    assert merged({"a.py::plain": "old"}, {"a.py::plain": "not run"}, {}, exist) == {
        "a.py::plain": "old"
    }


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([{"outcome": "passed", "against": "X"}], "| r | X | works |"),
        ([{"outcome": "passed"}, {"outcome": "failed"}], "**FAILS**"),
        ([{"outcome": "passed", "limit": "dense too"}], "| dense too | vLLM's limit |"),
        ([{"outcome": "passed"}, {"outcome": "not run"}], "not run yet"),
        ([{"outcome": "skipped", "reason": "Skipped: no rights"}], "not run: no rights"),
        ([{"outcome": "failed", "limit": "dense too"}], "**FAILS**"),
    ],
)
def test_a_row_is_as_good_as_its_worst_test(entries: list[dict[str, str]], said: str) -> None:
    tests = [(f"tests/test_a.py::test_b[{i}]", entry) for i, entry in enumerate(entries)]
    line = row_line("r", tests)
    assert said in line
    assert line.endswith("| [test_b](../tests/test_a.py) |")
