"""What is recorded of watched rows while training, and the page that `tokensel report` makes of it."""

from __future__ import annotations

import json

import pytest
import torch
from test_trainer import ROWS, TOKENIZER, build, make_trainer, record

from tokensel.cli import main
from tokensel.watch import SELECTION_FILE, agreement, churn, kept_by_position, load_run, selected_samples


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
    assert [(r["epoch"], r["step"]) for r in records] == [(0, 0), (1, 4), (2, 8)]
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
    prompt = next(i for i, r in enumerate(sample["response"]) if not r)
    assert all(sample[name][prompt] is None for name in ("nll", "rel", "mass", "score", "rank"))


def test_watching_changes_no_training(run, tmp_path):
    folder, watched = run
    store = str(folder.parent / "h.parquet")
    alone = make_trainer(tmp_path, method="sstoken", history="recorded", history_store=store, num_train_epochs=2)
    alone.train()
    for (name, a), (_, b) in zip(watched.model.named_parameters(), alone.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_curves_of_a_run(run):
    found = load_run(run[0])
    records = lines(run[0])
    assert found["name"] == "out" and found["samples"] == records[-1]["samples"]
    assert [x for x, _ in found["curves"]["churn"]] == [1, 2]
    assert found["curves"]["churn"][0][1] == churn(records[0], records[1]) > 0
    assert [step for step, _ in found["curves"]["rel_mean"]] == list(range(1, 9))
    assert [x for x, _ in found["curves"]["kept_by_position"]] == list(range(1, 11))
    assert all(-1 <= a <= 1 for _, a in found["curves"]["signal_agreement"])


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
    assert kept_by_position([after], parts=2) == [[1, 2 / 3], [2, 1 / 3]]
    assert agreement({"samples": [sample([1, 1, 0], [1.0, 2.0, 3.0], [0.3, 0.2, 0.1])]}) == pytest.approx(-1)
    assert agreement({"samples": [sample([1, 1], [1.0, 1.0], [0.3, 0.2])]}) is None


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(run, tmp_path):
    from types import SimpleNamespace

    from tokensel.watch import SampleRecorder

    _, trainer = run
    recorder = SampleRecorder(trainer, 1)
    recorder.file = tmp_path / SELECTION_FILE
    recorder.file.write_text("".join(json.dumps({"step": step}) + "\n" for step in (0, 4, 8)), encoding="utf-8")
    state = SimpleNamespace(is_world_process_zero=True, global_step=5, epoch=1.2)
    recorder.on_train_begin(trainer.args, state, None)
    assert [r["step"] for r in lines(tmp_path)] == [0, 4]


def test_the_command_makes_a_page_of_several_runs(run, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["report", str(run[0]), str(run[0]), "--output", str(page)]) == 0
    assert "2 runs" in capsys.readouterr().out and "kept_by_position" in page.read_text(encoding="utf-8")
    assert main(["report", str(run[0])]) == 0 and (run[0] / "selection.html").is_file()
    assert main(["report", str(tmp_path)]) == 2
    assert "train with --record_samples 8" in capsys.readouterr().err
