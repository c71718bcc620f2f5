"""`pytest benchmarks`: one test for every way of every case, so that pytest-benchmark's tables, JSON and comparisons
can be used. Its clock tells what `benchmarks.speed.measure` has measured: seconds of ways that ran in turn."""

from __future__ import annotations

import pytest

from benchmarks.speed.measure import wrong


class RecordedClock:
    """A timer that pytest-benchmark reads before and after a call which lets recorded seconds pass."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def let_pass(self, seconds) -> None:
        self.now += next(seconds)


clock = RecordedClock()


@pytest.mark.benchmark(timer=clock, disable_gc=False)
def test_way(measured, way, benchmark):
    result = measured["ways"][way]
    reason = result.get("absent") or result.get("failed")
    ours = way.startswith("tokensel")
    assert not (ours and "failed" in result and reason != "out of memory"), reason
    if reason:
        pytest.skip(reason)
    assert not (ours and wrong(result)), f"{way}: {wrong(result)}"
    benchmark.group = measured["name"]
    benchmark.extra_info.update(extra_mib=result["extra_mib"], errors=result["errors"], floor=measured.get("floor"))
    seconds = result.get("seconds") or [result["first_run"]]
    benchmark.pedantic(clock.let_pass, args=(iter(seconds),), rounds=len(seconds))
