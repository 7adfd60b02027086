"""The table of what works where: its rows, and the plugin that fills it in from the tests that prove them.

    @pytest.mark.stack("torch.compile: fullgraph training step")
    @pytest.mark.stack("devices and threads: vmap", refused="an error that names the way out")

A test may prove several rows, a row may need several tests. The device is that of the test's ``device`` parameter, else
``device="cpu" | "cuda" | "2 x cuda"`` of the marker, else the CPU. ``note="..."`` is a remark for the table and
``uses=("transformers",)`` names packages whose versions matter. What a test hands to pytest's ``record_property`` is kept
as a measurement of its rows.

With the environment variable KASMINA_STACKS=FILE, a run merges what it found into that JSON: row -> device ->
``{"result": "works" | "refused" | "fails" | "not run", "tests": n, "versions": {...}, "note": ..., "source": ...}``. A row
works where all of its tests passed; one that a machine could not run keeps what another machine found with the same
sources. What was found with others is dropped: it says nothing of these.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

VARIABLE = "KASMINA_STACKS"
DEVICES = ("cpu", "cuda", "2 x cuda")
RESULTS = ("works", "refused", "fails", "not run")

# Group by group, in the table's order. A row's name is "group: rest".
ROWS: dict[str, tuple[str, ...]] = {
    "torch.compile": (
        "fullgraph forward",
        "fullgraph training step",
        "dynamic=True, no recompilation from batch 2 up",
        "mode='reduce-overhead', CUDA graphs not skipped",
        "one graph through all states, strategies, alpha ramps, recycling and step_lifecycle",
        "telemetry counts each batch once",
        "telemetry on and off recompiles at most once",
        "request_state_transitions and step_lifecycle traced",
        "compiled autograd, the whole step in one function",
        "state changed between forward and backward",
    ),
    "CUDA graphs": (
        "torch.cuda.graph, state, alpha and weights changed between replays",
        "make_graphed_callables, state, alpha and weights changed between replays",
    ),
    "export": (
        "torch.export, strict",
        "torch.export, non-strict",
        "ExportedProgram saved and loaded",
        "AOTInductor package",
        "state changed afterwards through buffers",
        "training an exported program",
    ),
    "activation checkpointing": (
        "non-reentrant",
        "reentrant",
        "nested",
        "selective (create_selective_checkpoint_contexts)",
        "under torch.compile",
        "preserve_rng_state",
    ),
    "mixed precision": (
        "autocast, bfloat16",
        "autocast, float16 with GradScaler",
        ".bfloat16() model with a float32 bank",
        "gradient clipping",
        "fused and foreach optimizers",
        "gradient accumulation",
    ),
    "distributed": (
        "DDP, static_graph on and off, no unused parameters",
        "DDP, gradients accumulated with no_sync",
        "DDP, two forwards before a backward",
        "DDP, telemetry of each rank kept (prepare_ddp)",
        "DDP, compiled before and after it is wrapped",
        "FSDP2 fully_shard",
        "FSDP2 mixed precision",
        "FSDP2, germination and other writes to a sharded bank",
        "FSDP2, compiled",
        "FullyShardedDataParallel (FSDP1)",
        "DDP and FSDP2 with activation checkpointing",
        "tensor parallel base layer",
        "sync_telemetry merges ranks exactly",
        "lifecycle_digest and sync_lifecycle heal a rank that diverged",
        "elastic restart on another number of ranks",
    ),
    "shapes": (
        "Conv1d, Conv2d, Conv3d",
        "norms",
        "NCHW and channels_last without copies",
        "Embedding",
        "nn.Sequential and whole blocks as base layer",
        "base layers with extra and keyword arguments",
        "base layers that return tuples",
        "shared layers used twice in a forward",
        "nn.TransformerEncoder in evaluation (its fused kernels)",
        "out_proj of nn.MultiheadAttention",
        "nested tensors, jagged and strided",
    ),
    "devices and threads": (
        "second GPU, current and not",
        "side streams",
        "inference from 8 threads",
        "fork after import, DataLoader workers",
        "fork after CUDA was initialised",
        "meta device, skip_init, deferred init and to_empty",
        "inference_mode and no_grad",
        "functional_call",
        "torch.func.grad",
        "vmap",
        "second derivatives",
        "forward hooks",
        "parametrizations",
        "weight sharing",
        "copy.deepcopy and pickling the module",
        "moving between devices while training",
    ),
    "models": (
        "GPT-2 under transformers.Trainer",
        "GPT-2 under Lightning",
        "Llama under transformers.Trainer",
        "Llama under Lightning",
        "ResNet-like network under transformers.Trainer",
        "ResNet-like network under Lightning",
        "compiled and eager loss curves agree, GPT-2",
        "compiled and eager loss curves agree, Llama",
        "compiled and eager loss curves agree, ResNet-like network",
        "generation with a KV cache after training",
        "save_pretrained and from_pretrained",
        "peak memory of a training step, GPT-2",
        "peak memory of a training step, Llama",
        "peak memory of a training step, ResNet-like network",
    ),
    "introspection": (
        "operators by name in torch.profiler",
        "operators by name in Nsight (NVTX)",
        "torch.library.opcheck",
        "python -m kasmina_ext",
    ),
}
NAMES = tuple(f"{group}: {row}" for group, rows in ROWS.items() for row in rows)


@dataclass
class Found:
    """What this run saw of a row on a device."""

    outcomes: list[str] = field(default_factory=list)  # "passed", "failed", "skipped", one for each test
    reasons: list[str] = field(default_factory=list)  # why tests were skipped
    refused: str = ""
    notes: list[str] = field(default_factory=list)
    packages: set[str] = field(default_factory=set)
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def result(self) -> str:
        if "failed" in self.outcomes:
            return "fails"
        if "skipped" in self.outcomes:
            return "not run"
        return "refused" if self.refused else "works"

    def entry(self, device: str, source: str) -> dict[str, Any]:
        remarks = self.reasons if self.result == "not run" else [self.refused, *self.notes]
        entry = {
            "result": self.result,
            "tests": len(self.outcomes),
            "versions": {} if self.result == "not run" else versions(device, self.packages),
            "note": "; ".join(dict.fromkeys(filter(None, remarks))),
            "source": source,
        }
        return entry | ({"measured": self.measured} if self.measured else {})


def versions(device: str, packages: set[str]) -> dict[str, str]:
    known = {"torch": torch.__version__, "python": platform.python_version()}
    if device != "cpu":
        known |= {"cuda": torch.version.cuda or "", "device": torch.cuda.get_device_name()}
    return known | {name: importlib.metadata.version(name) for name in sorted(packages)}


def device_of(item: pytest.Item, mark: pytest.Mark) -> str:
    callspec = getattr(item, "callspec", None)
    parameter = callspec.params.get("device") if callspec else None
    device = mark.kwargs.get("device") or str(parameter or "cpu")
    if device not in DEVICES:
        raise pytest.UsageError(f"{item.nodeid}: the device of a stack must be one of {DEVICES}, got {device!r}")
    return device


@dataclass
class Running:
    """A marked test of which not all reports have come yet."""

    rows: list[dict[str, Any]]
    outcome: str = "passed"
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Plugin:
    """Gathers outcomes of marked tests, and merges them into ``path`` at the end where one is given.

    What a test is marked with travels with its reports: under pytest-xdist tests run in workers, and only the process
    that all reports come to writes.
    """

    def __init__(self, path: Path | None, is_worker: bool = False) -> None:
        self.path = path
        self.is_worker = is_worker
        self.found: dict[tuple[str, str], Found] = {}
        self._running: dict[str, Running] = {}

    # ---- where tests run -----------------------------------------------------------------------------------------

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for mark in item.iter_markers("stack"):
                if len(mark.args) != 1 or mark.args[0] not in NAMES:
                    raise pytest.UsageError(f"{item.nodeid}: no such row in tests/stacks.py: {mark.args}")
                device_of(item, mark)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        report = yield
        report.stack_rows = [
            {
                "row": mark.args[0],
                "device": device_of(item, mark),
                "refused": mark.kwargs.get("refused", ""),
                "note": mark.kwargs.get("note", ""),
                "uses": list(mark.kwargs.get("uses", ())),
            }
            for mark in item.iter_markers("stack")
        ]
        return report

    # ---- where reports come to -----------------------------------------------------------------------------------

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.is_worker:
            return
        rows = getattr(report, "stack_rows", [])
        if report.when == "setup" and rows:
            self._running[report.nodeid] = Running(rows)
        running = self._running.get(report.nodeid)
        if running is None:
            return
        worse = {"passed": 0, "skipped": 1, "failed": 2}
        running.outcome = max(running.outcome, report.outcome, key=worse.__getitem__)
        if report.skipped and hasattr(report, "wasxfail"):  # known not to work, and said
            running.outcome = "failed"
            running.notes.append(report.wasxfail.removeprefix("reason: "))
        elif report.skipped and isinstance(report.longrepr, (tuple, list)):
            running.reasons.append(report.longrepr[2].removeprefix("Skipped: "))
        if report.when not in ("setup", "call"):  # "???": the worker has crashed
            self._keep(self._running.pop(report.nodeid), report.user_properties)

    def _keep(self, test: Running, measured: list[tuple[str, Any]]) -> None:
        for row in test.rows:
            found = self.found.setdefault((row["row"], row["device"]), Found())
            found.outcomes.append(test.outcome)
            found.reasons += test.reasons
            found.notes += test.notes
            found.refused = found.refused or row["refused"]
            found.notes.append(row["note"])
            found.packages.update(row["uses"])
            found.measured.update(measured)

    def pytest_sessionfinish(self) -> None:
        if self.path is None or not self.found:
            return
        source, found = source_of(), {}
        for (name, device), seen in self.found.items():
            found.setdefault(name, {})[device] = seen.entry(device, source)
        write_table(self.path, merged(read_table(self.path), found, source))


Table = dict[str, dict[str, dict[str, Any]]]
"""Row -> device -> entry, as in the JSON."""


def source_of() -> str:
    """Names the sources that a result is of."""
    import evidence  # of scripts/, which conftest.py puts on the path

    return evidence.source_hash()[:16]


def read_table(path: Path) -> Table:
    return json.loads(path.read_text()) if path.exists() else {}


def write_table(path: Path, table: Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")


def merged(known: Table, found: Table, source: str, *, another_machine: bool = False) -> Table:
    """``known`` with what was found, of ``source`` alone: all rows in the table's order, and no others.

    What was found is later and replaces what was known, unless it was not run. Of another machine, though, it only fills
    in what was not run here, or says what fails there.
    """
    table: Table = {}
    for name in NAMES:
        entries = _of_source(known, name, source)
        for device, new in _of_source(found, name, source).items():
            old = entries.get(device, {"result": "not run"})["result"]
            replaces = old == "not run" or new["result"] == "fails" if another_machine else new["result"] != "not run"
            if device not in entries or replaces:
                entries[device] = new
        table[name] = {device: entries[device] for device in DEVICES if device in entries}
    return table


def _of_source(table: Table, name: str, source: str) -> dict[str, dict[str, Any]]:
    return {device: entry for device, entry in table.get(name, {}).items() if entry.get("source") == source}


def register(config: pytest.Config) -> None:
    """For conftest.py: the marker, and what it does."""
    config.addinivalue_line("markers", "stack(row, refused=, note=, device=, uses=): proves a row of tests/stacks.py")
    path = os.environ.get(VARIABLE)
    config.pluginmanager.register(Plugin(Path(path) if path else None, hasattr(config, "workerinput")), "stacks")


def marked_rows(folder: Path) -> set[str]:
    """Rows that the tests of a folder name, read from their source: nothing is imported or run."""
    rows = set()
    for path in sorted(folder.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "stack":
                rows.update(arg.value for arg in node.args if isinstance(getattr(arg, "value", None), str))
    return rows
