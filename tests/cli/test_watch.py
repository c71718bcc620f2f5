"""What is recorded of watched rows while training, and the page that `tokensel report` makes of it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training import ROWS, TOKENIZER, build, eager_nll, make_trainer, record
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast

from tokensel.cli import main
from tokensel.report import TOKEN_FIELDS
from tokensel.report.watch import (
    SELECTION_FILE,
    SampleRecorder,
    agreement,
    churn,
    kept_by_position,
    load_run,
    selected_samples,
)
from tokensel.store import HistoryWriter


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    store = record(folder / "h.parquet", build(seed=2))
    trainer = make_trainer(
        folder, method="sstoken", history="recorded", history_store=store, record_samples=3, num_train_epochs=2
    )
    trainer.train()
    trainer.save_state()
    return folder / "out", trainer


def lines(folder):
    return [json.loads(line) for line in (folder / SELECTION_FILE).read_text(encoding="utf-8").splitlines()]


def test_watched_rows_are_recorded_before_training_and_at_each_epochs_end(run):
    folder, trainer = run
    records = lines(folder)
    assert [(r["epoch"], r["step"], r["scope"]) for r in records] == [
        (0, 0, "sample"),
        (1, 4, "sample"),
        (2, 8, "sample"),
    ]
    assert records[-1]["samples"] == selected_samples(trainer, {i: ROWS[i] for i in range(3)})


def test_a_sample_tells_what_the_step_computed(run):
    _, trainer = run
    (sample,) = selected_samples(trainer, {1: ROWS[1]})
    ids, labels = ROWS[1]["input_ids"], ROWS[1]["labels"]
    assert sample["tokens"] == [TOKENIZER.decode([i]) for i in ids]
    assert sample["response"] == [label != -100 for label in labels]
    own = [i for i, r in enumerate(sample["response"]) if r]
    logits = trainer.model(input_ids=torch.tensor([ids])).logits[0].detach().double()
    for i in own:
        nll = float(logits[i - 1].logsumexp(-1) - logits[i - 1, ids[i]])
        assert sample["nll"][i] == pytest.approx(nll, rel=1e-4, abs=1e-5)
        assert sample["rel"][i] == pytest.approx(sample["history_nll"][i] - nll, abs=1e-4)
    by_rank = sorted(own, key=lambda i: sample["rank"][i])
    assert [sample["rank"][i] for i in by_rank] == list(range(1, len(own) + 1))
    scores = [sample["score"][i] for i in by_rank]
    assert scores == sorted(scores, reverse=True)
    kept = [i for i in own if sample["kept"][i]]
    assert sorted(kept) == sorted(by_rank[: len(kept)]) and 0 < len(kept) < len(own)
    assert [sample["weight"][i] for i in own] == [float(sample["kept"][i]) for i in own]
    prompt = next(i for i, r in enumerate(sample["response"]) if not r)
    assert all(sample[name][prompt] is None for name in ("nll", "rel", "mass", "score", "rank", "weight"))
    assert set(sample) == {"title", "weight", *TOKEN_FIELDS}


def test_watching_changes_no_training(run, tmp_path):
    folder, watched = run
    store = str(folder.parent / "h.parquet")
    alone = make_trainer(tmp_path, method="sstoken", history="recorded", history_store=store, num_train_epochs=2)
    alone.train()
    for (name, a), (_, b) in zip(watched.model.named_parameters(), alone.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_curves_of_a_run(run):
    loaded = load_run(run[0])
    records = lines(run[0])
    assert loaded["name"] == "out" and loaded["samples"] == records[-1]["samples"]
    assert loaded["scope"] == "sample"
    # without what was recorded before training, where REL is rounding
    assert loaded["curves"]["churn"] == [[2, churn(records[1], records[2])]]
    assert loaded["curves"]["signal_agreement"] == [[4, agreement(records[1])], [8, agreement(records[2])]]
    assert loaded["curves"]["kept_by_position"] == kept_by_position(records[-1]) != kept_by_position(records[0])
    assert [step for step, _ in loaded["curves"]["rel_mean"]] == list(range(1, 9))
    assert [x for x, _ in loaded["curves"]["kept_by_position"]] == list(range(1, 11))
    assert all(-1 <= a <= 1 for _, a in loaded["curves"]["signal_agreement"])


@pytest.fixture
def copied(run, tmp_path):
    """The run's two files, to damage."""
    for name in (SELECTION_FILE, "trainer_state.json"):
        shutil.copy(run[0] / name, tmp_path / name)
    return tmp_path


