"""How many examples are tried, by profile: in `make test` a few that stay the same, in `make fuzz` 10,000 new ones."""

from __future__ import annotations

import functools
import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, seed, settings

UNHURRIED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
# without the phase that explains a failure, which runs it a hundred times more
PHASES = [Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink]
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 10_000))
settings.register_profile("test", max_examples=20, derandomize=True, database=None, phases=PHASES, **UNHURRIED)
settings.register_profile("fuzz", max_examples=EXAMPLES, print_blob=True, phases=PHASES, **UNHURRIED)
settings.load_profile("test")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """These tensors are so small that a second thread costs more than it does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items):
    """Seeds each function by FUZZ_SEED. Hypothesis' own option would leave failures out of its database."""
    if "FUZZ_SEED" in os.environ:
        for item in items:
            if hasattr(getattr(item, "obj", None), "hypothesis"):
                seed(int(os.environ["FUZZ_SEED"]))(item.obj)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Counts the examples that a test was called with."""
    found = getattr(pyfuncitem.obj, "hypothesis", None)
    if found is None:
        return (yield)
    inner, tried = found.inner_test, 0

    @functools.wraps(inner)
    def counted(*arguments, **named):
        nonlocal tried
        tried += 1
        return inner(*arguments, **named)

    found.inner_test = counted
    try:
        return (yield)
    finally:
        found.inner_test = inner
        pyfuncitem.user_properties.append(("examples", tried))


def pytest_terminal_summary(terminalreporter):
    if settings.get_current_profile_name() != "fuzz":
        return
    reports = [r for key in ("passed", "failed") for r in terminalreporter.stats.get(key, []) if r.when == "call"]
    tried = {r.nodeid.rpartition("::")[2]: (dict(r.user_properties).get("examples"), r.duration) for r in reports}
    tried = {name: found for name, found in tried.items() if found[0]}
    if tried:
        terminalreporter.section("examples tried")
        for name, (examples, seconds) in sorted(tried.items()):
            terminalreporter.line(f"{examples:>8,}  {seconds:>7.1f} s  {name}")
