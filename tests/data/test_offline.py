from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

import tokensel.store as store_module
from tokensel import methods, offline
from tokensel.cli import main
from tokensel.data import encode_rows, load_rows
from tokensel.documents import document_keys, keys_at
from tokensel.journal import Journal
from tokensel.select.rules import TopShare, top_quota
from tokensel.select.signals import TokenSignals
from tokensel.store import HistoryStore, HistoryWriter
from tokensel.testing import make_model, make_rows, make_tokenizer

LIMIT = 64
ROWS = make_rows(30, seed=3)


@pytest.fixture(autouse=True)
def _small_row_groups(monkeypatch):
    monkeypatch.setattr(store_module, "ROW_GROUP_TOKENS", 50)
    monkeypatch.delenv("TOKENSEL_TRACEBACK", raising=False)


# The exact selection


def pieces(values, cuts):
    return lambda: (
        (part, places)
        for part, places in zip(numpy.split(values, cuts), numpy.split(numpy.arange(len(values)), cuts), strict=True)
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["continuous", "ties", "constant", "extremes"])
def test_the_streamed_cut_is_the_sort(dtype, kind):
    random = numpy.random.default_rng(0)
    values = {
        "continuous": random.normal(size=301),
        "ties": random.integers(-3, 3, 301) * 0.5 * random.choice([1.0, -0.0], 301),  # 0 and -0 are equal
        "constant": numpy.full(301, -2.5),
        "extremes": random.choice([-numpy.inf, numpy.inf, 1e-45, -1e-45, 3e38, -3e38, 0.0, -0.0, 1.0], 301),
    }[kind].astype(dtype)
    everything, one = torch.ones(301, dtype=torch.bool), torch.zeros(301, dtype=torch.int64)
    for k in (1, 2, 100, 180, 300, 301):
        cut = offline.cut_of_top(pieces(values, [7, 7, 150, 299]), lambda n, k=k: k)
        keep = cut.keep(values, numpy.arange(301))
        expected = top_quota(torch.from_numpy(values), everything, one, torch.full((301,), k))
        assert keep.sum() == k and numpy.array_equal(keep, expected.numpy())


def test_nothing_to_keep_has_no_cut():
    assert offline.cut_of_top(pieces(numpy.ones(4, numpy.float32), [2]), lambda n: 0) is None
    with pytest.raises(RuntimeError, match="other scores"):
        calls = iter([numpy.ones(4, numpy.float32), numpy.ones(4, numpy.float32), numpy.zeros(4, numpy.float32)])
        offline.cut_of_top(lambda: iter([(next(calls), numpy.arange(4))]), lambda n: 2)


# Stores -> weights


