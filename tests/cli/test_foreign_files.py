"""Files from elsewhere are data: what is wrong is named, what is hostile is shown as text, nothing of it runs."""

from __future__ import annotations

import ast
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_report import HOSTILE, Page, make_run, make_sample

from benchmarks.resume import alone, resume
from tokensel.choose_history import load_reference
from tokensel.cli import main
from tokensel.loading import load_model, load_tokenizer
from tokensel.report import write_selection_page
from tokensel.report.watch import SELECTION_FILE, SampleRecorder, load_run
from tokensel.settings import DataArguments

ROOT = Path(__file__).resolve().parents[2]
DEEP = "[" * 100_000
TEXTS = [
    HOSTILE,
    "]]>",
    "<!--",
    "--><svg onload=alert(1)>",
    "\"'`onmouseover=alert(1) ",
    "\\u003c/script>",
    "{{data}}",
    "\u2028\u2029",
    "\u202e\u2066",
    "\x00\x1b[31m\r\n",
    "\ud800",
    "\udcff",
    "\ufeff\uffff",
]


# Nothing in the repository runs what it reads


def unsafe_calls(source):
    """Calls and imports that run what they read, or let somebody else's code run."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            yield from (n for n in names if n.split(".")[0] in ("pickle", "marshal", "shelve", "dill", "joblib"))
        if not isinstance(node, ast.Call):
            continue
        called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in ("eval", "exec") or given.get("trust_remote_code", "False") != "False":
            yield called
        if called == "torch.load" and given.get("weights_only") != "True":
            yield called
        if called.startswith("yaml.") and "load" in called and called != "yaml.safe_load":
            yield called
        if given.get("allow_pickle", "False") != "False" or given.get("shell", "False") != "False":
            yield called


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "eval(text)",
        "exec(text)",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "yaml.load(text, yaml.Loader)",
        "yaml.unsafe_load(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=trust)",
        "numpy.load(file, allow_pickle=True)",
    ],
)
def test_what_would_run_a_file_is_found(source):
    assert list(unsafe_calls(source))


@pytest.mark.parametrize("folder", ["tokensel", "kernels", "benchmarks", "tools", "examples"])
def test_no_file_is_run_or_unpickled(folder):
    found = {str(p): [*unsafe_calls(p.read_text(encoding="utf-8"))] for p in (ROOT / folder).rglob("*.py")}
    assert found and {name: calls for name, calls in found.items() if calls} == {}


# The page


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_any_text_stays_text(tmp_path, text):
    plain, hostile = tmp_path / "plain.html", tmp_path / "page.html"
    for path, word in ((plain, "word"), (hostile, text)):
        runs = [make_run(word, samples=0) | {"samples": [make_sample(word, ("<s>", word, "a", word, "b"))]}]
        write_selection_page(path, runs, title=word, table=[{word: word}], notes=[word])
    source = hostile.read_text(encoding="utf-8")
    page = Page(source)
    assert page.tags == Page(plain.read_text(encoding="utf-8")).tags
    (run,) = page.data
    assert run["name"] == run["samples"][0]["title"] == text and run["samples"][0]["tokens"][1::2] == [text, text]
    assert "<" not in page.scripts[0] and page.scripts[0].isascii()
    assert source.count("</script>") == 2 and "<!--" not in source


def test_a_token_of_ten_megabytes_is_cut(tmp_path):
    sample = make_sample("\n" * 10_000_000, ("<s>", "\n" * 10_000_000, "x" * 1000, "y" * 1001, "."))
    write_selection_page(tmp_path / "page.html", [make_run() | {"samples": [sample]}], title="t")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    shown = page.data[0]["samples"][0]
    assert shown["tokens"][1:4] == ["\n" * 1000 + "\u2026", "x" * 1000, "y" * 1000 + "\u2026"]
    assert len(shown["title"]) == 1001


# What a run has recorded


def write_run(folder, record=None, state=None):
    """A folder with one record and a trainer's state; text stands in for either."""
    samples = [make_sample("row 0"), make_sample("row 1")]
    record = {"epoch": 1.0, "step": 4, "scope": "sample", "samples": samples} if record is None else record
    log = [{"step": 1, "kept_share": 0.6, "rel_mean": 0.1, "rel_std": math.nan}]
    state = {"log_history": log} if state is None else state
    folder.mkdir(exist_ok=True)
    for name, content in ((SELECTION_FILE, record), ("trainer_state.json", state)):
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    return folder


