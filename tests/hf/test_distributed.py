"""More than one process, on a CPU with gloo: `ranks.py` is what they run, one launch for all that goes together."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import spread_ops
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import tokensel
from tokensel.ops.context_parallel import MassParts, prompt_mass_parts
from tokensel.store import HistoryStore

# Both sides are float64 and add up the same terms in another order (each rank's sum, then the ranks'), so weights of
# order 1 may be some units in the last place apart: 2e-16 seen. The updates move them by more than 1e-2.
TIGHT = 1e-13

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
JOBS = ("spread", *["zero3"] * HAS_DEEPSPEED, "checkpoint", "trainers", "vocabulary", "logprobs", "context")
JOBS += ("refusals", "death")


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """(directory, standard error, seconds from a rank's death to the end) of one launch that does all jobs."""
    directory, here = tmp_path_factory.mktemp("ranks"), Path(ranks.__file__).parent
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
    return [
        {job: torch.load(launched[0] / f"{job}-{rank}.pt", weights_only=True) for job in JOBS[:-1]}
        for rank in range(ranks.RANKS)
    ]


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# The same three steps, however the model is spread


def one_process(options):
    """(losses, selections, weights) of the same steps in this process."""
    model = ranks.build(**options)
    return *ranks.train(model, ranks.global_batches()), ranks.full_weights(model)


def check_against_one_process(found, options, tolerance):
    """found: what each rank left. Selections have to be equal, losses and weights to be within the tolerance."""
    losses, selections, weights = one_process(options)
    assert largest_difference(ranks.full_weights(ranks.build(**options)), weights) > 1e-2
    for rank in found:
        assert rank["losses"] == pytest.approx(losses, rel=0, abs=tolerance)
        assert largest_difference(rank["weights"], weights) < tolerance
    for step, (batch, whole) in enumerate(zip(ranks.global_batches(), selections, strict=True)):
        assert torch.equal(torch.cat([rank["selections"][step] for rank in found]), whole)
        assert 0 < int(whole.sum()) < int((batch["labels"] != -100).sum())
    assert not found[1]["selections"][1].any()  # that rank had no response token


@pytest.mark.parametrize("name", ranks.SPREADS)
def test_two_ranks_train_as_one_process(found, name):
    check_against_one_process([rank["spread"][name] for rank in found], ranks.SPREADS[name][0], TIGHT)


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs DeepSpeed: pip install deepspeed")
@pytest.mark.parametrize("name", ranks.ZERO3)
def test_two_ranks_of_zero3_train_as_one_process(found, name):
    # DeepSpeed's gradients and master weights are float32 whatever the model is: as far off as float32 training, twice
    options = ranks.ZERO3[name]
    *_, weights = one_process(options)
    *_, rounded = one_process(options | {"dtype": torch.float32})
    tolerance = 2 * largest_difference(weights, rounded)
    assert tolerance < 1e-4
    check_against_one_process([rank["zero3"][name] for rank in found], options, tolerance)


@pytest.mark.parametrize("name", [*ranks.TENSOR_PARALLEL, "tp-patched-after", "tp-live-history"])
def test_two_tensor_parallel_ranks_train_as_one_process(found, name):
    model = ranks.build()
    history = ranks.Shrunken() if name == "tp-live-history" else None
    losses, selections = ranks.train(model, ranks.global_batches(), history=history)
    for rank in found:
        assert rank["spread"][name]["losses"] == pytest.approx(losses, rel=TIGHT, abs=0)
        assert largest_difference(rank["spread"][name]["weights"], ranks.full_weights(model)) < TIGHT
        assert all(map(torch.equal, rank["spread"][name]["selections"], selections))


@pytest.mark.parametrize("name", ["sample", "batch", "last_seen", "average", "threshold"])
def test_two_ranks_of_a_trainer_train_as_one_process(found, launched, name):
    directory = launched[0]
    first, second = (rank["trainers"][name] for rank in found)
    settings = ranks.recorded_settings(directory)[name]
    batches = {"per_device_train_batch_size": 8}
    if name == "threshold":  # which is one of each micro-batch
        batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    alone = ranks.run_trainer(directory, **batches, **settings)
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-6)  # the log rounds
    assert len(alone["losses"]) == 4 * settings.get("num_train_epochs", 1)
    for rank in (first, second):
        assert rank["totals"] == pytest.approx(alone["totals"], rel=1e-6)
        assert largest_difference(rank["weights"], alone["weights"]) < TIGHT
        if name != "last_seen":  # whose documents stand in another order
            assert max([0, *((t - alone["state"][n]).abs().max() for n, t in rank["state"].items())]) < TIGHT
    assert first["kept"].keys().isdisjoint(second["kept"])
    assert first["kept"] | second["kept"] == alone["kept"]


