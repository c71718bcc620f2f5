"""The quality studies: every method runs in the small worlds, and a study that was interrupted goes on."""

from __future__ import annotations

import inspect
import json
import math
import os
import signal

import pytest
import torch

from benchmarks.quality import __main__ as command
from benchmarks.quality import plots, runner, studies, tables, text_rows, worlds
from benchmarks.resume import RESULTS, alone, attempt, measured
from tokensel import methods


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worlds, "STEPS", 4)
        patch.setattr(worlds, "ROWS", {"base": 64, "noisy": 96, "clean": 96, "held_out": 16})
        made = worlds.build_world(tmp_path_factory.mktemp("world") / "0", 0, kind="mixed", share=0.5, base_steps=4)
        worlds.record_everything(made)
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("name", methods.names())
def test_every_method_trains_by_changing_one_word(world, name):
    result = worlds.fine_tune(world, name, {}, steps=4)
    assert math.isfinite(result["nll"]) and result["tokens_per_second"] > 0
    everything = {"full", "weighted", "dft", "soft_weights", "shad_rft", "critical_tokens", "f_alpha", "deft", "eaft"}
    everything |= {"idft", "rank_tuner", "talr"}
    if name in everything:
        assert result["kept_share"] == 1 == result["noise_kept"] and result["precision"] is None
    elif name != "profit":  # an untrained model gives every token less than tau
        assert 0 < result["kept_share"] < 1 and 0 <= result["noise_kept"] <= 1
        kept_noise = result["noise_kept"]
        assert result["precision"] == pytest.approx(result["precision"]) and (
            kept_noise < 1 or result["precision"] == 0
        )


def test_swapped_rows_are_noise_from_end_to_end(world):
    from tokensel.testing import make_rows, plant_noise

    rows = make_rows(40, seed=3)
    planted = plant_noise(rows, world.tokenizer, kind="swapped", share=0.5, seed=1)
    swapped = [r for r in planted if any(r["noise"])]
    assert 10 < len(swapped) < 30
    for row in swapped:
        response = [i for i, label in enumerate(row["labels"]) if label != -100]
        assert all(row["noise"][i] for i in response[:-1]) and not row["noise"][response[-1]]
    clean = plant_noise(rows, world.tokenizer, kind="none", share=0, seed=1)
    texts = {tuple(r["labels"]) for r in clean}
    assert all(r["input_ids"] != c["input_ids"] for r, c in zip(planted, clean, strict=True) if any(r["noise"]))
    assert all(tuple(r["labels"]) in texts for r in planted if not any(r["noise"]))


def test_a_spread_is_the_mean_and_half_the_range():
    assert tables.spread([1.0, 2.0, 4.0]) == "2.333 ± 1.500"
    assert tables.spread([None]) == "-" == tables.percent([None])
    assert tables.percent([0.5, 0.6]) == "55 %"


MADE = [RESULTS / f"quality.{name}.json" for name in command.STUDIES]


@pytest.mark.parametrize("file", MADE, ids=lambda file: file.stem)
def test_the_committed_results_are_those_of_the_studies(file):
    results = json.loads(file.read_text(encoding="utf-8"))
    assert tables.has_form(results) and not tables.has_form(results | {"rows": {"full": {"runs": [3]}}})
    parts = {"tokenizer": None, "later": []}
    study = studies.text(1, parts) if results["study"] == "text" else command.STUDIES[results["study"]](1)
    assert {row: {c for c in runs if isinstance(runs[c], list)} for row, runs in results["rows"].items()} == {
        row: set(runs) for row, runs in study.rows.items()
    }
    assert all(len(runs) == results["seeds"] == 3 for runs in all_runs_by_seed(results))
    if results["study"] == "planted":
        assert {row["method"] for row in results["rows"].values()} == set(methods.names())


def all_runs_by_seed(results):
    return [runs for row in results["rows"].values() for runs in row.values() if isinstance(runs, list)]