def recorded(**changes):
    sample = {name: changes.pop(name) for name in [*changes] if name in make_sample("")}
    samples = [make_sample("row 0") | sample, make_sample("row 1")]
    return {"epoch": 1.0, "step": 4, "scope": "sample", "samples": samples} | changes


def logged(**changes):
    return {"log_history": [{"step": 1, "kept_share": 0.6} | changes]}


MARKUP = "<img src=x onerror=alert(1)>"
RECORDS = [
    (DEEP, "line 1 is damaged"),
    ("1" * 5000, "line 1 is damaged"),
    (recorded(step=-1), 'no record: .* "step"'),
    (recorded(step=True), "no record"),
    (recorded(step=10**30), "no record"),
    (recorded(epoch=MARKUP), 'lacks "epoch"'),
    (recorded(epoch=math.nan), 'lacks "epoch"'),
    (recorded(epoch=10**400), 'lacks "epoch"'),
    (recorded(scope="__proto__"), '"scope"'),
    (recorded(scope=["sample"]), '"scope"'),
    (recorded(samples={}), "no samples"),
    (recorded(title=3), "without title"),
    (recorded(tokens=["a", None, "b", "c", "d"]), "'tokens'"),
    (recorded(tokens="abcde"), "'tokens'"),
    (recorded(kept=[None] * 5), "'kept'"),
    (recorded(response=[1, 1, 1, 1, 1]), "'response'"),
    (recorded(noise={}), "'noise'"),
    (recorded(rel=[10**400] * 5), "'rel'"),
    (recorded(mass=[1e200, 2e200, None, None, None]), "'mass'"),
    (recorded(score=[MARKUP] * 5), "'score'"),
    (recorded(rank=[[1]] * 5), "'rank'"),
]
STATES = [
    (DEEP, "damaged"),
    ({"log_history": {"step": 1}}, "log_history"),
    (logged(step="1"), "log_history of steps"),
    (logged(step=10**30), "log_history of steps"),
    (logged(rel_mean=MARKUP), "rel_mean in log_history must be a number; got '<img"),
    (logged(rel_std=[]), "rel_std in log_history must be a number"),
    (logged(kept_share=None), "kept_share in log_history must be a number"),
    (logged(rel_mean=10**400), "rel_mean in log_history must be a number"),
]


@pytest.mark.parametrize(
    "name, given, message",
    [(SELECTION_FILE, *case) for case in RECORDS] + [("trainer_state.json", *case) for case in STATES],
)
def test_a_wrong_field_of_a_run_is_named_with_its_file(tmp_path, capsys, name, given, message):
    folder = write_run(tmp_path / "run", **{"record" if name == SELECTION_FILE else "state": given})
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        load_run(folder)
    assert main(["report", str(folder)]) == 2 and "Traceback" not in capsys.readouterr().err


def test_losses_that_are_not_finite_are_shown_as_missing(tmp_path):
    endless = [math.nan, math.inf, -math.inf, 1e-300, 2e-300]
    folder = write_run(tmp_path / "run", recorded(rel=endless, mass=endless[::-1], nll=endless))
    assert main(["report", str(folder)]) == 0
    (run,) = Page((folder / "selection.html").read_text(encoding="utf-8")).data
    assert run["samples"][0]["rel"] == [None, None, None, 0, 0] and run["curves"]["signal_agreement"] == []
    assert run["curves"]["rel_std"] == [[1, None]]


def test_a_runs_folder_may_have_any_name(tmp_path, capsys):
    for name in ("</script><b>", "a\nb", "\x1b[31m\u202e", "\udcff"):
        folder = write_run(tmp_path / name.replace("/", "\u2044"))
        assert main(["report", str(folder)]) == 0
        (run,) = Page((folder / "selection.html").read_text(encoding="utf-8")).data
        assert run["name"] == folder.name
        (folder / SELECTION_FILE).unlink()
        assert main(["report", str(folder)]) == 2
        told = "".join(capsys.readouterr())
        assert not set("\x1b\u202e\udcff") & set(told)  # a terminal would obey