def test_each_rank_has_a_denominator_of_its_own_where_tokens_are_not_averaged_across_them(found):
    first, second = (rank["trainers"]["apart"] for rank in found)
    losses, together = [], []
    for step in range(len(first["losses"])):
        parts = [rank["sums"][step] for rank in (first, second)]
        losses.append(sum(nll / count for nll, count in parts) / 2)
        together.append(sum(nll for nll, _ in parts) / sum(count for _, count in parts))
    assert first["losses"] == pytest.approx(losses, rel=1e-6)
    assert min(abs(a - b) for a, b in zip(losses, together, strict=True)) > 1e-4
    assert largest_difference(first["weights"], second["weights"]) == 0


def test_rows_that_fill_the_last_batch_up_are_not_evaluated_twice(found, launched):
    alone = ranks.held_out_loss(launched[0], True)
    for rank in found:
        assert rank["trainers"]["held out"] == pytest.approx([alone] * 5, rel=1e-12)
        assert "among 4 documents of 2 packed rows; set per_device_eval_batch_size=1" in rank["trainers"]["packed rows"]


def test_two_ranks_of_a_trainer_record_the_store_of_one_process(found, launched, tmp_path):
    made = ranks.make_trainer(tmp_path, method="full").record_history(tmp_path / "recorded.parquet")
    assert [rank["trainers"]["recorded"] for rank in found] == [made["response_tokens"]] * 2
    one, two = (HistoryStore.open(folder / "recorded.parquet") for folder in (tmp_path, launched[0]))
    assert one.fingerprint() == two.fingerprint() and len(one) > 20


def test_a_checkpoint_of_two_ranks_resumes_on_one(found, launched):
    model = ranks.build()
    optimizer = ranks.momentum(model)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=launched[0] / "shards")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    losses, selections = ranks.train(model, ranks.global_batches()[1:], optimizer=optimizer, first_step=1)
    for rank in found:
        assert rank["checkpoint"]["losses"] == pytest.approx(losses, rel=TIGHT, abs=0)
        assert largest_difference(rank["checkpoint"]["weights"], ranks.full_weights(model)) < TIGHT
    for step, kept in enumerate(selections):
        assert torch.equal(torch.cat([rank["checkpoint"]["selections"][step] for rank in found]), kept)


# A head whose vocabulary is spread over the ranks


def logits(hidden, weight, bias, softcap, logit_scale):
    return softcap * torch.tanh(logit_scale * (hidden @ weight.T + bias) / softcap)


def eager_gradients(dtype, coefficient):
    """Gradients of Σ coefficient · nll by autograd through logits of that dtype."""
    hidden, _, weight, bias, labels = spread_ops.head_inputs(dtype)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    z = logits(*leaves, **spread_ops.HEAD_OPTIONS)
    nll = torch.nn.functional.cross_entropy(z, labels, reduction="none")
    gradients = torch.autograd.grad((coefficient.to(z.dtype) * nll).sum(), leaves)
    return dict(zip(("hidden", "weight", "bias"), gradients, strict=True))


@pytest.mark.parametrize("dtype, impl", spread_ops.VOCABULARY_CASES)
def test_a_head_spread_over_two_ranks_selects_as_on_one(found, dtype, impl):
    first, second = (rank["vocabulary"][f"{dtype}-{impl}"] for rank in found)
    alone = spread_ops.head_step(dtype, impl)
    assert torch.equal(first["keep"], alone["keep"]) and 0 < int(alone["keep"].sum()) < 60
    for name, value in first["stats"].items():
        assert torch.equal(value, second["stats"][name])  # every rank knows the same
        torch.testing.assert_close(value, alone["stats"][name])
    assert torch.equal(first["loss"], second["loss"])
    torch.testing.assert_close(first["loss"], alone["loss"])
    # where its tensors lie decides the order in which a processor without wide registers adds
    torch.testing.assert_close(
        first["loss"], first["without stats"], rtol=2 * torch.finfo(first["loss"].dtype).eps, atol=0
    )


