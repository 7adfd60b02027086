"""Random cases on every backend and device against the oracle; scripts/run_oracle.py runs thousands of the same."""

from __future__ import annotations

import cases
import checks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


class HypothesisDraw:
    """Decisions by hypothesis, so that a failing case shrinks to a small one."""

    def __init__(self, data: st.DataObject):
        self.data = data

    def integer(self, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high))

    def choice(self, options):
        return self.data.draw(st.sampled_from(options))


@checks.backends
@settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_matches_oracle(backend, device, data):
    case = cases.draw_case(HypothesisDraw(data))
    assert checks.check_case(case, backend, device) == [], f"{case!r}"