def make_documents(count=40, seed=0):
    """(ids, response, losses by name) of documents with several runs of response tokens; many losses are equal."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(2, 25, (), generator=generator))
        response = torch.rand(length, generator=generator) < 0.6
        response[0], response[-1] = False, True
        losses = {
            name: torch.randint(0, 9, (length,), generator=generator) / 4.0 for name in ("base", "reference", "alone")
        }
        found.append((torch.randint(0, 50, (length,), generator=generator), response, losses))
    return found


def write(path, documents, name, **options):
    content = {"alone": "alone_nll"}.get(name, "nll")
    with HistoryWriter(path, content=content, **options) as writer:
        for ids, response, losses in documents:
            labels = torch.where(response, ids, -100)
            writer.add(ids[None], labels[None], losses[name][None])
    return str(path)


@pytest.fixture
def stores(tmp_path):
    documents = make_documents()
    files = {}
    for i, name in enumerate(("base", "reference", "alone")):
        store_module.ROW_GROUP_TOKENS = 50 + 23 * i  # so that the files' row groups end at different documents
        files[name] = write(tmp_path / f"{name}.parquet", documents, name)
    return files


def select(output, method, recorded, method_args=None, **settings):
    text = ",".join(f"{name}={file}" for name, file in recorded.items())
    settings = {"method": method, "recorded": text, "output": output, "method_args": method_args} | settings
    return main(["select", *(p for n, v in settings.items() if v is not None for p in (f"--{n}", str(v)))])


def in_memory(documents, method):
    """The weights of all tokens, from all documents at once."""
    lengths = torch.tensor([len(ids) for ids, _, _ in documents])
    document = torch.repeat_interleave(torch.arange(len(documents)), lengths)
    sample = (lengths.cumsum(0) - lengths)[document]
    losses = {f"{n}_nll": torch.cat([d[2][n] for d in documents]) for n in ("base", "reference", "alone")}
    keys = torch.cat([document_keys(ids[None])[0] for ids, _, _ in documents])
    key = keys_at(keys, torch.arange(len(sample)) - sample)
    return method(TokenSignals(torch.cat([d[1] for d in documents]), sample, key=key, **losses))


def looked_up(path, documents):
    store = HistoryStore.open(path, content="weight")
    return torch.cat(
        [store.lookup(ids[None], torch.where(response, ids, -100)[None])[0] for ids, response, _ in documents]
    )


@pytest.mark.parametrize(
    "name, recorded, parameters",
    [
        ("token_cleaning", "base reference", {"rho": 0.6}),
        ("token_cleaning", "base reference", {"rho": 0.37}),
        ("token_cleaning", "base reference", {"rho": 1.0}),
        ("token_cleaning", "base reference", {"rho": 0.3, "scope": "sample"}),
        ("token_cleaning_iterative", "base reference", {"rho": 0.37}),
        ("t_shirt", "base alone", {"rho": 0.4, "token_share": 0.5}),
        ("random", "base", {"rho": 0.5, "seed": 3}),
        ("random", "alone", {"rho": 0.5, "seed": 3, "scope": "dataset"}),
    ],
)
def test_select_equals_the_computation_in_memory(tmp_path, stores, capsys, name, recorded, parameters):
    documents = make_documents()
    files = {name: stores[name] for name in recorded.split()}
    text = ",".join(f"{n}={v}" for n, v in parameters.items())
    assert select(tmp_path / "w.parquet", name, files, text) == 0
    expected = in_memory(documents, methods.get(name, **parameters))
    assert torch.equal(looked_up(tmp_path / "w.parquet", documents), expected)
    responses = sum(int(response.sum()) for _, response, _ in documents)
    assert f"40 documents, kept {int(expected.sum())} of {responses} response tokens" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["alone.parquet", "base.parquet", "reference.parquet", "w.parquet"]


def test_token_cleaning_keeps_the_floor_and_the_iterative_one_the_ceiling(tmp_path, stores):
    documents = make_documents()
    n = sum(int(response.sum()) for _, response, _ in documents)
    assert n * 0.37 % 1 > 0.01
    files = {name: stores[name] for name in ("base", "reference")}
    for name, kept in (("token_cleaning", int(n * 0.37)), ("token_cleaning_iterative", int(n * 0.37) + 1)):
        assert select(tmp_path / name, name, files, "rho=0.37") == 0
        assert looked_up(tmp_path / name, documents).sum() == kept
    scope = TopShare(0.37, "dataset", floor=True)
    assert int(scope.count(torch.ones(n, dtype=torch.bool), torch.arange(n))) == int(n * 0.37)


def test_a_store_of_weights_and_one_of_losses_are_told_apart(tmp_path, stores, capsys):
    files = {name: stores[name] for name in ("base", "reference")}
    assert select(tmp_path / "w.parquet", "token_cleaning", files) == 0
    with pytest.raises(ValueError, match="holds weights: `tokensel select`; here belong losses of a model"):
        HistoryStore.open(tmp_path / "w.parquet")
    with pytest.raises(ValueError, match="holds losses of a model: `tokensel score`; here belong weights"):
        HistoryStore.open(stores["base"], content="weight")
    for wrong in (tmp_path / "w.parquet", stores["alone"]):
        assert select(tmp_path / "x.parquet", "token_cleaning", files | {"base": wrong}) == 2
        assert f"{wrong} holds " in capsys.readouterr().err
    made = HistoryStore.open(tmp_path / "w.parquet", content="weight").metadata
    assert made["method"] == "token_cleaning" and made["recorded"] == {f"{n}_nll": f for n, f in files.items()}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d[:-1], "differ in documents: 40 and 39; score both with the same dataset, tokenizer and max_len"),
        (lambda d: [*d[:7], d[8], d[7], *d[9:]], "differ in document 7 (hash)"),
        (lambda d: [*d[:7], (d[7][0], d[7][1].logical_not().index_fill(0, torch.tensor([0]), False), d[7][2]), *d[8:]],
         "differ in what is a response (document 7, token 1)"),
    ],
    ids=["fewer", "another order", "another response"],
)  # fmt: skip
def test_stores_of_different_documents_are_refused(tmp_path, stores, capsys, change, message):
    other = write(tmp_path / "other.parquet", change(make_documents()), "reference")
    assert select(tmp_path / "w.parquet", "token_cleaning", {"base": stores["base"], "reference": other}) == 2
    error = capsys.readouterr().err
    assert message in error and stores["base"] in error and other in error
    assert not (tmp_path / "w.parquet").exists() and not (tmp_path / "w.parquet.partial").exists()


def test_documents_are_read_from_any_place_on(stores):
    documents = make_documents()
    with offline.RecordedDataset({f"{name}_nll": stores[name] for name in ("base", "reference")}) as dataset:
        for skip in range(len(documents) + 1):
            chunks = list(dataset.chunks(skip))
            assert [chunk.first for chunk in chunks] == [
                skip + sum(len(c.keys) for c in chunks[:i]) for i in range(len(chunks))
            ]
            for name in ("base", "reference"):
                values = [v for chunk in chunks for v in chunk.values[f"{name}_nll"].tolist() if v == v]
                assert values == [float(v) for d in documents[skip:] for v in d[2][name][d[1]]]


def test_stores_of_another_length_are_refused(tmp_path, stores, capsys):
    other = write(tmp_path / "other.parquet", make_documents(), "reference", max_length=9)
    assert select(tmp_path / "w.parquet", "token_cleaning", {"base": stores["base"], "reference": other}) == 2
    assert "differ in max_length: None and 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    "method, args, recorded, message",
    [
        ("rel", None, "base", "method 'rel' needs nll, which a training step measures"),
        ("attention", None, "base", "method 'attention' needs mass, which a training step measures"),
        ("min_k_pp", None, "base", "needs nll, which"),
        ("token_cleaning", None, "base", "needs a reference model's losses: "),
        ("token_cleaning", None, "base reference alone", "does not use alone_nll"),
        ("t_shirt", None, "base", "`tokensel score --without_prompt true`"),
        ("forgetting", None, "base reference", "weighs tokens and ranks none"),
        ("full", None, "base", "weighs tokens and ranks none"),
        ("token_cleaning", "scope=batch", "base reference", "among the tokens of a batch here; set scope=dataset"),
        ("random", "scope=micro_batch", "base", "among the tokens of a micro-batch here; set scope=dataset"),
        ("token_cleaning", "rho=0.0001", "base reference", "is less than one, so nothing would be kept; raise rho"),
        ("token_cleaning", "rho=0", "base reference", "rho must be in (0, 1]"),
        ("tokencleaning", None, "base reference", "did you mean 'token_cleaning'?"),
    ],
)
def test_what_recorded_losses_cannot_decide_is_refused(tmp_path, stores, capsys, method, args, recorded, message):
    files = {name: stores[name] for name in recorded.split()}
    assert select(tmp_path / "w.parquet", method, files, args) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "w.parquet").exists() and not (tmp_path / "w.parquet.partial").exists()


def test_bad_settings_of_select_are_named(tmp_path, stores, capsys):
    assert main(["select", "--method", "random"]) == 2
    assert "missing setting: recorded, output" in capsys.readouterr().err
    assert select(tmp_path / "w.parquet", "random", {"bas": stores["base"]}) == 2
    assert "recorded: unknown losses 'bas'" in capsys.readouterr().err
    assert select(tmp_path / "w.parquet", "random", {"base": tmp_path / "none.parquet"}) == 2
    assert "make it with `tokensel score`" in capsys.readouterr().err
    assert select(stores["base"], "random", {"base": stores["base"]}) == 2
    assert "exists; move it away" in capsys.readouterr().err


# The journal

SETTINGS = {"command": "test", "max_length": 9}


def put(journal, *documents):
    """Records documents (key, values) together."""
    keys = numpy.array([key for key, _ in documents], numpy.int64)
    lengths = numpy.array([len(values) for _, values in documents], numpy.int32)
    journal.append(keys, lengths, numpy.concatenate([numpy.array(v, numpy.float32) for _, v in documents]))


def held(journal, order=None):
    return [(key, values.tolist()) for key, values in journal.documents(order)]


A, B, C = (5, [1.0, 2.0]), (-3, [3.0]), (1 << 62, [4.0, 5.0, 6.0])


def test_a_journal_survives_and_is_read_in_any_order(tmp_path):
    with Journal(tmp_path / "out", SETTINGS) as journal:
        put(journal, A, B)
        assert held(journal) == [A, B]
        put(journal, C)
        journal.state["cut"] = 7
        journal.save_state()
    with Journal(tmp_path / "out", SETTINGS) as journal:
        assert journal.keys.tolist() == [A[0], B[0], C[0]] and journal.lengths.tolist() == [2, 1, 3]
        assert journal.state == {"cut": 7}
        assert held(journal, numpy.array([C[0], A[0], B[0]])) == [C, A, B]
        journal.remove()
    assert os.listdir(tmp_path) == []


def test_wherever_a_record_is_torn_the_ones_before_it_stay(tmp_path):
    with Journal(tmp_path / "out", SETTINGS) as journal:
        put(journal, A, B)
        first = (journal.directory / "rows").stat().st_size
        put(journal, C)
    rows = tmp_path / "out.partial" / "rows"
    whole = rows.read_bytes()
    damaged = [whole[:size] for size in range(first, len(whole))]  # a killed process
    damaged += [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(first, len(whole))]  # a bad disk
    for bytes_ in damaged:
        rows.write_bytes(bytes_)
        with Journal(tmp_path / "out", SETTINGS) as journal:
            assert held(journal) == [A, B]
            put(journal, C)
        assert rows.read_bytes() == whole


def test_a_journal_of_other_settings_is_refused_with_the_difference(tmp_path):
    with Journal(tmp_path / "out", SETTINGS) as journal:
        put(journal, A)
    with pytest.raises(ValueError, match="out.partial belongs to .* other settings: max_length was 9 and is 8. Give"):
        with Journal(tmp_path / "out", SETTINGS | {"max_length": 8}):
            pytest.fail("the block must not run")
    with Journal(tmp_path / "out", SETTINGS) as journal:
        assert held(journal) == [A]


def test_two_processes_do_not_share_a_journal(tmp_path):
    with Journal(tmp_path / "out", SETTINGS):
        with pytest.raises(BlockingIOError, match="another process is writing"):
            with Journal(tmp_path / "out", SETTINGS):
                pytest.fail("the block must not run")


def test_a_run_that_failed_before_its_first_record_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError):
        with Journal(tmp_path / "out", SETTINGS):
            raise RuntimeError
    assert os.listdir(tmp_path) == []


class FullFile:
    """A file on a disk with room for `room` bytes more; what does not fit is partly written."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.file.write(data[: max(self.room, 0)])
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 10, 30, 60])
def test_a_full_disk_keeps_the_journal_and_says_so(tmp_path, room):
    with pytest.raises(OSError, match="kept in .*out.partial. Free some space and run the same command again") as error:
        with Journal(tmp_path / "out", SETTINGS) as journal:
            put(journal, A, B)
            journal._file = FullFile(journal._file, room)
            put(journal, C, A, B)
    assert error.value.errno == errno.ENOSPC
    with Journal(tmp_path / "out", SETTINGS) as journal:
        assert held(journal) == [A, B]