@pytest.mark.parametrize("dtype, impl", spread_ops.VOCABULARY_CASES)
def test_the_gradients_of_a_spread_head_are_within_twice_the_error_of_eager_ones(found, dtype, impl):
    kept = found[0]["vocabulary"][f"{dtype}-{impl}"]["keep"]
    coefficient = 3 * kept * torch.linspace(-1, 2, len(kept), dtype=torch.float64) / 10
    reference = eager_gradients(torch.float64, coefficient)
    eager = eager_gradients(getattr(torch, dtype), coefficient)
    for rank in found:
        for name, expected in reference.items():
            error = (rank["vocabulary"][f"{dtype}-{impl}"][name].double() - expected).abs().max()
            # float64 is the reference itself, to rounding; in a short sum eager may be right by luck
            rounding = 2 * torch.finfo(getattr(torch, dtype)).eps * expected.abs().max()
            budget = 2 * (eager[name].double() - expected).abs().max() + rounding if dtype != "float64" else 1e-14
            assert 0 < float(expected.abs().max()) and error <= budget, (name, float(error), float(budget))


@pytest.mark.parametrize("dtype, tolerance", [("float64", TIGHT), ("float32", 5e-6)])
def test_logprobs_and_divergences_of_a_spread_head_are_those_of_a_whole_one(found, dtype, tolerance):
    for name, expected in spread_ops.logprobs_step(dtype).items():
        first, second = (rank["logprobs"][dtype][name] for rank in found)
        assert torch.equal(first, second) and expected.any(), name
        torch.testing.assert_close(first, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def mesh():
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_one_rank_holds_the_whole_vocabulary(mesh):
    spread, plain = spread_ops.head_step("float32", "chunked", mesh), spread_ops.head_step("float32", "chunked")
    for name, value in plain.items():
        if name != "stats":
            assert torch.equal(spread[name], value), name


def test_a_teacher_of_a_whole_head_does_not_fit_a_student_of_a_spread_one(mesh):
    hidden, weight = distribute_tensor(torch.randn(4, 8), mesh, [Replicate()]), torch.randn(10, 8)
    student = hidden, distribute_tensor(weight, mesh, [Shard(0)])
    with pytest.raises(ValueError, match="must be sharded over the same ranks, or neither; shard both alike"):
        tokensel.token_divergence(student, (torch.randn(4, 8), weight), torch.ones(4, dtype=torch.bool))


@pytest.mark.parametrize(
    "hidden, weight, bias, impl, message",
    [
        (None, Shard(0), None, "auto", "hidden is a Tensor but weight is a DTensor"),
        (Replicate(), None, None, "auto", "hidden is a DTensor but weight is a Tensor"),
        (Replicate(), Shard(1), None, "auto", "weight must be sharded over dimension 0"),
        (Replicate(), Replicate(), None, "auto", "weight must be sharded over dimension 0"),
        (Shard(0), Shard(0), None, "auto", "hidden must be replicated over the mesh of weight"),
        (Replicate(), Shard(0), Replicate(), "auto", "bias must be sharded as weight is"),
        (Replicate(), Shard(0), Shard(0), "reference", "impl='reference' holds whole logits"),
    ],
)
def test_a_head_that_is_spread_otherwise_is_refused(mesh, hidden, weight, bias, impl, message):
    tensors = [torch.randn(4, 8), torch.randn(10, 8), torch.randn(10)]
    h, w, b = (
        tensor if placement is None else distribute_tensor(tensor, mesh, [placement])
        for tensor, placement in zip(tensors, (hidden, weight, bias), strict=True)
    )
    labels, options = torch.tensor([1, 2, 3, 4]), {"bias": None if bias is None else b, "impl": impl}
    for call in (
        lambda: tokensel.token_stats(h, w, labels, **options),
        lambda: tokensel.selected_cross_entropy(h, w, labels, labels > 1, **options),
        lambda: tokensel.top_logprobs(h, w, 2, **options),
    ):
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            call()


# Attention whose keys are spread over the ranks


@pytest.mark.parametrize("cut", spread_ops.CUTS)
def test_the_mass_of_a_sequence_spread_over_two_ranks_is_exact(found, cut):
    q, k, options = spread_ops.attention_inputs()
    expected = tokensel.prompt_attention_mass(q, k, **options, impl="reference")
    assert expected.count_nonzero() > 15
    mass = sum(rank["context"][cut] for rank in found)
    torch.testing.assert_close(mass, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("left_out", ["", "key_mask", "segment_ids", "turn_ids", "query_mask", "window", "sinks"])
def test_mass_in_parts_joins_to_the_mass_in_any_order(left_out):
    q, k, options = spread_ops.attention_inputs()
    options.pop(left_out, None)
    if "query_mask" not in options:  # the parts compute every row then
        options["query_mask"] = torch.ones_like(options["prompt_mask"])
    expected = tokensel.prompt_attention_mass(q.float(), k.float(), **options, impl="reference")
    sinks, place = options.pop("sinks", None), torch.arange(q.shape[2])
    query = {"query_documents": options.get("segment_ids"), "query_turns": options.get("turn_ids")}
    ids = {"key_documents": options.pop("segment_ids", None), "key_turns": options.pop("turn_ids", None)}
    per_key = {name: options.pop(name, None) for name in ("prompt_mask", "key_mask")} | ids
    if left_out == "query_mask":
        options.pop("query_mask")
    parts = []
    for keys in place[torch.randperm(len(place))].split(7):
        shard = {name: None if value is None else value[:, keys] for name, value in per_key.items()}
        positions = {"query_positions": place, "key_positions": keys}
        parts.append(prompt_mass_parts(q.float(), k[:, :, keys].float(), **shard, **positions, **query, **options))
    mass = MassParts.merge(parts).mass(sinks)
    if left_out == "query_mask":
        mass = mass * per_key["key_mask"]  # rows of padding are not asked for elsewhere
    torch.testing.assert_close(mass, expected)


def test_parts_that_do_not_fit_are_refused():
    q, k, place = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 3, 8), torch.arange(6)
    positions = {"query_positions": place, "key_positions": place[:3]}
    prompt = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="query_documents and key_documents go together"):
        prompt_mass_parts(q, k, prompt, **positions, key_documents=place[None, :3])
    with pytest.raises(ValueError, match=re.escape("k must have shape [B, Hk, K, d] = [1, Hk, K, 8]")):
        prompt_mass_parts(q, torch.randn(1, 3, 3, 8), prompt, **positions)
    with pytest.raises(ValueError, match="prompt_mask must have shape"):
        prompt_mass_parts(q, k, torch.ones(1, 6, dtype=torch.bool), **positions)
    with pytest.raises(ValueError, match="parts is empty"):
        MassParts.merge([])


