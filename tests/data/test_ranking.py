from __future__ import annotations

import os

import numpy
import pytest
import torch
from recorded import make_documents, select, write

from tokensel import methods, ranking
from tokensel.cli import main
from tokensel.documents import document_keys, keys_at
from tokensel.select.rules import TopShare, top_quota
from tokensel.select.signals import TokenSignals
from tokensel.store import HistoryStore

pytestmark = pytest.mark.usefixtures("small_row_groups")

# The exact selection


def pieces(values, cuts):
    return lambda: (
        (part, places)
        for part, places in zip(numpy.split(values, cuts), numpy.split(numpy.arange(len(values)), cuts), strict=True)
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["continuous", "ties", "constant", "extremes"])
def test_the_streamed_threshold_is_the_sort(dtype, kind):
    random = numpy.random.default_rng(0)
    values = {
        "continuous": random.normal(size=301),
        "ties": random.integers(-3, 3, 301) * 0.5 * random.choice([1.0, -0.0], 301),  # 0 and -0 are equal
        "constant": numpy.full(301, -2.5),
        "extremes": random.choice([-numpy.inf, numpy.inf, 1e-45, -1e-45, 3e38, -3e38, 0.0, -0.0, 1.0], 301),
    }[kind].astype(dtype)
    everything, one = torch.ones(301, dtype=torch.bool), torch.zeros(301, dtype=torch.int64)
    for k in (1, 2, 100, 180, 300, 301):
        threshold = ranking.top_threshold(pieces(values, [7, 7, 150, 299]), lambda n, k=k: k)
        keep = threshold.keep(values, numpy.arange(301))
        expected = top_quota(torch.from_numpy(values), everything, one, torch.full((301,), k))
        assert keep.sum() == k and numpy.array_equal(keep, expected.numpy())


def test_nothing_to_keep_has_no_threshold():
    assert ranking.top_threshold(pieces(numpy.ones(4, numpy.float32), [2]), lambda n: 0) is None
    with pytest.raises(RuntimeError, match="other scores"):
        calls = iter([numpy.ones(4, numpy.float32), numpy.ones(4, numpy.float32), numpy.zeros(4, numpy.float32)])
        ranking.top_threshold(lambda: iter([(next(calls), numpy.arange(4))]), lambda n: 2)


# Stores -> weights


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
    dataset = ranking.RecordedDataset({f"{name}_nll": stores[name] for name in ("base", "reference")})
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