# `tokensel score`, killed and resumed


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer(make_rows(60, seed=5), vocab_size=320)
    make_model(tokenizer, hidden_size=32, layers=2, heads=2, kv_heads=1, seed=0).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [*ROWS, *ROWS[:5]]  # five rows come twice
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def arguments(model_dir, data, output, **settings):
    settings = {
        "model_name_or_path": model_dir,
        "dataset_name": data,
        "max_length": LIMIT,
        "batch_size": 4,
        "output": output,
    } | settings
    return ["score", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]


KILLED_WHILE_WRITING = """
import os, signal, sys
import tokensel.store
from tokensel import journal
from tokensel.cli import main
tokensel.store.ROW_GROUP_TOKENS = 50
records, last, append = 0, int(sys.argv[1]), journal.Journal.append
def append_until(self, *document):
    global records
    records += 1
    if records > last:  # in the middle of a record
        self._file.write(b"tsj1 half a header")
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    append(self, *document)
journal.Journal.append = append_until
main(sys.argv[2:])
"""


def run_until_killed(records, argv):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, str(records), *argv]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr


APPEND = Journal.append


def break_after(records, monkeypatch):
    """The next run fails when it has recorded so many batches; the one after does not."""
    left = iter(range(records))

    def append(*args):
        if next(left, None) is None:
            monkeypatch.setattr(Journal, "append", APPEND)
            raise OSError("broken")
        APPEND(*args)

    monkeypatch.setattr(Journal, "append", append)


