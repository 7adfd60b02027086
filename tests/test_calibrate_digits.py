"""What calibration brings: a digit classifier, damaged, and twenty images without labels."""

from __future__ import annotations

import copy

import demo_task as task
import numpy as np
import pytest

import kasmina_ext as kx

# What is left of the accuracy at most, and what comes back at least, over three networks.
BOUNDS = {"prune": (65, 70), "drift": (70, 88)}


@pytest.mark.parametrize("kind", BOUNDS)
def test_accuracy_comes_back(device, one_thread, kind):
    """90 % of the hidden weights gone, or gains that have drifted by a factor of e to the power of a normal number."""
    accuracies, most, least = [], *BOUNDS[kind]
    for seed in range(3):
        data = task.load(seed, device)
        healthy = task.train_base(data, seed, 250, lambda steps: None)
        model = copy.deepcopy(healthy)
        task.damage(model, kind, seed)
        before = task.accuracy(model, data.test)
        for i in range(task.HIDDEN_LAYERS):
            model[2 * i] = kx.KasminaLayer(model[2 * i], chunk_size=8)
        report = kx.calibrate_(model, healthy, [data.train[0][:20]])
        after = task.accuracy(model, data.test)
        assert after > before and all(row["after"] > max(row["before"], 0.3) for row in report.values())
        accuracies.append((before, after))
    before, after = np.mean(accuracies, 0)
    assert before < most and after > least, accuracies
