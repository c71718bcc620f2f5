"""The study of pretrained models as a command: it goes on, says what is wrong with its input, shows its results."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from benchmarks.quality import __main__ as command
from benchmarks.quality import plots, real, real_tables
from benchmarks.quality.tables import all_runs, differences
from benchmarks.resume import attempt, measured
from tools import write_docs

RECIPES = ("full", "oracle", "random")


@pytest.fixture
def study(made, small, tmp_path, monkeypatch):
    """`study(*options)` runs the command with trainings that take no time; `study.asked` is what it asked for."""

    def serial(function, tasks, label, *, fresh=False):
        for key, (asked, *_) in tasks.items() if function is real._in_world else ():
            run.asked.append((label.split()[0], key))
            if error := run.errors.pop(len(run.asked), None):
                if isinstance(error, KeyboardInterrupt):
                    raise error
                yield key, {"failed": str(error)}
            else:
                instead = {"measure": RUN, "base_losses": {"held_out": 2.0, "elsewhere": 3.0}}
                yield key, dict(instead.get(asked.__name__, {"right": 1, "of": 40}))
        for key, arguments in tasks.items() if function is real.build_world else ():
            run.built.append(key[0])
            yield key, attempt(lambda folder, *_: run.worlds.append(folder) or folder, *arguments)

    def run(*options):
        run.asked, run.built = [], []
        files = ("--problems", str(made / "problems.jsonl"), "--solutions", str(made / "solutions.jsonl"))
        where = ("--work", str(tmp_path / "work"), "--output", str(tmp_path / "new" / "out"))
        given = {"--recipes": RECIPES, "--kinds": ["clean,random"], "--seeds": ["2"]}
        given = [word for name, words in given.items() if name not in options for word in (name, *words)]
        command.main(["real", *files, *where, *given, *options])

    run.asked, run.built, run.worlds, run.errors = [], [], [], {}
    run.path = tmp_path / "new" / "out" / "quality.real.json"
    monkeypatch.setattr(real, "run_all", serial)
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    monkeypatch.setattr(real, "pretrained", lambda name, cache: (None, tokenizer))
    monkeypatch.setattr(real, "own_answers", lambda folder, questions: ["I say so, and no more."] * len(questions))
    return run


HERE = {"cpu": "a chip", "cores": 2, "python": "3.11", "torch": "2.0", "commit": "0123456789abcdef"}
RUN = {"curve": [[9, 1.5], [40, 1.2]], "nll": 1.2, "elsewhere": 3.1, "kept": 0.9, "clean_kept": 1.0, "noise_kept": 0.2}


def results_of(study):
    return json.loads(study.path.read_text(encoding="utf-8"))


def test_an_interruption_costs_what_was_running_and_a_failure_is_told_and_tried_again(study, capsys):
    study.errors = {5: ValueError("no luck"), 8: KeyboardInterrupt()}  # two bases come first
    with pytest.raises(SystemExit) as stopped:
        study()
    assert stopped.value.code == 130 and "the same command goes on" in capsys.readouterr().err
    runs = all_runs(results_of(study))
    assert len(runs) == 12 and sum(map(measured, runs.values())) == 4
    failed = [name for name, run in runs.items() if run and not measured(run)]
    assert failed == ["clean oracle seed 0"]

    study()
    printed = capsys.readouterr().out
    assert "4 runs are in " in printed and "failed" not in printed and "unfinished" not in printed
    runs_asked = [key for label, key in study.asked if label == "runs"]
    assert len(runs_asked) == 8 and runs_asked[0] == ("clean", "oracle")
    assert not [key for label, key in study.asked if label == "bases"]
    assert "1 of 40 before, 1 of 40 after `full`" in printed
    study()
    assert not study.asked and not study.built


def test_the_most_wanted_recipes_come_first_and_worlds_are_built_for_what_lacks(study):
    study("--recipes", *RECIPES)
    order = [name for label, (_, name) in [a for a in study.asked if a[0] == "runs"]]
    assert order == [name for _ in range(2) for name in RECIPES for _ in range(2)]
    assert study.built == ["clean", "random"] * 2
    study("--kinds", "clean,random,scattered")
    assert study.built == ["scattered"] * 2
    assert len(set(study.worlds)) == 6
    study("--kinds", "random", "--recipes", "full", "rel", "--seeds", "3")
    assert [key for label, key in study.asked if label == "runs"] == [
        *[("random", "rel")] * 2, ("random", "full"), ("random", "rel")
    ]  # fmt: skip


def test_every_run_tells_its_machine_and_another_commit_goes_on(study, monkeypatch, capsys):
    monkeypatch.setattr(real, "machine", lambda device: HERE | {"commit": "one"})
    study("--seeds", "1")
    monkeypatch.setattr(real, "machine", lambda device: HERE | {"commit": "two"})
    study("--seeds", "2")
    results = results_of(study)
    assert [machine["commit"] for machine in results["machines"]] == ["one", "two"]
    assert [run["machine"] for run in results["rows"]["random"]["full"]] == [0, 1]
    assert results["model"] == "smollm2" and len(results["problems"]) == 64


def test_a_run_by_another_recipe_is_run_again(study, monkeypatch):
    study()
    monkeypatch.setitem(real.RECIPES, "random", real.Recipe("random", {"rho": 0.5}))
    study()
    again = [key for label, key in study.asked if label == "runs"]
    assert sorted(again) == 2 * [("clean", "random")] + 2 * [("random", "random")]
    study()
    assert not study.asked


def test_runs_on_other_rows_are_not_compared():
    ours = [{"nll": 1, "world": "a"}, {"nll": 2, "world": "b"}]
    theirs = [{"nll": 3, "world": "a"}, {"nll": 9, "world": "c"}]
    assert differences(ours, theirs) == [-2]


def test_results_of_other_settings_are_kept_until_they_are_given_up(study, capsys, made, tmp_path):
    study()
    other = tmp_path / "other.jsonl"
    other.write_text((made / "problems.jsonl").read_text() + "\n")
    for options, what in ((("--scale", "2"), "scale 1, not 2"), (("--problems", str(other)), "problems ")):
        before = study.path.read_bytes()
        with pytest.raises(SystemExit):
            study(*options)
        assert f"is of other settings ({what}" in capsys.readouterr().err and study.path.read_bytes() == before
    study("--problems", str(other), "--fresh")
    assert len([a for a in study.asked if a[0] == "runs"]) == 12
    study("--model", "gemma3")
    assert study.path.with_name("quality.real.gemma3.json").exists()


@pytest.mark.parametrize(
    "content",
    [
        *([], None, 3, {}, {"study": []}, {"study": "real", "machines": {}}),
        *({"study": "real", "rows": rows} for rows in ([], {"clean": []}, {"clean": {"full": 3}})),
        *({"study": "real"} | part for part in ({"rows": {"clean": {"full": [3]}}}, {"answers": {"base": 3}})),
        *({"study": "real", name: []} for name in ("bases", "answers", "minutes")),
    ],
)
def test_a_file_that_holds_something_else_is_kept_until_it_is_given_up(study, capsys, content):
    study.path.parent.mkdir(parents=True)
    study.path.write_text(json.dumps(content))
    with pytest.raises(SystemExit) as stopped:
        study("--seeds", "1")
    assert stopped.value.code == 2 and not study.asked and json.loads(study.path.read_text()) == content
    assert "quality.real.json is not of this study; --fresh replaces it" in capsys.readouterr().err


def test_what_the_signals_say_is_of_one_seed(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["signals", "--work", str(tmp_path), "--seeds", "2"])
    assert "unrecognized arguments: --seeds 2" in capsys.readouterr().err


def test_above_scale_1_there_are_more_rows_and_nothing_is_frozen(study, monkeypatch):
    built = []
    really = real.world_arguments

    def world_arguments(*arguments):
        built.append(really(*arguments))
        return built[-1]

    monkeypatch.setattr(real, "world_arguments", world_arguments)
    study("--scale", "2", "--kinds", "clean,random", "--seeds", "1")
    assert [(len(parts.train), frozen) for _, parts, _, _, frozen, _ in built] == [(24, 0), (60, 0)]


@pytest.mark.parametrize("scale", [1, 3])
def test_the_papers_recipe_leaves_rel_out_for_a_fifth_of_the_rows_of_a_kind(scale):
    study = real.RealStudy("smollm2", None, None, None, scale, 1, ("clean", "chats"), ())
    found = {kind: study.recipe("sstoken, the paper's recipe", kind).parameters for kind in ("clean", "chats")}
    rows = {kind: real.KINDS[kind].rows * scale for kind in found}
    assert rows == {"clean": 128 * scale, "chats": 64 * scale}
    assert found == {"clean": {"rel_warmup": round(25.6 * scale)}, "chats": {"rel_warmup": round(12.8 * scale)}}
    assert not study.recipe("sstoken", "clean").parameters
    assert study.recipe("full, the paper's recipe", "clean").parameters == {}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--kinds", "clean,writen"), "no kind 'writen'; is 'written' meant?"),
        (("--recipes", "full", "sstokn"), "no recipe 'sstokn'; is 'sstoken' meant?"),
        (("--recipes", "min_k_pp, rho .85"), "is 'min_k_pp, rho 0.85' meant?"),
        (("--problems", "nowhere.jsonl"), "No such file or directory: 'nowhere.jsonl'"),
        (("--model", "gpt"), "invalid choice: 'gpt'"),
        (("--seeds", "0"), "must be at least 1; got 0"),
        (("--scale", "9"), "the kind random needs 286 rows of at most 512 tokens at --scale 9; there are "),
        (
            ("--kinds", "written", "--scale", "3"),
            "the kind written needs 36 solutions that are not too long, half of them wrong; there are 20",
        ),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(study, capsys, options, reason):
    with pytest.raises(SystemExit) as stopped:
        study(*options)
    assert stopped.value.code == 2 and reason in capsys.readouterr().err
    assert not study.asked and not study.built and not study.path.exists()


@pytest.mark.parametrize(
    ("file", "row", "reason"),
    [
        (
            "problems",
            '{"question": "How many?", "answer": null}',
            "no answer; the study needs question, answer in ",
        ),
        ("problems", '{"question": 4, "answer": "4"}', "question must be a string; got 4"),
        ("problems", '{"question": "Is it?", "answer": true}', "answer must be a string; got True"),
        (
            "solutions",
            '{"question": "?", "model_answer": "6", "is_correct": "no"}',
            "must be true, false, 1 or 0; got ",
        ),
        (
            "solutions",
            '{"question": "?", "model_answer": "6", "is_correct": 2}',
            "is_correct must be true, false, 1 or",
        ),
        ("solutions", '{"question": "?", "model_answer": true, "is_correct": 1}', "model_answer must be a string; got"),
        ("solutions", '{"question": "How many?", "is_correct": true}', "no model_answer; "),
        ("solutions", "nonsense", "Expecting value"),
    ],
)
def test_a_row_that_is_of_no_use_is_named(study, made, tmp_path, capsys, file, row, reason):
    other = tmp_path / "mine.jsonl"
    other.write_text((made / f"{file}.jsonl").read_text() + row + "\n", encoding="utf-8")
    line = len(other.read_text().splitlines())
    with pytest.raises(SystemExit):
        study("--kinds", "clean,written", f"--{file}", str(other))
    assert f"mine.jsonl:{line}: " in (said := capsys.readouterr().err) and reason in said


def test_kinds_without_a_file_need_none(study, small, made, tmp_path, capsys, monkeypatch):
    where = ["--work", str(tmp_path / "work"), "--output", str(study.path.parent), "--seeds", "1", "--recipes", "full"]
    for kinds, missing in (("docs,chats", "--problems FILE, which the kinds chats need"), ("written", "--problems")):
        with pytest.raises(SystemExit):
            command.main(["real", *where, "--kinds", kinds])
        assert f"give {missing}" in (said := capsys.readouterr().err) and "--kinds docs,own needs none" in said
    with pytest.raises(SystemExit):
        command.main(["real", *where, "--kinds", "written", "--problems", str(made / "problems.jsonl")])
    assert "give --solutions FILE" in capsys.readouterr().err
    command.main(["real", *where, "--kinds", "docs,own"])
    assert measured(results_of(study)["rows"]["own"]["full"][0]) and "problems" not in results_of(study)
    study("--kinds", "docs,own", "--recipes", "full")  # files that come later are no other settings
    assert "problems" in results_of(study)

    def missing(name, cache):
        raise ModuleNotFoundError("pip install this")

    monkeypatch.setattr(real, "pretrained", missing)
    with pytest.raises(SystemExit):
        study("--seeds", "3")
    assert "pip install this" in capsys.readouterr().err


# Tables and pictures


def run(nll, **values):
    return RUN | {"nll": nll, "curve": [[10, nll + 1], [40, nll]]} | values


@pytest.fixture
def results():
    rows = {
        "full": [run(1.0), run(1.5)],
        "random": [run(1.1), run(1.6)],
        "sstoken": [run(1.3), run(1.7)],
        "good": [run(0.96), run(1.44)],
        "lucky": [run(0.7), run(1.55)],
        "full, all weights": [run(2.0), None],
        "good, all weights": [run(1.9), {"failed": "no luck", "machine": 0}],
        "rel": [None, None],
    }
    return {
        "rows": {"clean": rows, "random": {"full": [None, None]}, "docs": {"full": [run(1.0, elsewhere=None)]}},
        "bases": {"clean": {"held_out": 2.0, "elsewhere": 3.0}, "docs": {"held_out": 4.0, "elsewhere": None}},
        "answers": {"base": {"right": 0, "of": 40}, "full": {"right": 3, "of": 40}},
        "machines": [HERE, HERE | {"commit": "fedcba9876543210+changes"}],
    }


def test_the_table_shows_differences_of_the_same_seed(results):
    lines = real_tables.real_table(results).splitlines()
    assert lines[0] == "| held-out NLL minus that of `full` | clean | docs |"
    assert lines[2] == "| base, before: NLL | 2.000 | 4.000 |"
    assert "| full: NLL | 1.250 ± 0.250 | 1.000 |" in lines
    assert "| random | 0.100 ± 0.000 |  |" in lines and "| sstoken | 0.250 ± 0.050 |  |" in lines
    assert "| good | **-0.050 ± 0.010** |  |" in lines  # below all three in every seed
    assert "| lucky | -0.125 ± 0.175 |  |" in lines  # not beyond its spread
    assert "| full, all weights: NLL | 2.000 |  |" in lines
    assert "| good, all weights | -0.100 (1 of 2 failed) |  |" in lines  # one seed has no spread
    assert "| good | 1.200 ± 0.240 | -0.050 ± 0.010 | -0.150 ± 0.010 | 20 % | 100 % | 0.100 ± 0.000 |" in lines
    assert not any(line.startswith("| rel |") for line in lines)
    assert "0 of 40 before, 3 of 40 after `full`" in "\n".join(lines)
    assert "2 seeds; a chip, 2 cores, Python 3.11, torch 2.0; commit 0123456789, fedcba9876+changes." in lines
    assert "- failed: clean good, all weights seed 1: no luck" in lines
    assert any(line.startswith("- unfinished: ") for line in lines)


def test_the_first_page_has_a_line_for_each_kind(results):
    lines = real_tables.first_table(results).splitlines()
    assert lines[0] == "| noise | `full` | `random` | `oracle` | `sstoken` | `clean_posterior` |"
    assert lines[2] == "| none | 1.250 ± 0.250 | 0.100 ± 0.000 |  | 0.250 ± 0.050 |  |"
    assert lines[3] == "| far from the base, random tokens | 1.000 |  |  |  |  |"
    assert lines[5].startswith("2 seeds; a chip, 2 cores")


def test_a_method_has_to_beat_random_at_its_own_rho_and_sstoken_too(results):
    rows = results["rows"]["clean"]
    rows["good, rho 0.85"] = rows["good"]
    assert real_tables.beats(rows, "good, rho 0.85") and real_tables.rival(rows, "good, rho 0.85", "full") == "full"
    rows["random, rho 0.85"] = [run(0.9), run(1.4)]
    assert not real_tables.beats(rows, "good, rho 0.85") and real_tables.beats(rows, "good")
    rows["sstoken"] = [run(0.9), run(1.4)]
    assert not real_tables.beats(rows, "good")
    alone = {name: [run(1.0)] for name in ("full", "random", "sstoken")}
    assert not real_tables.beats(alone | {"good": [run(0.5)]}, "good")  # one seed has no spread
    alone = {name: runs * 2 for name, runs in alone.items()}
    assert real_tables.beats(alone | {"good": [run(0.5)] * 2}, "good")


def test_recipes_are_compared_with_those_of_their_own_training_or_with_none():
    def lines(**rows):
        rows = {name.replace("_all_weights", ", all weights"): runs for name, runs in rows.items()}
        return real_tables.summary({"rows": {"clean": rows, "docs": {"full": [run(1.0)] * 2}}}, ["clean", "docs"])[3:]

    lora = {name: [run(1.0)] * 2 for name in ("full", "random", "sstoken")}
    alone = lines(**lora, sstoken_all_weights=[run(0.5)] * 2)
    assert alone[-1] == "| sstoken, all weights | - |  |"  # not the difference to another training's
    assert lines(full_all_weights=[run(2.0)] * 2)[-1] == "| full, all weights: NLL | 2.000 ± 0.000 |  |"
    both = {"full_all_weights": [run(2.0)] * 2, "sstoken_all_weights": [run(1.5)] * 2}
    assert lines(**lora, **both)[-1] == "| sstoken, all weights | -0.500 ± 0.000 |  |"  # no random to beat: not bold
    both["random_all_weights"] = [run(1.8)] * 2
    assert lines(**lora, **both)[-1] == "| sstoken, all weights | **-0.500 ± 0.000** |  |"
    for kinds in (["clean", "docs"], ["docs", "clean"]):  # whichever kind comes first
        rows = {"clean": {"full, all weights": [run(2.0)]}, "docs": {"full": [run(1.0)]}}
        assert "| full, all weights: NLL |" in "\n".join(real_tables.summary({"rows": rows}, kinds))


def test_parameters_of_a_method_are_no_other_training():
    rows = dict.fromkeys(["full", "random", "sstoken", "random, rho 0.85", "full, no repeats", "sstoken, rho 0.85"])
    for suffix, random in (("rho 0.85", "random, rho 0.85"), ("rho 0.9", "random"), ("no repeats", "random")):
        found = [real_tables.rival(rows, f"good, {suffix}", method) for method in real_tables.RIVALS]
        assert found == ["full", random, "sstoken"]


@pytest.mark.parametrize(("nll", "bold"), [(0.9994, True), (0.9996, False)])
def test_a_difference_that_the_digits_do_not_show_is_not_bold(nll, bold):
    rows = {name: [run(1.0)] * 2 for name in real_tables.RIVALS} | {"good": [run(nll)] * 2}
    assert real_tables.beats(rows, "good") == bold


def test_nothing_is_said_of_what_is_not_measured(results, tmp_path, monkeypatch):
    monkeypatch.setattr(write_docs, "RESULTS", tmp_path)
    assert write_docs.real() == "not measured" == real_tables.real_table({"rows": {"clean": {"full": [None]}}})
    (tmp_path / "quality.real.json").write_text(json.dumps(results))
    assert write_docs.real().endswith("](real.svg)") and write_docs.real("gemma3") == "not measured"


def test_the_picture_has_a_panel_a_kind_and_tells_its_results(results, tmp_path):
    plots.plot_real(results, tmp_path / "real.svg")
    text = (tmp_path / "real.svg").read_text()
    assert plots.digest(results["rows"]) in text
    assert text.count("<!-- response tokens -->") == 2 and "<!-- sstoken -->" in text


def test_a_picture_of_what_is_hardly_measured_is_drawn_too(results, tmp_path):
    plots.plot_real({"rows": {}}, tmp_path / "empty.svg")
    plots.plot_real({"rows": {"clean": {"full": [None]}}, "bases": {}}, tmp_path / "none.svg")
    del results["bases"]
    rows = results["rows"]["clean"]
    rows["full"][0]["curve"].append([90, 0.5])  # the other seed ends before
    rows["random"][0]["curve"] = []
    plots.plot_real(results, tmp_path / "real.svg")
    assert "<!-- full -->" in (text := (tmp_path / "real.svg").read_text()) and "<!-- random -->" not in text


@pytest.mark.parametrize("more", [0, 1])
def test_a_curve_is_the_mean_of_seeds_as_far_as_all_go(results, tmp_path, monkeypatch, more):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda axes, *points, label, **how: drawn.append((label, points)))
    results["rows"]["clean"]["full"][0]["curve"] += [[90, 0.5]] * more
    plots.plot_real(results, tmp_path / "real.svg")
    assert drawn[0] == ("full", ((0, 10.0, 40.0), (2.0, 2.25, 1.25)))