@pytest.fixture
def scored_rows(monkeypatch):
    """Numbers of tokens of the rows that pass through the model."""
    found, original = [], offline.losses_under

    def counting(*args, **kwargs):
        losses = original(*args, **kwargs)
        return lambda rows: found.extend(len(row["input_ids"]) for row in rows) or losses(rows)

    monkeypatch.setattr(offline, "losses_under", counting)
    return found


def test_a_killed_score_goes_on_and_writes_the_same_bytes(tmp_path, model_dir, data, capsys, scored_rows):
    whole, output = tmp_path / "whole.parquet", tmp_path / "h.parquet"
    assert main(arguments(model_dir, data, whole)) == 0
    all_rows = scored_rows.copy()
    assert all_rows == sorted(all_rows, reverse=True)  # the longest first
    assert len(all_rows) == 30 and "35 rows (5 of them repeated)" in capsys.readouterr().out
    run_until_killed(3, arguments(model_dir, data, output))
    assert not output.exists()
    scored_rows.clear()
    assert main(arguments(model_dir, data, output)) == 0
    assert scored_rows == all_rows[12:]  # none again, none left out
    assert f"going on with {output}.partial: 12 documents are done" in capsys.readouterr().out
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["h.parquet", "rows.jsonl", "whole.parquet"]


