"""``python -m kasmina_ext checkpoint``: what it prints, as text and JSON, and the exit codes."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from checkpoint_cases import HEADER, tree_of, write_old
from checkpoint_cases import OLD_NAME as NAME

from kasmina_ext import __main__ as program
from kasmina_ext.checkpoint import CheckpointManager, cli, format


@pytest.fixture
def root(tmp_path):
    manager = CheckpointManager(tmp_path / "checkpoints")
    manager.save_checkpoint("layer", 3, {"lifecycle_state": 3, "loss": math.nan}, {"w": torch.ones(2, 3)})
    manager.save_layer("net", "latest", {"config": {"seeds": 5}}, priority="critical", summary={"seeds": 5})
    return manager.checkpoint_dir


def run(capsys, *arguments):
    """(exit code, stdout, stderr)"""
    try:
        code = program.main(["checkpoint", *map(str, arguments)])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys, *arguments):
    code, out, err = run(capsys, *arguments, "--json")
    assert err == ""
    return code, json.loads(out)


def names(root):
    return sorted(path.name for path in root.iterdir() if not path.name.startswith("."))


def damage(path):
    data = (path / "tensors.safetensors").read_bytes()
    (path / "tensors.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


# ---- usage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["list"],
        ["list", "a", "b"],
        ["show"],
        ["convert", "a"],
        ["prune", "a"],
        ["prune", "a", "--keep", "0"],
        ["prune", "a", "--keep", "many"],
        ["prune", "a", "--keep", "-1"],
        ["verify", "a", "--fast"],
    ],
    ids=" ".join,
)
def test_wrong_usage(capsys, arguments):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == "" and "usage: " in err


def test_help(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(word in out for word in ("list", "verify", "show", "convert", "prune", "Exit codes"))


def test_the_report_without_a_tool_is_as_before(capsys):
    assert program.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]


def test_json_may_be_asked_for_before_the_tool(capsys, root):
    assert program.main(["--json", "checkpoint", "list", str(root)]) == 0
    assert len(json.loads(capsys.readouterr().out)["checkpoints"]) == 2


@pytest.mark.parametrize("command", [["list"], ["verify"], ["show"], ["prune", "--keep", "1"], ["convert"]], ids=str)
def test_a_directory_that_is_not_there(capsys, tmp_path, command):
    missing = tmp_path / "missing"
    more = [tmp_path / "new"] if command == ["convert"] else []
    code, out, err = run(capsys, *command, missing, *more)
    assert (code, out) == (1, "")
    assert err.startswith("error: ") and str(missing) in err
    code, found = run_json(capsys, *command, missing, *more)
    assert code == 1 and str(missing) in found["error"]
    assert list(tmp_path.iterdir()) == []


# ---- list ----------------------------------------------------------------------------------------


def test_list(capsys, root):
    code, found = run_json(capsys, "list", root)
    assert code == 0
    assert [entry["kind"] for entry in found["checkpoints"]] == ["layer", "seed"]
    assert found["checkpoints"][1]["lifecycle_state"] == 3
    assert found["damaged"] == []
    code, out, _ = run(capsys, "list", root)
    assert code == 0
    assert out.startswith(f"2 checkpoints in {root}\n")
    assert all(name in out for name in [*names(root), "GRAFTING", "critical"])


def test_list_tells_what_is_damaged(capsys, root):
    (root / names(root)[0] / "checksum").write_bytes(b"0")
    code, found = run_json(capsys, "list", root)
    assert code == 1
    assert found["damaged"][0]["checkpoint_id"] == names(root)[0]
    assert len(found["checkpoints"]) == 1
    code, out, _ = run(capsys, "list", root)
    assert code == 1 and f"damaged: {names(root)[0]}: metadata.json: " in out


def test_list_of_nothing(capsys, tmp_path):
    assert run(capsys, "list", tmp_path)[0] == 0
    assert tree_of(tmp_path) == {}


def test_names_cannot_command_the_terminal(capsys, tmp_path):
    path = write_old(tmp_path, layer_id="\x1b[31mred\n", state={"\x1b]0;title\x07": "[bold]\x1b[2J"})
    for command in ("list", "show", "verify"):
        _, out, err = run(capsys, command, tmp_path if command == "list" else path)
        assert "\x1b" not in out + err
    _, out, _ = run(capsys, "show", path)
    assert "\\x1b[31mred\\n" in out and "[bold]\\x1b[2J" in out


def test_a_terminal_gets_a_table(capsys, root, monkeypatch):
    monkeypatch.setattr(cli.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "150")
    code, out, _ = run(capsys, "list", root)
    assert code == 0 and "─" in out and names(root)[0] in out
    code, out, _ = run(capsys, "show", root / names(root)[0])
    assert code == 0 and "─" in out and "blueprint_state.w" in out
    monkeypatch.setitem(sys.modules, "rich", None)
    assert "─" not in run(capsys, "list", root)[1]


# ---- verify --------------------------------------------------------------------------------------


def test_verify(capsys, root):
    CheckpointManager(root).delete_checkpoint(CheckpointManager(root).save_checkpoint("old", 1, {}), archive=True)
    code, out, _ = run(capsys, "verify", root)
    assert code == 0 and out.endswith("3 of 3 checkpoints are whole\n")
    path = root / names(root)[0]
    assert run_json(capsys, "verify", path) == (
        0,
        {
            "directory": str(root),
            "checkpoints": [{"checkpoint_id": path.name, "ok": True, "error": None}],
            "ok": True,
        },
    )
    damage(path)
    code, out, _ = run(capsys, "verify", root)
    assert code == 1
    assert f"Integrity check failed for checkpoint {path.name}: tensors.safetensors: " in out
    assert "2 of 3 checkpoints are whole" in out
    code, found = run_json(capsys, "verify", path)
    assert code == 1 and not found["ok"] and "tensors.safetensors" in found["checkpoints"][0]["error"]


def test_verify_follows_no_link_to_a_checkpoint(capsys, root, tmp_path):
    (tmp_path / "link").symlink_to(root / names(root)[0])
    code, out, _ = run(capsys, "verify", tmp_path / "link")
    assert code == 1 and "is a symbolic link" in out
    (tmp_path / "root").symlink_to(root)
    assert run(capsys, "verify", tmp_path / "root")[0] == 0


def test_verify_from_inside(capsys, root, monkeypatch):
    monkeypatch.chdir(root / names(root)[0])
    code, out, _ = run(capsys, "verify", ".")
    assert code == 0 and "1 of 1" in out


def test_verify_what_is_removed_meanwhile(capsys, root, monkeypatch):
    real = cli.read_any

    def vanish(folder, name):
        CheckpointManager(folder).delete_checkpoint(name)
        return real(folder, name)

    monkeypatch.setattr(cli, "read_any", vanish)
    path = root / names(root)[0]
    code, out, _ = run(capsys, "verify", path)
    assert code == 1 and f"gone: {path.name}" in out
    assert run(capsys, "verify", root) == (0, "0 of 0 checkpoints are whole\n", "")


# ---- show ----------------------------------------------------------------------------------------


def test_show(capsys, root):
    seed, layer = names(root)
    code, out, _ = run(capsys, "show", root / seed)
    assert code == 0
    assert "blueprint_state.w\tfloat32\t[2, 3]" in out
    assert "state_data.loss\tfloat\tnan" in out
    assert "priority\tnormal" in out
    code, found = run_json(capsys, "show", root / seed)
    assert code == 0
    assert found["content"]["blueprint_state"] == {"w": {"dtype": "float32", "shape": [2, 3]}}
    assert found["content"]["state_data"] == {"lifecycle_state": 3, "loss": "nan"}
    code, found = run_json(capsys, "show", root / layer)
    assert found["tag"] == "latest" and found["content"]["content"] == {"config": {"seeds": 5}}
    damage(root / seed)
    code, out, err = run(capsys, "show", root / seed)
    assert (code, out) == (1, "") and "tensors.safetensors" in err
    code, out, err = run(capsys, "show", root)
    assert code == 1 and "is no checkpoint" in err
    (root / "seeds.safetensors").write_bytes(b"seeds")
    for command in ("show", "verify"):
        code, out, err = run(capsys, command, root / "seeds.safetensors")
        assert code == 1 and "seeds.safetensors is a file, not a checkpoint" in err


# ---- convert -------------------------------------------------------------------------------------


def test_convert(capsys, tmp_path, root):
    old, new = tmp_path / "old", tmp_path / "new"
    write_old(old, tensors={"w": torch.ones(2)})
    write_old(old, "broken", tensors={"w": torch.ones(2)})
    (old / "broken/tensors/w.pt").write_bytes(b"")
    (root / names(root)[0]).rename(old / names(root)[0])
    before = tree_of(old)
    code, found = run_json(capsys, "convert", old, new)
    assert code == 1
    assert found["converted"] == [NAME]
    assert found["left"] == [names(old)[-1] if names(old)[-1] != NAME else names(old)[1]]
    assert [row["checkpoint_id"] for row in found["failed"]] == ["broken"]
    assert "tensors/w.pt" in found["failed"][0]["error"]
    assert tree_of(old) == before
    assert names(new) == [NAME]
    assert run(capsys, "verify", new)[0] == 0
    code, out, _ = run(capsys, "convert", old / NAME, new)
    assert code == 0 and f"already there: {NAME}" in out
    assert "0 converted, 1 already there, 0 left alone, 0 failed" in out
    CheckpointManager(new).delete_checkpoint(NAME)
    format.write(new, NAME, HEADER, {"other": 1})
    code, out, _ = run(capsys, "convert", old / NAME, new)
    assert code == 1 and "File exists" in out and "0 converted, 0 left alone, 1 failed" in out
    code, out, _ = run(capsys, "convert", old / NAME, tmp_path / "other")
    assert code == 0 and f"converted: {NAME}" in out
    code, _, err = run(capsys, "convert", old, old)
    assert code == 1 and "give another directory" in err


def test_json_of_what_json_lacks(capsys, tmp_path):
    manager = CheckpointManager(tmp_path)
    name = manager.save_layer("net", "t", {"x": float("nan")}, summary={"x": float("nan"), "y": {(1, 2): 3}})
    for command in (("list", tmp_path), ("show", tmp_path / name)):
        code, found = run_json(capsys, *command)
        summary = found["checkpoints"][0]["summary"] if "checkpoints" in found else found["summary"]
        assert code == 0 and summary == {"x": "nan", "y": {"(1, 2)": 3}}


# ---- prune ---------------------------------------------------------------------------------------


def test_prune(capsys, root):
    manager = CheckpointManager(root)
    kept = [manager.save_checkpoint("layer", 3, {}) for _ in range(2)]
    (root / ".removed-0123456789abcdef").mkdir()
    oldest = manager.list_checkpoints("layer", 3)[-1]["checkpoint_id"]
    code, found = run_json(capsys, "prune", root, "--keep", 2)
    assert (code, found) == (0, {"directory": str(root), "removed": [oldest], "not_removed": []})
    code, out, _ = run(capsys, "prune", root, "--keep", 1)
    assert code == 0
    assert out == f"removed: {kept[0]}\n1 checkpoints removed\n"
    assert len(list(root.iterdir())) == 2


def test_prune_that_cannot(capsys, root, monkeypatch):
    monkeypatch.setattr(CheckpointManager, "_remove", lambda self, entries: [])
    name = CheckpointManager(root).save_checkpoint("layer", 3, {})
    code, out, _ = run(capsys, "prune", root, "--keep", 1)
    assert code == 1 and "not removed: layer_3_" in out and name not in out
