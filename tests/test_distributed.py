"""More than one process, on a CPU with gloo: `ranks.py` is what they run, one launch for all that goes together."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch

import tokensel

# Both sides are float64 and add up the same terms in another order (each rank's sum, then the ranks'), so weights of
# order 1 may be some units in the last place apart: 2e-16 seen. The updates move them by more than 1e-2.
TIGHT = 1e-13


JOBS = ("spread", "trainers", "refusals", "death")


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """(directory, standard error, seconds from a rank's death to the end) of one launch that does all jobs."""
    directory, here = tmp_path_factory.mktemp("ranks"), Path(__file__).parent
    ranks.recorded_settings(directory)  # makes the stores
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here), str(Path(tokensel.__file__).parents[1]), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks.RANKS}"]
    command += [str(here / "ranks.py"), ",".join(JOBS), str(directory)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    died = directory / "death"
    assert died.exists() and done.returncode, done.stderr.partition("ChildFailedError")[0][-6000:]
    return directory, done.stderr, time.time() - died.stat().st_mtime


@pytest.fixture(scope="module")
def found(launched):
    """[rank][job][name]: what each rank left behind."""
    return [{job: torch.load(launched[0] / f"{job}-{rank}.pt") for job in JOBS[:-1]} for rank in range(ranks.RANKS)]


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# The same three steps, however the model is spread


@pytest.mark.parametrize("name", ranks.SPREADS)
def test_two_ranks_train_as_one_process(found, name):
    options, _ = ranks.SPREADS[name]
    model = ranks.build(**options)
    start = ranks.full_weights(model)
    batches = ranks.global_batches()
    losses, selections = ranks.train(model, batches)
    assert largest_difference(start, ranks.full_weights(model)) > 1e-2
    for rank in range(ranks.RANKS):
        assert found[rank]["spread"][name]["losses"] == pytest.approx(losses, rel=TIGHT, abs=0)
        assert largest_difference(found[rank]["spread"][name]["weights"], ranks.full_weights(model)) < TIGHT
    for step, whole in enumerate(selections):
        parts = [found[rank]["spread"][name]["selections"][step] for rank in range(ranks.RANKS)]
        assert torch.equal(torch.cat(parts), whole)
        assert 0 < int(whole.sum()) < int((batches[step]["labels"] != -100).sum())
    assert not found[1]["spread"][name]["selections"][1].any()  # that rank had no response token


@pytest.mark.parametrize("name", ["sample", "batch"])
def test_two_ranks_of_a_trainer_train_as_one_process(found, launched, name):
    directory = launched[0]
    first, second = (rank["trainers"][name] for rank in found)
    settings = ranks.recorded_settings(directory)[name]
    alone = ranks.run_trainer(directory, per_device_train_batch_size=8, **settings)
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-6)  # the log rounds
    assert len(alone["losses"]) == 4
    for rank in (first, second):
        assert rank["totals"] == pytest.approx(alone["totals"], rel=1e-6)
        assert largest_difference(rank["weights"], alone["weights"]) < TIGHT
    assert first["kept"].keys().isdisjoint(second["kept"])
    assert first["kept"] | second["kept"] == alone["kept"]


# What goes wrong


@pytest.mark.parametrize(
    "case, message",
    [
        ("rho", "method_args must be the same on every rank; rank 0 has {'rho': 0.5} but rank 1 has {'rho': 0.6}"),
        ("method", "method must be the same on every rank; rank 0 has 'random' but rank 1 has 'min_k_pp'"),
        ("history", "history must be the same on every rank; rank 0 has 'none' but rank 1 has 'recorded'"),
        ("losses", "what history_nll was recorded as must be the same on every rank; rank 0 has '"),
        ("batches", "the number of batches must be the same on every rank; rank 0 has 4 but rank 1 has 3; set "),
    ],
)
def test_ranks_that_do_not_fit_together_all_refuse_to_start(found, case, message):
    for rank in found:
        assert rank["refusals"][case].startswith(message)


def test_ranks_that_fit_together_start(found):
    assert all("none" not in rank["refusals"] for rank in found)


def test_a_rank_that_dies_ends_the_job_with_its_error(launched):
    _, stderr, seconds = launched
    assert "RuntimeError: rank 1 is no more" in stderr
    assert seconds < 45  # gloo alone would give up after 60