def test_a_broken_select_goes_on_and_writes_the_same_bytes(tmp_path, stores, capsys, monkeypatch):
    files = {name: stores[name] for name in ("base", "reference")}
    monkeypatch.setattr(store_module, "ROW_GROUP_TOKENS", 50)
    assert select(tmp_path / "whole.parquet", "token_cleaning", files) == 0
    text = ",".join(f"{name}={file}" for name, file in files.items())
    output = tmp_path / "w.parquet"
    argv = ["select", "--method", "token_cleaning", "--recorded", text, "--output", str(output)]
    break_after(4, monkeypatch)
    assert main(argv) == 2
    assert not output.exists() and (tmp_path / "w.parquet.partial" / "state.json").is_file()
    ranked, original = [], offline.cut_of_top
    monkeypatch.setattr(offline, "cut_of_top", lambda *a: ranked.append(1) or original(*a))
    written, append = [], Journal.append
    monkeypatch.setattr(Journal, "append", lambda self, keys, *rest: written.extend(keys) or append(self, keys, *rest))
    assert main(argv) == 0
    assert not ranked and 0 < len(written) < 40
    assert f"{40 - len(written)} documents are done" in capsys.readouterr().out
    assert output.read_bytes() == (tmp_path / "whole.parquet").read_bytes()


@pytest.mark.parametrize("what", ["max_length", "dataset", "weights", "without_prompt", "dtype"])
def test_a_score_with_other_settings_is_refused(tmp_path, model_dir, data, capsys, monkeypatch, what):
    output = tmp_path / "h.parquet"
    break_after(2, monkeypatch)
    assert main(arguments(model_dir, data, output)) == 2
    changed = {"max_length": {"max_length": 63}, "without_prompt": {"without_prompt": "true"}}.get(what, {})
    if what == "dtype":
        changed = {"dtype": "bfloat16"}
    if what == "dataset":
        Path(data).write_text("".join(json.dumps(row) + "\n" for row in ROWS[1:]))
    if what == "weights":
        monkeypatch.setattr(offline, "weights_fingerprint", lambda model: "another")
    capsys.readouterr()
    assert main(arguments(model_dir, data, output, **changed)) == 2
    error = capsys.readouterr().err
    assert f"{output}.partial belongs to an unfinished run with other settings: " in error and f"{what} was" in error
    assert not output.exists()