# Links


@pytest.fixture
def mine(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("mine")
    yield file
    assert file.read_text() == "mine"


def test_the_page_does_not_follow_a_link_of_the_run(tmp_path, mine):
    folder = write_run(tmp_path / "run")
    (folder / "selection.html").symlink_to(mine)
    assert main(["report", str(folder)]) == 0
    assert not (folder / "selection.html").is_symlink()


def test_a_page_in_the_place_of_a_device_is_refused(tmp_path, capsys):
    assert main(["report", str(write_run(tmp_path / "run")), "--output", "/dev/null"]) == 2
    assert "a device or a pipe cannot be replaced; name a file: '/dev/null'" in capsys.readouterr().err


@pytest.mark.parametrize("step", [1, 5])
def test_records_do_not_follow_a_link_of_the_run(tmp_path, mine, step):
    (tmp_path / SELECTION_FILE).symlink_to(mine)
    arguments = SimpleNamespace(output_dir=tmp_path)
    recorder = SampleRecorder(SimpleNamespace(train_dataset=[], args=arguments), 1)
    recorder.on_train_begin(arguments, SimpleNamespace(is_world_process_zero=True, global_step=step), None)
    assert not recorder.file.is_symlink() and recorder.file.read_bytes() == b""


def test_the_lock_of_results_does_not_empty_what_a_link_leads_to(tmp_path, mine):
    (tmp_path / "a.json.lock").symlink_to(mine)
    with alone(tmp_path / "a.json"):
        pass


# Results of benchmarks


@pytest.mark.parametrize("content", [DEEP, "[", "[1]", "null", "1" * 5000])
def test_results_that_are_none_are_named(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match="a.json.*--fresh replaces it"):
        resume(tmp_path / "a.json", {})


# Models


class Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.fixture
def foreign(model_dir, tmp_path, monkeypatch):
    """A copy of a model to change, the settings that name it, and the file that exists once its code has run."""
    folder = Path(shutil.copytree(model_dir, tmp_path / "model"))
    monkeypatch.setattr("builtins.input", lambda *a: "y")  # what `yes |` would answer
    yield folder, DataArguments(model_name_or_path=str(folder), dataset_name="-"), tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


def change(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_code_of_a_model_is_not_run(foreign):
    folder, settings, ran = foreign
    (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass A: pass\n")
    own = {"AutoConfig": "own.A", "AutoModelForCausalLM": "own.A", "AutoTokenizer": ["own.A", "own.A"]}
    change(folder / "config.json", auto_map=own, model_type="own")
    change(folder / "tokenizer_config.json", auto_map=own, tokenizer_class="Own")
    for load in (load_model, load_tokenizer, lambda s: load_reference(s.model_name_or_path, object())):
        with pytest.raises(ValueError, match="model.* brings code of its own, which is never run here"):
            load(settings)


def test_pickled_weights_are_not_unpickled(foreign):
    folder, settings, ran = foreign
    (folder / "model.safetensors").unlink()
    torch.save({"x": Bomb(ran)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="model cannot be loaded: .*"):
        load_model(settings)


@pytest.mark.parametrize(
    "name, content",
    [
        ("config.json", "{"),
        ("config.json", "[1]"),
        ("config.json", DEEP),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "{"),
        ("tokenizer_config.json", "[1]"),
        ("model.safetensors", "{"),
    ],
)
def test_a_damaged_file_of_a_model_is_named(foreign, name, content):
    folder, settings, _ = foreign
    (folder / name).write_text(content)
    with pytest.raises((ValueError, OSError), match=str(folder)):
        load_tokenizer(settings)
        load_model(settings)


@pytest.mark.parametrize(
    "entries", [{"hidden_size": "x"}, {"hidden_size": -1}, {"vocab_size": 10**13}, {"vocab_size": 7}]
)
def test_sizes_that_a_model_does_not_have_are_refused(foreign, entries):
    folder, settings, _ = foreign
    change(folder / "config.json", **entries)
    with pytest.raises(ValueError, match=f"{folder} cannot be loaded"):
        load_model(settings)
