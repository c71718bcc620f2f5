from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tokensel.comparison import verdict

EXAMPLES = Path(__file__).parents[2] / "examples"
METHODS = ["full", "random", "sstoken", "history_excess", "clean_posterior"]


def test_the_raw_loop_trains():
    path = EXAMPLES / "raw_loop.py"
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^step +(\d+) +loss (\S+) +kept (\d+) of (\d+)$", done.stdout, re.MULTILINE)
    assert [int(step) for step, *_ in found] == [0, 5, 10, 15] and len(done.stdout.splitlines()) == 4
    for _, loss, kept, responses in found:
        assert math.isfinite(float(loss)) and 0 < float(loss) < 2 * math.log(512)
        # 4 rows of 48 tokens with a prompt of 16; ceil(0.6 * 32) = 20 of each
        assert (int(kept), int(responses)) == (80, 128)


def test_a_student_nears_its_teacher_by_the_tokens_that_are_chosen():
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / "distillation.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^step +(\d+) +KL to the teacher (\S+) nats, of kept (\S+)$", done.stdout, re.MULTILINE)
    assert [int(step) for step, *_ in found] == [0, 10, 20, 30, 39]
    far, of_kept = ([float(entry[i]) for entry in found] for i in (1, 2))
    assert far[-1] < 0.75 * far[0] and all(kept > whole for kept, whole in zip(of_kept, far, strict=True))


def test_fsdp2_trains_on_two_ranks():
    path = EXAMPLES / "fsdp2.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(path)]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    # gloo's threads sometimes abort a process that has left FSDP2's collectives behind, after the last step
    assert done.returncode == 0 or "terminate called without an active exception" in done.stderr, done.stderr
    assert len(path.read_text().splitlines()) <= 60
    found = re.findall(r"^step +(\d+) +loss (\S+) +kept 160 on 2 ranks$", done.stdout, re.MULTILINE)
    assert [int(step) for step, _ in found] == [0, 5, 10, 15]
    assert all(0 < float(loss) < 2 * math.log(512) for _, loss in found)


