"""Random orders to a layer against the plain-Python model; scripts/run_state_machine.py runs thousands of the same."""

from __future__ import annotations

import os

from hypothesis.stateful import run_state_machine_as_test
from lifecycle_machine import machine_on, run_settings

RUNS = int(os.environ.get("KASMINA_STATE_MACHINE_RUNS", "40"))


def test_no_divergence(device):
    machine = machine_on(device)
    run_state_machine_as_test(machine, settings=run_settings(RUNS, derandomize=True))
    assert machine.runs >= RUNS and machine.steps > 5 * RUNS