def test_a_resumed_score_may_use_another_batch_size(tmp_path, model_dir, data, scored_rows, monkeypatch):
    output = tmp_path / "h.parquet"
    break_after(2, monkeypatch)
    assert main(arguments(model_dir, data, output)) == 2
    scored_rows.clear()
    assert main(arguments(model_dir, data, output, batch_size=1)) == 0
    assert len(scored_rows) == 30 - 8 and len(HistoryStore.open(output)) == 30


def test_the_fingerprint_of_weights_notices_training(model_dir):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    before = offline.weights_fingerprint(model)
    assert offline.weights_fingerprint(AutoModelForCausalLM.from_pretrained(model_dir)) == before
    with torch.no_grad():
        model.lm_head.weight += 1e-3
    assert offline.weights_fingerprint(model) != before


def test_documents_stand_in_the_order_of_the_data(tmp_path, model_dir, data):
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    assert main(arguments(model_dir, data, tmp_path / "h.parquet")) == 0
    rows, _ = encode_rows(load_rows(data), AutoTokenizer.from_pretrained(model_dir), LIMIT)
    expected = [int(document_keys(torch.tensor([ids]))[0, 0]) for ids in rows["input_ids"]][:30]
    assert pq.read_table(tmp_path / "h.parquet")["key"].to_pylist() == expected
    identity = offline.identify(rows)
    assert identity.keys[:30].tolist() == expected and identity.documents().tolist() == list(range(30))
    assert identity.digest != offline.identify(rows.select(range(34))).digest


# Responses without their prompts


def test_alone_is_the_loss_behind_bos_only(tmp_path, model_dir, data):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert main(arguments(model_dir, data, tmp_path / "alone.parquet", without_prompt="true")) == 0
    store = HistoryStore.open(tmp_path / "alone.parquet", content="alone_nll")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    rows, _ = encode_rows(load_rows(data), tokenizer, LIMIT)
    for row in rows.select(range(5)):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        response = ids[labels != -100]
        alone = torch.cat([torch.tensor([tokenizer.bos_token_id]), response])[None]
        with torch.no_grad():
            logp = model(alone).logits[0, :-1].double().log_softmax(-1)
        expected = -logp.gather(1, response[:, None])[:, 0]
        found = store.lookup(ids, labels)[labels != -100].double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_alone_drops_every_turn_of_the_prompt():
    row = {"input_ids": [1, 5, 6, 7, 8, 9], "labels": [-100, -100, 6, -100, 8, 9]}
    assert offline.without_prompt(row, 2) == {"input_ids": [2, 6, 8, 9], "labels": [-100, 6, 8, 9]}


def test_t_shirt_end_to_end(tmp_path, model_dir, data):
    assert main(arguments(model_dir, data, tmp_path / "base.parquet")) == 0
    assert main(arguments(model_dir, data, tmp_path / "alone.parquet", without_prompt="true")) == 0
    files = {name: tmp_path / f"{name}.parquet" for name in ("base", "alone")}
    assert select(tmp_path / "w.parquet", "t_shirt", files, "rho=0.5") == 0
    import pyarrow.parquet as pq

    weights = [set(w) - {None} for w in pq.read_table(tmp_path / "w.parquet")["weight"].to_pylist()]
    kept = [{x for x in w if x == x} for w in weights]
    assert sorted(map(tuple, kept)) == [(0.0,)] * 15 + [(1.0,)] * 15  # whole samples


# The contrast of two models