def load_example(name):
    spec = importlib.util.spec_from_file_location(f"{name}_example", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reduce(config):
    """The quickstart's own configuration, small enough for a test."""
    config["data"] |= {"base_rows": 48, "noisy_rows": 48, "held_out_rows": 16}
    config["common"] |= {"per_device_train_batch_size": 8, "logging_steps": 2, "warmup_steps": 1, "disable_tqdm": True}
    config["base"]["max_steps"] = config["tune"]["max_steps"] = 6
    return config


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """(output folder, what was printed) of the quickstart, run twice into the same folder with two seeds."""
    out = tmp_path_factory.mktemp("quickstart") / "made"
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        original = yaml.safe_load
        patch.setattr(yaml, "safe_load", lambda text: reduce(original(text)))
        patch.setattr("builtins.print", lambda *args, **kwargs: printed.append(" ".join(map(str, args))))
        module = load_example("quickstart")
        for seed in ("1", "0"):
            printed.clear()
            patch.setattr(sys, "argv", ["quickstart.py", "--output", str(out), "--seed", seed])
            module.main()
    return out, "\n".join(printed)


def test_the_quickstart_writes_its_table(quickstart):
    out, printed = quickstart
    table = json.loads((out / "results.json").read_text(encoding="utf-8"))["table"]
    assert [row["method"] for row in table] == METHODS
    for row in table:
        assert 0 < row["held-out clean NLL"] < 20 and row["tokens/s"] > 0 and row["peak memory MiB"] > 0
        share, kept = (float(row[name].rstrip("%")) for name in ("noise kept", "tokens kept"))
        assert 0 <= share <= 100
        if row["method"] == "full":
            assert kept == share == 100
        elif row["method"] == "clean_posterior":  # it has no share
            assert 0 < share <= kept <= 100
        else:
            assert 60 <= kept < 65
        line = next(line for line in printed.splitlines() if line.startswith(row["method"] + " "))
        assert line.split() == [str(value) for value in row.values()]
    assert len({row["held-out clean NLL"] for row in table}) == 4


def test_the_quickstart_says_who_is_better_by_its_own_numbers(quickstart):
    out, printed = quickstart
    table = json.loads((out / "results.json").read_text(encoding="utf-8"))["table"]
    nll = {row["method"]: row["held-out clean NLL"] for row in table}
    for name in ("sstoken", "history_excess"):
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{name}: held-out clean NLL")]
        assert claims(line) == {other: nll[name] < nll[other] for other in ("random", "full")}
        assert line in (out / "selection.html").read_text(encoding="utf-8")


def claims(line):
    """{"random": better than it?, "full": ...}: what a verdict says. Both have to be spoken of."""
    said = {}
    for no, names in re.findall(r"(NOT )?better than ((?:random|full)(?: (?:and|or) (?:random|full))?)", line):
        others = re.findall("random|full", names)
        assert not said.keys() & {*others}  # a method is better than another or it is not, never both
        said |= dict.fromkeys(others, not no)
    return said


@pytest.mark.parametrize(
    "sstoken, random, full",
    [
        (3.0, False, False),
        (2.7, False, False),  # equal is not better
        (2.6, True, False),
        (2.5, True, False),
        (2.4, True, True),
    ],
)
def test_the_verdict_follows_the_numbers(sstoken, random, full):
    nll = {"full": 2.5, "random": 2.7, "sstoken": sstoken, "history_excess": 9.0}
    lines = verdict([{"method": m, "held-out clean NLL": v} for m, v in nll.items()])
    assert [line.partition(":")[0] for line in lines] == ["sstoken", "history_excess"]
    assert claims(lines[0]) == {"random": random, "full": full}
    assert claims(lines[1]) == {"random": False, "full": False}


def test_the_quickstart_draws_its_page_and_plot(quickstart):
    out, _ = quickstart
    page = (out / "selection.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|<link|<img| src=", page)
    runs = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL).group(1))
    assert sorted(run["name"] for run in runs) == sorted(METHODS)
    noisy = [json.loads(line) for line in (out / "data/noisy.jsonl").read_text(encoding="utf-8").splitlines()]
    for run in runs:
        assert len(run["samples"]) > 3 and [step for step, _ in run["curves"]["rel_mean"]] == [2, 4, 6]
        assert any(any(sample["noise"]) for sample in run["samples"])
        for sample in run["samples"]:
            row = noisy[int(re.match(r"row (\d+): ", sample["title"]).group(1))]
            assert len(sample["tokens"]) == len(row["input_ids"])
            assert sample["noise"] == [bool(n) for n in row["noise"]]
            assert sample["response"] == [label != -100 for label in row["labels"]]
            n, kept = sum(sample["response"]), sum(sample["kept"])
            if run["name"] == "clean_posterior":
                assert kept == sum(score > 0.5 for score in sample["score"] if score is not None)
            else:
                assert kept == (n if run["name"] == "full" else -(-n * 6 // 10))
            for t in range(len(row["input_ids"])):
                if not sample["response"][t]:
                    assert sample["rank"][t] is sample["score"][t] is sample["nll"][t] is None
                    continue
                assert sample["kept"][t] == (sample["rank"][t] <= kept)
                rel = sample["history_nll"][t] - sample["nll"][t]
                assert sample["rel"][t] == pytest.approx(rel, abs=3e-5)  # each is rounded to 5 places
                assert (sample["mass"][t] is not None) == (run["name"] == "sstoken")
    png = (out / "rel.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and png[-8:-4] == b"IEND" and len(png) > 10_000


def test_the_quickstart_leaves_a_model_and_a_history_that_load(quickstart):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tokensel.store import HistoryStore

    out, _ = quickstart
    assert AutoModelForCausalLM.from_pretrained(out / "base").config.vocab_size > 3
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    assert 40 < len(HistoryStore.open(out / "history.parquet", tokenizer=tokenizer)) <= 48


@pytest.mark.slow
def test_the_demo_compares_methods_on_docstrings_with_a_model_out_of_a_folder(tmp_path, monkeypatch, capsys):
    """With a tiny model in SmolLM2's place, which tests/hf/test_pretrained.py loads."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tokensel.store import HistoryStore
    from tokensel.testing import docstring_rows, make_model, make_tokenizer

    texts = [[message["content"] for message in row["messages"]] for row in docstring_rows()[:300]]
    tokenizer = make_tokenizer([{"prompt": prompt, "completion": answer} for prompt, answer in texts])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    make_model(tokenizer, hidden_size=32, layers=2, heads=2, kv_heads=1, seed=0).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    asked = []

    def pretrained(*arguments):
        asked.append(arguments)
        loaded = (kind.from_pretrained(tmp_path / "tiny") for kind in (AutoModelForCausalLM, AutoTokenizer))
        return tuple(loaded)

    demo, out = load_example("demo"), tmp_path / "made"
    monkeypatch.setattr(demo, "pretrained", pretrained)
    monkeypatch.setattr(demo, "LORA", peft.LoraConfig(r=2, target_modules="all-linear"))
    monkeypatch.setattr(demo, "STEPS", 4)
    monkeypatch.setitem(demo.SETTINGS, "max_steps", 4)
    for seed in ("1", "0"):
        monkeypatch.setattr(sys, "argv", ["demo.py", "--output", str(out), "--seed", seed])
        demo.main()
    assert set(asked) == {("smollm2", out / "models")}
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert [row["method"] for row in results["table"]] == list(demo.METHODS)
    assert all(row["held-out clean NLL"] < results["base_nll"] for row in results["table"])
    printed = capsys.readouterr().out
    for name in set(demo.METHODS) - {"full", "random"}:
        (line,) = [line for line in printed.splitlines()[-12:] if line.startswith(f"{name}: held-out clean NLL")]
        assert set(claims(line)) == {"random", "full"}
        assert line in (out / "selection.html").read_text(encoding="utf-8")
    assert len(HistoryStore.open(out / "history.parquet", tokenizer=tokenizer)) == 4 * demo.ROWS_A_STEP
    rows = [json.loads(line) for line in (out / "noisy.jsonl").read_text(encoding="utf-8").splitlines()]
    assert 0 < sum(any(row["noise"]) for row in rows) < len(rows)


def test_a_method_of_ones_own_is_used_by_its_name():
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, str(EXAMPLES / "own_method.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "kept: [[0.0, 0.0, 1.0, 0.0, 1.0]]\n", done.stderr


def test_iterative_token_cleaning_trains_on_what_the_stage_before_chose(tmp_path, capsys):
    from tokensel.store import HistoryStore
    from tokensel.testing import make_model, make_rows, make_tokenizer

    rows = make_rows(26, seed=5)
    tokenizer = make_tokenizer(rows, vocab_size=320)
    base = str(tmp_path / "base")
    make_model(tokenizer, hidden_size=32, layers=2, heads=2, kv_heads=1, seed=0).save_pretrained(base)
    tokenizer.save_pretrained(base)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = EXAMPLES / "token_cleaning_iterative.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
    spec = importlib.util.spec_from_file_location("token_cleaning_iterative", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    flags = "--use_cpu true --report_to none --save_strategy no --max_steps 2 --learning_rate 1e-3".split()
    out = tmp_path / "out"
    module.main(base, str(tmp_path / "rows.jsonl"), str(out), "3", *flags)

    splits = [(out / f"split{i}.jsonl").read_text(encoding="utf-8") for i in range(3)]
    assert "".join(splits) == (tmp_path / "rows.jsonl").read_text(encoding="utf-8")
    assert [len(split.splitlines()) for split in splits] == [8, 9, 9]
    shares = [json.loads((out / f"stage{i}" / "all_results.json").read_text())["kept_share"] for i in range(3)]
    assert shares[0] == 1 and all(0.5 < share < 0.7 for share in shares[1:])
    for i in (1, 2):
        made_by = [HistoryStore.open(out / f"{name}{i}.parquet").metadata["model"] for name in ("base", "reference")]
        assert made_by == [base, str(out / f"stage{i - 1}")]
    capsys.readouterr()
    module.main(base, str(tmp_path / "rows.jsonl"), str(out), "3", *flags)
    assert capsys.readouterr().out == ""  # everything is there