def test_curves_of_a_run_of_one_epoch_or_none(copied):
    written = (copied / SELECTION_FILE).read_text(encoding="utf-8").splitlines(keepends=True)
    for count, agreements in ((2, 1), (1, 0)):
        (copied / SELECTION_FILE).write_text("".join(written[:count]), encoding="utf-8")
        curves = load_run(copied)["curves"]
        assert curves["churn"] == [] and len(curves["signal_agreement"]) == agreements
        assert curves["kept_by_position"] == kept_by_position(json.loads(written[count - 1]))


def sample(kept, rel=None, mass=None):
    n = len(kept)
    return {
        "response": [False, *[True] * n],
        "kept": [False, *kept],
        "rel": [None, *(rel or [0.0] * n)],
        "mass": [None, *(mass or [0.0] * n)],
    }


def test_churn_position_and_agreement_by_hand():
    before = {"samples": [sample([1, 1, 0, 0]), sample([1, 0])]}
    after = {"samples": [sample([1, 0, 1, 0]), sample([1, 0])]}
    assert churn(before, after) == pytest.approx(2 / 6) and churn(after, after) == 0
    assert kept_by_position(after, parts=2) == [[1, 2 / 3], [2, 1 / 3]]
    assert agreement({"samples": [sample([1, 1, 0], [1.0, 2.0, 3.0], [0.3, 0.2, 0.1])]}) == pytest.approx(-1)
    assert agreement({"samples": [sample([1, 1], [1.0, 1.0], [0.3, 0.2])]}) is None
    nothing = {"samples": [sample([])]}
    assert churn(nothing, nothing) is None and kept_by_position(nothing) == [] and agreement(nothing) is None


# Which rows are selected together


def test_tokens_that_are_unlearnt_are_not_dropped(tmp_path):
    recorded = {
        name: record(tmp_path / f"{name}.parquet", build(seed=seed)) for name, seed in (("base", 2), ("reference", 5))
    }
    settings = {"method": "forgetting", "method_args": {"rho": 0.7, "lambda_max": 0.5, "lambda_steps": 1}}
    trainer = make_trainer(tmp_path, recorded=recorded, **settings)
    trainer.train()
    samples = selected_samples(trainer, {i: ROWS[i] for i in range(3)})
    weights = [w for s in samples for w, r in zip(s["weight"], s["response"], strict=True) if r]
    best = math.ceil(0.7 * len(weights))
    assert sorted(set(weights)) == pytest.approx([-0.5 * best / (len(weights) - best), 1])
    assert all(s["kept"] == s["response"] for s in samples)


def test_tokens_that_a_weights_store_drops_are_dropped(tmp_path):
    with HistoryWriter(
        tmp_path / "w.parquet", tokenizer=TOKENIZER, model="-", max_length=64, dataset="-", content="weight"
    ) as writer:
        for row in ROWS:
            ids = torch.tensor([row["input_ids"]])
            writer.add(ids, torch.tensor([row["labels"]]), (ids % 3 - 1).double())
    trainer = make_trainer(tmp_path, method="weighted", weights_store=str(tmp_path / "w.parquet"))
    (sample,) = selected_samples(trainer, {1: ROWS[1]})
    expected = [
        i % 3 - 1 if label != -100 else None for i, label in zip(ROWS[1]["input_ids"], ROWS[1]["labels"], strict=True)
    ]
    assert sample["weight"] == expected and {-1, 0, 1, None} == set(expected)
    assert sample["kept"] == [bool(w) for w in expected]


def collator(side="right", masked=True):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZER.backend_tokenizer, pad_token="<pad>", padding_side=side
    )
    pad = DataCollatorForSeq2Seq(tokenizer, return_tensors="pt", pad_to_multiple_of=8)
    return pad if masked else lambda rows: {k: v for k, v in pad(rows).items() if k != "attention_mask"}


LAYOUTS = [
    {"collator": collator()},
    {"collator": collator("left")},
    {"packing": True},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["right", "left", "packed"])