def test_real_text_needs_a_prompt_and_a_completion():
    assert text_rows.as_prompt_and_completion({"question": "q", "answer": "a"}) == {"prompt": "q\n", "completion": "a"}
    with pytest.raises(ValueError, match=r"or messages; got \['text'\]"):
        text_rows.as_prompt_and_completion({"text": "a"})


def test_of_a_chat_the_last_answer_is_the_completion():
    said = [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b"), ("user", "w")]
    row = {"messages": [{"role": role, "content": content} for role, content in said]}
    prompt = "system: s\nuser: u\nassistant: a\nuser: v\nassistant: "
    assert text_rows.as_prompt_and_completion(row) == {"prompt": prompt, "completion": "b"}
    assert len(row["messages"]) == 6
    for messages, reason in (
        ([], "an assistant's message"),
        (row["messages"][:2], "an assistant's message"),
        (["hello"], "both strings"),
        ([{"role": "assistant", "content": None}], "both strings"),
    ):
        with pytest.raises(ValueError, match=reason):
            text_rows.as_prompt_and_completion({"messages": messages})


def write_text(path, n, row=lambda i: {"prompt": f"What is {i}?", "completion": f"It is {i}. Ask no more."}):
    path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(n)), encoding="utf-8")
    return path


@pytest.fixture
def small_text(monkeypatch):
    monkeypatch.setattr(text_rows, "TEXT_ROWS", {"held_out": 2, "noisy": 4, "clean": 4})


@pytest.mark.parametrize("n", [50, 1500, 2000])
def test_a_file_with_too_few_rows_is_refused_before_anything_is_trained(tmp_path, capsys, n):
    file = write_text(tmp_path / "mine.jsonl", n)
    with pytest.raises(SystemExit) as stopped:
        command.main(["text", str(file), "--output", str(tmp_path)])
    assert stopped.value.code == 2
    assert f"mine.jsonl has {n:,} rows, and `text` needs 3,840 at --scale 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a", "completion": null}', "mine.jsonl:9: rows must have prompt and completion"),
        ("nonsense", "mine.jsonl:9: Expecting value"),
    ],
)
def test_a_row_that_is_no_example_is_named(tmp_path, capsys, small_text, line, reason):
    file = write_text(tmp_path / "mine.jsonl", 8)
    file.write_text(file.read_text() + line + "\n" + file.read_text(), encoding="utf-8")
    with pytest.raises(SystemExit):
        command.main(["text", str(file), "--output", str(tmp_path)])
    assert reason in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["text", str(tmp_path / "none.jsonl"), "--output", str(tmp_path)])
    assert "no such file" in capsys.readouterr().err


def test_nothing_else_sees_the_rows_of_the_reference(tmp_path, small_text):
    def chat(i):
        question = {"role": "user", "content": f"What is {i}?"}
        return {"messages": [question, {"role": "assistant", "content": f"It is {i}."}]}

    parts = text_rows.text_parts(write_text(tmp_path / "chat.jsonl", 16, chat), 1)
    tokenizer = parts["tokenizer"]
    seen = [row["prompt"] + row["completion"] for row in parts["later"]]
    for name in ("held_out", "base", "clean"):
        seen += [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in parts[name]]
    assert [len(parts[name]) for name in ("held_out", "base", "later", "clean")] == [2, 6, 4, 4]
    assert len(set(seen)) == 16
    with pytest.raises(ValueError, match=r"has 16 rows, and `text` needs 32 at --scale 2"):
        text_rows.text_parts(tmp_path / "chat.jsonl", 2)


RUN = {
    "nll": 1.0,
    "noise_kept": 0.5,
    "precision": 0.5,
    "kept_share": 0.5,
    "tokens_per_second": 9.0,
    "curves": {"kept_nll": [[5, 1.0]], "dropped_nll": [[5, 2.0]]},
}