def test_the_contrast_is_the_softmax_of_twice_one_minus_the_other(tmp_path, model_dir, data, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    wrong = make_model(tokenizer, hidden_size=16, layers=1, heads=2, kv_heads=1, seed=1)
    wrong.save_pretrained(tmp_path / "wrong")
    tokenizer.save_pretrained(tmp_path / "wrong")
    settings = {"contrast_model_name_or_path": tmp_path / "wrong"}
    assert main(arguments(model_dir, data, tmp_path / "c.parquet", **settings)) == 0, capsys.readouterr().err
    store = HistoryStore.open(tmp_path / "c.parquet", content="contrast_nll")
    right = AutoModelForCausalLM.from_pretrained(model_dir)
    for row in encode_rows(load_rows(data), tokenizer, LIMIT)[0].select(range(5)):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            z = 2 * right(ids).logits.double() - wrong(ids).logits.double()
        expected = -z[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        response = labels[0, 1:] != -100
        found = store.lookup(ids, labels)[0, 1:].double()
        torch.testing.assert_close(found[response], expected[response], rtol=1e-5, atol=1e-5)


def test_a_contrast_that_cannot_be_made_is_refused(tmp_path, model_dir, data, capsys):
    settings = {"contrast_model_name_or_path": model_dir, "without_prompt": "true"}
    assert main(arguments(model_dir, data, tmp_path / "c.parquet", **settings)) == 2
    assert "without_prompt and contrast_model_name_or_path" in capsys.readouterr().err
    other = make_tokenizer(make_rows(60, seed=5), vocab_size=300)
    make_model(other, hidden_size=16, layers=1, heads=2, kv_heads=1, seed=1).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    settings = {"contrast_model_name_or_path": tmp_path / "other"}
    assert main(arguments(model_dir, data, tmp_path / "c.parquet", **settings)) == 2
    assert f"{tmp_path / 'other'} has another tokenizer than {model_dir}" in capsys.readouterr().err


# Training on what was selected


def test_a_weights_store_trains_what_select_kept(tmp_path, model_dir, data, capsys):
    from tokensel.trainer import SelectiveTrainer

    for name in ("base", "reference"):
        dtype = {"base": "float32", "reference": "bfloat16"}[name]  # another model, if a near one
        assert main(arguments(model_dir, data, tmp_path / f"{name}.parquet", dtype=dtype)) == 0
    files = {name: tmp_path / f"{name}.parquet" for name in ("base", "reference")}
    assert select(tmp_path / "w.parquet", "token_cleaning", files, "rho=0.6") == 0
    store = HistoryStore.open(tmp_path / "w.parquet", content="weight")
    seen = []

    def record(self, inputs, output):
        labels = torch.where(output.response, inputs["labels"], -100)
        where = {"key_mask": inputs.get("attention_mask"), "segment_ids": output.sample}
        seen.append((output.weights, store.lookup(inputs["input_ids"], labels, **where), output.response))
        return original(self, inputs, output)

    original = SelectiveTrainer.record_selection
    settings = {
        "model_name_or_path": model_dir,
        "dataset_name": data,
        "max_length": LIMIT,
        "weights_store": tmp_path / "w.parquet",
        "use_cpu": "true",
        "report_to": "none",
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "max_steps": 2,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SelectiveTrainer, "record_selection", record)
        for method, packing in (("weighted", "false"), ("weighted", "true"), ("random", "false")):
            more = {"method": method, "packing": packing, "output_dir": tmp_path / f"{method} {packing}"}
            argv = [part for name, value in (settings | more).items() for part in (f"--{name}", str(value))]
            seen.clear()
            assert main(["train", *argv]) == 0, capsys.readouterr().err
            assert len(seen) == 2
            for weights, selected, response in seen:
                assert 0.3 < selected.sum() / response.sum() < 0.9
                if method == "weighted":
                    assert torch.equal(weights, selected)
                else:  # chooses among what was selected, of each sample
                    assert 0.55 < weights.sum() / selected.sum() < 0.75 and (weights <= selected).all()


def test_a_history_store_is_not_taken_for_weights(tmp_path, model_dir, data, capsys):
    assert main(arguments(model_dir, data, tmp_path / "h.parquet")) == 0
    argv = ["train", "--model_name_or_path", model_dir, "--dataset_name", data, "--max_length", str(LIMIT)]
    argv += ["--weights_store", str(tmp_path / "h.parquet"), "--output_dir", str(tmp_path / "run")]
    argv += ["--method", "weighted", "--use_cpu", "true", "--report_to", "none"]
    assert main(argv) == 2
    assert "here belong weights: `tokensel select`" in capsys.readouterr().err