@pytest.mark.parametrize("scope", ["batch", "micro_batch"])
def test_a_method_that_ranks_a_batch_ranks_the_watched_rows_together(tmp_path, scope, layout):
    reference = record(tmp_path / "r.parquet", build(seed=2))
    settings = {"method": "rho1", "method_args": {"scope": scope}, "recorded": {"reference": reference}}
    trainer = make_trainer(tmp_path, **layout, **settings)
    rows = {i: ROWS[i] for i in (5, 0, 3, 9)}
    own = [[label != -100 for label in row["labels"]] for row in rows.values()]
    excess = [(eager_nll(trainer.model, r) - eager_nll(build(seed=2), r)).tolist() for r in rows.values()]
    competing = sorted(
        (e for s, r in zip(excess, own, strict=True) for e, x in zip(s, r, strict=True) if x), reverse=True
    )
    least = competing[math.ceil(0.6 * len(competing)) - 1]
    samples = selected_samples(trainer, rows)
    assert [s["response"] for s in samples] == own
    assert [s["kept"] for s in samples] == [
        [x and e >= least for e, x in zip(s, r, strict=True)] for s, r in zip(excess, own, strict=True)
    ]
    assert ["".join(s["tokens"]) for s in samples] == [TOKENIZER.decode(r["input_ids"]) for r in rows.values()]
    assert [s["title"].split(":")[0] for s in samples] == [f"row {i}" for i in rows]
    alone = [selected_samples(trainer, {i: row})[0] for i, row in rows.items()]
    assert [s["kept"] for s in alone] != [s["kept"] for s in samples]
    for by_itself, together in zip(alone, samples, strict=True):
        assert [x for x in by_itself["nll"] if x is not None] == pytest.approx(
            [x for x in together["nll"] if x is not None], rel=1e-4, abs=1e-5
        )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_without_a_mask_is_cut_off(tmp_path, side):
    trainer = make_trainer(tmp_path, method="eslm", collator=collator(side, masked=False))
    samples = selected_samples(trainer, {i: ROWS[i] for i in range(4)})
    assert [s["response"] for s in samples] == [[label != -100 for label in ROWS[i]["labels"]] for i in range(4)]
    assert ["".join(s["tokens"]) for s in samples] == [TOKENIZER.decode(ROWS[i]["input_ids"]) for i in range(4)]


def test_rows_that_the_collator_cuts_are_shown_as_they_are_trained(tmp_path):
    pad = collator("left")
    cut = lambda rows: pad([{name: values[:30] for name, values in row.items()} for row in rows])  # noqa: E731
    samples = selected_samples(make_trainer(tmp_path, method="eslm", collator=cut), {i: ROWS[i] for i in range(4)})
    assert ["".join(s["tokens"]) for s in samples] == [TOKENIZER.decode(ROWS[i]["input_ids"][:30]) for i in range(4)]


def test_planted_noise_is_found_under_padding_on_the_left(tmp_path):
    rows = {i: ROWS[i] | {"noise": [i % 2] * len(ROWS[i]["labels"])} for i in range(3)}
    pad = collator("left")

    def collate(features):
        batch = pad([{k: v for k, v in f.items() if k != "noise"} for f in features])
        return batch | {"noise": torch.zeros_like(batch["labels"])}

    samples = selected_samples(make_trainer(tmp_path, method="eslm", collator=collate), rows)
    assert [s["noise"] for s in samples] == [[x and i == 1 for x in s["response"]] for i, s in enumerate(samples)]


def test_the_documents_of_a_packed_row_stay_apart(tmp_path):
    collators = pytest.importorskip("trl.trainer.sft_trainer")
    pair = {name: ROWS[0][name] + ROWS[1][name] for name in ("input_ids", "labels")}
    rows = [pair | {"seq_lengths": [len(ROWS[i]["labels"]) for i in (0, 1)]}]
    collate = collators.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    trainer = make_trainer(tmp_path, rows=rows, collator=collate, method="full")
    (sample,) = selected_samples(trainer, SampleRecorder(trainer, 1).rows)
    alone = [eager_nll(trainer.model, ROWS[i]).tolist() for i in (0, 1)]
    expected = [nll for nll, r in zip(sum(alone, []), sample["response"], strict=True) if r]
    assert [nll for nll in sample["nll"] if nll is not None] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_scope_is_recorded(tmp_path):
    trainer = make_trainer(tmp_path, method="eslm", record_samples=2)
    trainer.train()
    trainer.save_state()
    assert [r["scope"] for r in lines(tmp_path / "out")] == ["micro_batch"] * 2
    assert load_run(tmp_path / "out")["scope"] == "micro_batch"


# What a run leaves


@pytest.fixture
def resume(run, tmp_path):
    recorder = SampleRecorder(run[1], 1)
    recorder.file = tmp_path / SELECTION_FILE

    def begin(content):
        recorder.file.write_bytes(content)
        state = SimpleNamespace(is_world_process_zero=True, global_step=5, epoch=1.2)
        recorder.on_train_begin(run[1].args, state, None)
        return [r["step"] for r in lines(tmp_path)]

    return begin


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(resume):
    assert resume(b'{"step": 0}\n{"step": 4}\n{"step": 8}\n') == [0, 4]


