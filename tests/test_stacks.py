"""The table of what works where: every row is proven by a test, and results are merged as they should be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import render_stacks
import stacks

pytest_plugins = ["pytester"]

FIRST, SECOND = stacks.NAMES[:2]
# Workers do not inherit the path.
CONFTEST = f"""
import sys
sys.path.append({str(Path(__file__).parent)!r})
import stacks

def pytest_configure(config):
    stacks.register(config)
"""
TESTS = f"""
import pytest

@pytest.mark.stack({FIRST!r})
def test_fine(record_property):
    record_property("peak MiB", 3)

@pytest.mark.stack({FIRST!r}, device="cuda")
def test_without_a_device():
    pytest.skip("no CUDA device")

@pytest.mark.stack({FIRST!r}, device="2 x cuda")
@pytest.mark.parametrize("n", [0, 1])
def test_half(n):
    assert n

@pytest.mark.stack({SECOND!r}, refused="an error that says so")
def test_refused():
    pass

def test_without_a_mark():
    assert False
"""


def run(pytester: pytest.Pytester, monkeypatch, known: dict, *arguments: str) -> dict:
    path = pytester.path / "results/stacks.json"
    path.parent.mkdir()
    path.write_text(json.dumps(known))
    monkeypatch.setenv(stacks.VARIABLE, str(path))
    monkeypatch.setattr(stacks, "versions", lambda device, packages: {"torch": "9"})
    monkeypatch.setattr(stacks, "source_of", lambda: "now")
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(TESTS)
    found = pytester.runpytest_inprocess("-p", "no:cacheprovider", *arguments)
    found.assert_outcomes(passed=3, failed=2, skipped=1)
    return json.loads(path.read_text())


def test_every_row_has_a_test():
    marked = stacks.marked_rows(Path(__file__).parent)
    assert sorted(set(stacks.NAMES) - marked) == []
    assert sorted(marked - set(stacks.NAMES)) == []


@pytest.mark.parametrize("processes", [[], ["-n", "2"]], ids=["alone", "in workers"])
def test_outcomes_become_results(pytester, monkeypatch, processes):
    table = run(pytester, monkeypatch, {}, *processes)
    assert list(table) == list(stacks.NAMES)
    works = {"result": "works", "tests": 1, "versions": {"torch": "9"}, "note": "", "source": "now"}
    assert table[FIRST] == {
        "cpu": works | {"measured": {"peak MiB": 3}},
        "cuda": works | {"result": "not run", "versions": {}, "note": "no CUDA device"},
        "2 x cuda": works | {"result": "fails", "tests": 2},
    }
    assert table[SECOND]["cpu"]["result"] == "refused"
    assert table[SECOND]["cpu"]["note"] == "an error that says so"


def test_a_crash_is_a_failure(pytester, monkeypatch):
    path = pytester.path / "stacks.json"
    monkeypatch.setenv(stacks.VARIABLE, str(path))
    pytester.makeconftest(CONFTEST)
    test = "@pytest.mark.stack({!r})\ndef test_{}():\n    {}\n\n"
    body = test.format(FIRST, "crash", "os._exit(3)") + test.format(SECOND, "fine", "pass")
    pytester.makepyfile(f"import os\nimport pytest\n\n{body}")
    pytester.runpytest_inprocess("-p", "no:cacheprovider", "-n", "2")
    table = json.loads(path.read_text())
    assert [table[name]["cpu"]["result"] for name in (FIRST, SECOND)] == ["fails", "works"]


def test_a_known_failure_is_a_failure_with_its_reason(pytester, monkeypatch):
    path = pytester.path / "stacks.json"
    monkeypatch.setenv(stacks.VARIABLE, str(path))
    monkeypatch.setattr(stacks, "versions", lambda device, packages: {"torch": "9"})
    pytester.makeconftest(CONFTEST)
    body = f"@pytest.mark.stack({FIRST!r})\ndef test_it():\n    pytest.xfail('the loader crashes')\n"
    pytester.makepyfile(f"import pytest\n\n{body}")
    pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(xfailed=1)
    entry = json.loads(path.read_text())[FIRST]["cpu"]
    assert (entry["result"], entry["note"]) == ("fails", "the loader crashes")


def test_another_machines_results_are_kept_if_they_are_of_the_same_sources(pytester, monkeypatch):
    there = {"result": "works", "tests": 4, "versions": {"torch": "8"}, "note": "", "source": "now"}
    before, third = there | {"source": "before"}, stacks.NAMES[2]
    known = {
        FIRST: {"cuda": there, "cpu": there},
        SECOND: {"cuda": before},
        third: {"cuda": there, "2 x cuda": before},
        "a row of old": {"cpu": there},
    }
    table = run(pytester, monkeypatch, known)
    assert table[FIRST]["cuda"] == there and table[third] == {"cuda": there}
    assert table[FIRST]["cpu"]["versions"] == {"torch": "9"} and list(table[SECOND]) == ["cpu"]
    assert "a row of old" not in table


def test_what_another_machine_found_fills_in_and_warns():
    def entry(result, source="now"):
        return {"result": result, "source": source, "note": "", "versions": {}}

    here = {FIRST: {"cpu": entry("works"), "cuda": entry("not run")}, SECOND: {"cpu": entry("fails")}}
    there = {
        FIRST: {"cpu": entry("fails"), "cuda": entry("works"), "2 x cuda": entry("works", "before")},
        SECOND: {"cpu": entry("works"), "2 x cuda": entry("not run")},
    }
    table = stacks.merged(here, there, "now", another_machine=True)
    assert table[FIRST] == {"cpu": entry("fails"), "cuda": entry("works")}
    assert table[SECOND] == {"cpu": entry("fails"), "2 x cuda": entry("not run")}


def test_one_command_merges_and_renders(tmp_path, monkeypatch, capsys):
    results, readme, other = tmp_path / "stacks.json", tmp_path / "README.md", tmp_path / "gpu.json"
    readme.write_text(f"before\n{render_stacks.BEGIN}\n{render_stacks.END}\nafter\n")
    entry = {"result": "works", "tests": 1, "versions": {}, "note": "", "source": stacks.source_of()}
    stacks.write_table(results, {FIRST: {"cpu": entry, "2 x cuda": entry | {"result": "not run"}}})
    stacks.write_table(other, {FIRST: {"cuda": entry}})
    options = ["render_stacks.py", "--results", str(results), "--readme", str(readme), str(other)]
    monkeypatch.setattr("sys.argv", options)
    assert render_stacks.main() == 0
    row = FIRST.partition(": ")[2]
    assert f"| {row} | works | works | not run |" in readme.read_text() and "after" in readme.read_text()
    assert list(stacks.read_table(results)[FIRST]) == ["cpu", "cuda", "2 x cuda"]
    stacks.write_table(other, {SECOND: {"cpu": entry | {"result": "fails"}}})
    assert render_stacks.main() == 1 and f"fails: {SECOND} (cpu)" in capsys.readouterr().err
    stacks.write_table(other, {FIRST: {"cuda": entry | {"source": "0" * 16}}})
    with pytest.raises(SystemExit):
        render_stacks.main()
    assert "nothing in it is of these sources" in capsys.readouterr().err


def test_a_row_that_does_not_exist_is_an_error(pytester, monkeypatch):
    monkeypatch.delenv(stacks.VARIABLE, raising=False)
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile("import pytest\n\n@pytest.mark.stack('magic: on')\ndef test_it():\n    pass\n")
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "no such row in tests/stacks.py: ('magic: on',)" in "\n".join(result.outlines + result.errlines)


def test_the_table_says_all_of_it():
    cpu = {"torch": "2.13.0", "python": "3.11.7"}
    cuda = {"torch": "2.11.0", "python": "3.12.3", "cuda": "13.0", "device": "H100"}
    entry = {"result": "works", "tests": 1, "versions": cpu, "note": ""}
    found = {
        FIRST: {"cpu": entry, "cuda": entry | {"versions": cuda}, "2 x cuda": entry | {"result": "fails"}},
        SECOND: {"cpu": entry | {"result": "refused", "note": "RuntimeError | with a way out"}},
        stacks.NAMES[-1]: {"cpu": entry | {"note": "seen", "measured": {"base MiB": 3, "ours MiB": 4.25}}},
    }
    table = render_stacks.markdown(found)
    group, _, row = FIRST.partition(": ")
    assert f"| **{group}** | | | |" in table
    assert f"| {row} | works | works | fails |" in table
    assert "refused: RuntimeError \\| with a way out" in table
    assert "| seen |" not in table and "seen" in table
    assert f"| {stacks.NAMES[2].partition(': ')[2]} | not run | not run |  |" in table
    assert "CPU: torch 2.13.0, python 3.11.7" in table
    assert "CUDA: torch 2.11.0, python 3.12.3, cuda 13.0, device H100" in table
    assert "| base MiB | ours MiB |" in table and "| 3 | 4.2 |" in table