@pytest.fixture
def run_study(monkeypatch, tmp_path, small_text):
    """`run_study(name, *options)` runs one whose trainings are instant; what it asked for is in `run_study.asked`."""

    def serial(function, tasks, label, *, fresh=False):
        for key, arguments in tasks.items():
            yield key, attempt(function, *arguments)

    def fine_tune(world, name, parameters, *, steps, **settings):
        run.asked.append((name, parameters, steps))
        if error := run.errors.pop(len(run.asked), None):
            raise error
        return RUN

    class Trained:
        def save_model(self, folder):
            pass

    def run(name, *options):
        given = [str(write_text(tmp_path / "mine.jsonl", 40))] if name == "text" else []
        run.asked = []
        command.main([name, *given, "--seeds", "1", "--output", str(tmp_path / "new" / "folder"), *options])

    run.errors, run.asked = {}, []
    run.path = lambda name: tmp_path / "new" / "folder" / f"quality.{name}.json"
    monkeypatch.setattr(runner, "run_all", serial)
    monkeypatch.setattr(runner, "fine_tune", fine_tune)
    for module in (runner, studies):
        monkeypatch.setattr(module, "base_nll", lambda world: 2.0)
    monkeypatch.setattr(studies, "train", lambda *arguments, **settings: Trained())
    monkeypatch.setattr(studies, "further", lambda *arguments: None)
    for name in ("_planted_world", "_text_world", "_feedback_world"):
        monkeypatch.setattr(studies, name, lambda folder, *arguments: worlds.World(folder, 0))
    return run


@pytest.mark.parametrize(("name", "total"), [("planted", 65), ("text", 21), ("feedback", 96)])
def test_an_interrupted_study_goes_on_with_what_it_has(run_study, capsys, name, total):
    run_study.errors = {3: ValueError("no luck"), 6: KeyboardInterrupt()}
    with pytest.raises(SystemExit) as stopped:
        run_study(name)
    assert stopped.value.code == 130
    results = json.loads(run_study.path(name).read_text())
    table = tables.TABLES[name](results)
    assert f"\n- unfinished: 5 of {total} runs\n- failed: " in table and table.endswith("ValueError: no luck")
    assert "| failed |" in table and sum(map(measured, tables.all_runs(results).values())) == 4

    capsys.readouterr()
    run_study(name)
    assert len(run_study.asked) == total - 4  # what failed is tried again
    printed = capsys.readouterr().out
    assert "4 runs are in " in printed and "unfinished" not in printed and "failed" not in printed
    run_study(name)
    assert not run_study.asked
    run_study(name, "--fresh")
    assert len(run_study.asked) == total
    run_study(name, "--seeds", "2")
    assert len(run_study.asked) == 2 * total
    assert "is of other settings" in capsys.readouterr().out


def test_one_process_at_a_time_fills_in_a_file_of_results(run_study, capsys):
    path = run_study.path("planted")
    path.parent.mkdir(parents=True)
    with alone(path), pytest.raises(SystemExit):
        run_study("planted")
    assert f"another process is filling in {path}" in capsys.readouterr().err and not run_study.asked
    run_study("planted")
    assert run_study.asked


def test_a_world_that_fails_costs_its_own_runs(run_study, monkeypatch, capsys):
    def make(folder, seed, scale, kind, *arguments):
        if kind == "swapped":
            raise RuntimeError("no world")
        return worlds.World(folder, 0)

    monkeypatch.setattr(studies, "_feedback_world", make)
    run_study("feedback")
    assert len(run_study.asked) == 72
    table = tables.feedback_table(json.loads(run_study.path("feedback").read_text()))
    assert table.count("RuntimeError: no world") == 24 and "| swapped | 60 steps | full | 0.0001 | failed |" in table
    assert "unfinished" not in table


@pytest.mark.slow
def test_every_failure_in_a_worker_comes_back_as_its_reason():
    results = dict(runner.run_all(math.sqrt, {"four": (4.0,), "minus": (-1.0,)}, "roots"))
    assert results["four"] == 2 and results["minus"]["failed"].startswith("ValueError: ")


def killed_at(number):
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_its_own_task():
    results = dict(runner.run_all(killed_at, {i: (i,) for i in range(6)}, "deaths"))
    assert results.pop(1)["failed"].startswith("its process was killed")
    assert sorted(results) == [0, 2, 3, 4, 5] and os.getpid() not in results.values()
    assert len(set(results.values())) < 5  # a process runs one task after the other
    alone = dict(runner.run_all(killed_at, {i: (i,) for i in range(2, 5)}, "alone", fresh=True))
    assert len(set(alone.values())) == 3