# What goes wrong


@pytest.mark.parametrize(
    "case, message",
    [
        ("rho", "method_args must be the same on every rank; rank 0 has {'rho': 0.5} but rank 1 has {'rho': 0.6}"),
        ("method", "method must be the same on every rank; rank 0 has 'random' but rank 1 has 'min_k_pp'"),
        ("history", "history must be the same on every rank; rank 0 has 'auto' but rank 1 has 'recorded'"),
        ("losses", "what history_nll was recorded as must be the same on every rank; rank 0 has '"),
        ("batches", "the number of batches must be the same on every rank; rank 0 has 4 but rank 1 has 3; set "),
    ],
)
def test_ranks_that_do_not_fit_together_all_refuse_to_start(found, case, message):
    for rank in found:
        assert rank["refusals"][case].startswith(message)


def test_a_model_that_hands_out_part_of_its_logits_is_refused(found):
    for rank in found:
        message = rank["spread"]["tp-patched-after-part-of-logits"]
        assert re.search("spread over ranks already, and hands out 4[89] of 97 logits; call apply_to before", message)


def test_ranks_that_fit_together_start(found):
    assert all("none" not in rank["refusals"] for rank in found)


def test_a_rank_that_dies_ends_the_job_with_its_error(launched):
    _, stderr, seconds = launched
    assert "RuntimeError: rank 1 is no more" in stderr
    assert seconds < 45  # gloo alone would give up after 60