def test_a_resumed_run_forgets_a_line_that_was_cut_short(resume):
    assert resume(b'{"step": 0}\n{"step": 4, "sam') == [0]
    assert resume(b'{"step": 0}\n{"step": 4}') == [0]  # a line is complete with its end only
    assert resume(b'{"st') == []


@pytest.mark.parametrize("line", [b'{"step": 4, "sam', b"[1]", b"{}", b"\xff\xfe", b""])
def test_a_resumed_run_refuses_a_damaged_line(resume, line):
    with pytest.raises(ValueError, match=rf"{SELECTION_FILE}: line 2 is .*; remove that line, or train again"):
        resume(b'{"step": 0}\n' + line + b'\n{"step": 4}\n')


def without(record, *names):
    return {k: v for k, v in record.items() if k not in names}


def first_sample(record, **changes):
    return record | {"samples": [record["samples"][0] | changes, *record["samples"][1:]]}


DAMAGED = {
    "line 2 is damaged or cut short": lambda r: b'{"epoch": 1, "st',
    "line 2 is damaged or cut short .*utf-8": lambda r: b"\xff\xfe\x00",
    "line 2 is no record": lambda r: b"[1]",
    "line 2 has no samples": lambda r: r | {"samples": []},
    "line 2 has no sample": lambda r: without(r, "samples"),
    "line 2 has a sample without title": lambda r: r | {"samples": ["x"]},
    'line 2 lacks "epoch" or "scope"': lambda r: without(r, "scope"),
    "line 2 has a sample without 'rank'": lambda r: first_sample(r, rank=None),
    "line 2 has a sample without 'rel', or one that is no list of its kind": lambda r: first_sample(r, rel=["a"]),
    "line 2 has a sample whose lists differ in length": lambda r: first_sample(r, mass=[]),
    "line 2 has other rows than line 1": lambda r: r | {"samples": r["samples"][1:]},
}


@pytest.mark.parametrize("message, damage", DAMAGED.items(), ids=DAMAGED)
def test_a_damaged_record_is_named_by_its_line(copied, capsys, message, damage):
    written = (copied / SELECTION_FILE).read_bytes().splitlines()
    line = damage(json.loads(written[1]))
    written[1] = line if isinstance(line, bytes) else json.dumps(line).encode()
    (copied / SELECTION_FILE).write_bytes(b"\n".join(written) + b"\n")
    with pytest.raises(ValueError, match=f"{SELECTION_FILE}: {message}.*; remove that line, or train again"):
        load_run(copied)
    assert main(["report", str(copied)]) == 2 and "Traceback" not in capsys.readouterr().err


def test_a_run_without_records_is_refused(copied):
    (copied / SELECTION_FILE).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{SELECTION_FILE} is empty; train again with --record_samples 8"):
        load_run(copied)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "line 1 is damaged or cut short"),
        (b'{\n "log_history": [', "line 2 is damaged or cut short"),
        (b"\xff\xfe\x00", "line 1 is damaged or cut short"),
        (b"{}", "lacks a log_history"),
        (b"[1]", "lacks a log_history"),
        (b'{"log_history": ["kept_share"]}', "lacks a log_history"),
        (b'{"log_history": [{"kept_share": 1}]}', "lacks a log_history"),
    ],
)
def test_a_damaged_trainers_state_is_refused(copied, content, message):
    (copied / "trainer_state.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"trainer_state.json.* {message}.*; train again"):
        load_run(copied)


def test_a_run_in_the_current_folder_has_its_name(copied, monkeypatch):
    monkeypatch.chdir(copied)
    assert load_run(Path("."))["name"] == copied.name


@pytest.mark.parametrize("count", [-3, 1.5, "8"])
def test_a_number_of_rows_that_is_none_is_refused(tmp_path, count):
    with pytest.raises(
        ValueError, match=f"record_samples must be a number of training rows, 0 for none; got {count!r}"
    ):
        make_trainer(tmp_path, method="random", record_samples=count)


def test_the_command_makes_a_page_of_several_runs(run, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["report", str(run[0]), str(run[0]), "--output", str(page)]) == 0
    assert "2 runs" in capsys.readouterr().out and "kept_by_position" in page.read_text(encoding="utf-8")
    assert main(["report", str(run[0])]) == 0 and (run[0] / "selection.html").is_file()
    assert main(["report", str(tmp_path)]) == 2
    assert "train with --record_samples 8" in capsys.readouterr().err