@pytest.mark.slow
def test_a_larger_scale_is_in_the_steps_and_in_the_labels(run_study, capsys, tmp_path):
    run_study("feedback", "--scale", "2")
    assert {steps for _, _, steps in run_study.asked} == {120}
    results = json.loads(run_study.path("feedback").read_text())
    assert {label.split("|")[1] for label in results["rows"]} == {"120 steps", "800 steps"}
    assert "120 steps of fine-tuning, model 256 wide, on " in capsys.readouterr().out
    plots.plot_feedback(results, tmp_path / "feedback.png")
    run_study("planted", "--scale", "3")
    assert {steps for _, _, steps in run_study.asked} == {300}
    assert next(p for name, p, _ in run_study.asked if name == "forgetting")["lambda_steps"] == 300
    run_study("text", "--scale", "2")
    assert {steps for _, _, steps in run_study.asked} == {120}


@pytest.mark.slow
def test_a_larger_world_has_more_rows_and_steps_for_every_model(tmp_path, monkeypatch):
    taken = []
    really = worlds.train

    def train(model, tokenizer, rows, *, steps, **settings):
        taken.append((steps, len(rows)))
        return really(model, tokenizer, rows, steps=1, **settings)

    monkeypatch.setattr(worlds, "train", train)
    monkeypatch.setattr(worlds, "STEPS", 4)
    monkeypatch.setattr(worlds, "ROWS", {"base": 24, "noisy": 16, "clean": 16, "held_out": 8})
    made = worlds.build_world(tmp_path / "0", 0, kind="mixed", share=0.5, base_steps=3, scale=2)
    worlds.record_everything(made)
    assert taken == [(6, 48), (8, 32), (8, 32)]  # base, reference, shuffled: no epoch more than at scale 1
    assert len(made.rows("noisy")) == 32 and len(made.rows("held_out")) == 8
    assert json.loads((tmp_path / "0/base/config.json").read_text())["hidden_size"] == 256
    result = runner._tune(made, runner.Run(("mixed",), "sstoken", {}, 8))
    assert math.isfinite(result["nll"]) and taken[-1] == (8, 32)


def test_the_device_that_was_used_is_recorded(run_study, monkeypatch):
    monkeypatch.setattr(command, "device_used", lambda: torch.device("meta"))
    monkeypatch.setattr(command, "machine", lambda device: {"device": device.type})
    run_study("feedback")
    assert json.loads(run_study.path("feedback").read_text())["machine"] == {"device": "meta"}
    monkeypatch.undo()
    for there, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert runner.device_used().type == device


def test_every_method_that_keeps_a_share_runs_at_every_rho():
    cases = studies.planted_cases(1)
    assert {name for name, _, _ in cases.values()} == set(methods.names())
    for name in methods.names():
        rho = inspect.signature(methods.builder(name)).parameters.get("rho")
        asked = {p.get("rho", rho.default) for n, p, s in cases.values() if n == name} if rho else {0.4, 0.6, 0.8}
        assert asked >= {0.4, 0.6, 0.8}, name
    assert cases["forgetting, rho 0.8"][1] == {"rho": 0.8, "lambda_steps": studies.STEPS}


def test_memory_has_a_column_where_there_is_something_to_see():
    def table(extra):
        rows = {"full": {"runs": [RUN], "peak_mib": 600.0}, "rel": {"runs": [RUN], "peak_mib": 600.0 + extra}}
        return tables.planted_table({"rows": rows | {"dft": {"runs": [None], "peak_mib": None}}, "base_nll": [2.0]})

    assert "MiB" not in table(0.9) and "| rel | 1.000 | 50 % | 50 % | 50 % | 9 |\n" in table(0.9)
    assert "| extra MiB |" in table(2) and "| 9 | 2 |\n" in table(2)
    assert "dft" not in table(2) and table(2).endswith("- unfinished: 2 of 3 runs")
