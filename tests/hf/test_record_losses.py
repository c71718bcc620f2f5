"""Recording the losses of rows of token ids under a model at hand, and finding them again."""

from __future__ import annotations

import contextlib

import datasets
import numpy
import pytest
import torch
from training import ROWS, TOKENIZER, build, build_lora, eager_nll

import tokensel
from tokensel import recording
from tokensel.documents import documents_of
from tokensel.store import HistoryStore

SOME = [{name: list(row[name]) for name in ("input_ids", "labels")} for row in ROWS.select(range(5))]


def masked(row, name="completion_mask"):
    return {"input_ids": row["input_ids"], name: [int(label != -100) for label in row["labels"]]}


def padded(row, left, right):
    width = left + len(row["input_ids"]) + right
    ids, mask = [5] * width, [0] * width
    ids[left : width - right], mask[left : width - right] = row["input_ids"], [1] * len(row["input_ids"])
    labels = [-100] * left + row["labels"] + [7] * right  # a label on padding is none
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def strung_together(rows):
    joined = {name: sum((row[name] for row in rows), []) for name in ("input_ids", "labels")}
    return joined | {"seq_lengths": [len(row["input_ids"]) for row in rows]}


LAYOUTS = {
    "labels": SOME,
    "completions": [masked(row) for row in SOME],
    "two masks": [masked(row) | masked({**row, "labels": row["input_ids"]}, "assistant_masks") for row in SOME],
    "padded": [padded(row, i, 9 - i) for i, row in enumerate(SOME)],
    "packed": [strung_together(SOME[:2]), strung_together(SOME[2:])],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_document_of_the_rows_is_found_with_its_loss(tmp_path, layout):
    model = build()
    rows = datasets.Dataset.from_list(LAYOUTS[layout])
    summary = tokensel.record_losses(model, rows, tmp_path / "h.parquet", tokenizer=TOKENIZER, batch_size=2)
    store = HistoryStore.open(tmp_path / "h.parquet", tokenizer=TOKENIZER)
    total = 0.0
    for row in SOME:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        response = labels[0] != -100
        expected = eager_nll(model, row)[response]
        found = store.lookup(ids, labels)[0][response].double()
        torch.testing.assert_close(found, expected, rtol=2.0**-23, atol=0)
        total += float(expected.sum())
    tokens = sum(label != -100 for row in SOME for label in row["labels"])
    assert (summary["documents"], summary["response_tokens"], len(store)) == (5, tokens, 5)
    assert summary["mean_nll"] == pytest.approx(total / tokens, rel=1e-6)


def test_rows_without_labels_or_masks_are_responses_but_for_their_first_token():
    assert documents_of({"input_ids": [4, 5, 6]}) == [{"input_ids": [4, 5, 6], "labels": [-100, 5, 6]}]
    assert documents_of({"input_ids": numpy.array([4, 5]), "labels": torch.tensor([4, 5])}) == [
        {"input_ids": [4, 5], "labels": [-100, 5]}
    ]
    assert documents_of({"input_ids": [4], "labels": [4], "attention_mask": [0]}) == []


@pytest.mark.parametrize("patched", [False, True])
def test_the_model_is_afterwards_what_it_was(tmp_path, patched):
    model = build_lora(dropout=0.5).train()
    if patched:
        tokensel.apply_to(model)
    modules = {name: module.training for name, module in model.named_modules()}
    tokensel.record_losses(model, SOME, tmp_path / "h.parquet")
    assert {name: module.training for name, module in model.named_modules()} == modules
    if patched:
        tokensel.remove(model)
    with pytest.raises(ValueError, match="is not patched"):
        tokensel.remove(model)
    store = HistoryStore.open(tmp_path / "h.parquet")
    row = SOME[0]
    found = store.lookup(torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]]))[0]
    response = torch.tensor(row["labels"]) != -100
    expected = eager_nll(model, row)  # the adapters are on, dropout is off
    torch.testing.assert_close(found[response].double(), expected[response], rtol=2.0**-23, atol=0)


@pytest.mark.parametrize(
    "rows, error, message",
    [
        ([], ValueError, "there is no row"),
        ([{"text": "a"}], ValueError, "row 0: a row must have input_ids; it has text"),
        (
            [SOME[0], {"input_ids": [4, 5], "labels": [5]}],
            ValueError,
            "row 1: labels has 1 entries, but the row has 2 input_ids",
        ),
        ([{"input_ids": [4, 5], "seq_lengths": [1, 2]}], ValueError, r"seq_lengths are 1 \+ 2, but the row has 2"),
        ([{"input_ids": [4, 5], "completion_mask": [1]}], ValueError, "row 0: completion_mask has 1 entries"),
        ([{"input_ids": [4, 9999]}], ValueError, "token 9999 has no embedding: .* has 384"),
        ([SOME[0], {"input_ids": [4, -3]}], ValueError, "row 1: token -3 with label -3; token ids are not negative"),
        ([{"input_ids": [4, 5], "labels": [4, -1]}], ValueError, "row 0: token 5 with label -1; token ids are not"),
        ([{"input_ids": [4, 5], "labels": [4, 9999]}], ValueError, "token 9999 has no embedding: .* has 384"),
        (7, TypeError, "rows must be an iterable of mappings, one a row; got int"),
        ({"input_ids": [[4, 5]]}, TypeError, "rows must be an iterable of mappings, one a row; got dict"),
    ],
)
def test_rows_that_cannot_be_recorded_are_named(tmp_path, rows, error, message):
    with pytest.raises(error, match=message):
        tokensel.record_losses(build(), rows, tmp_path / "h.parquet")
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_not_written_over(tmp_path):
    (tmp_path / "h.parquet").write_bytes(b"mine")
    with pytest.raises(ValueError, match="h.parquet exists; move it away"):
        tokensel.record_losses(build(), SOME, tmp_path / "h.parquet")


def test_two_kinds_of_store_are_not_made_at_once(tmp_path):
    with pytest.raises(ValueError, match="first_token and negative"):
        tokensel.record_losses(build(), SOME, tmp_path / "h.parquet", first_token=1, negative=build(seed=2))


def test_without_prompts_rows_of_equal_tokens_and_different_labels_are_refused(tmp_path):
    row = SOME[2]
    other = row | {"labels": [-100, *row["input_ids"][1:]]}
    assert other["labels"] != row["labels"]
    for rows in ([SOME[0], row, row, other], [strung_together([SOME[0], row]), row, other]):
        first = rows.index(row) if row in rows[:-2] else 0
        message = f"rows {first} and {len(rows) - 1} have the same token ids and different response tokens"
        with pytest.raises(ValueError, match=message):
            tokensel.record_losses(build(), rows, tmp_path / "h.parquet", first_token=1)
    assert list(tmp_path.iterdir()) == []
    summary = tokensel.record_losses(build(), [row, row], tmp_path / "h.parquet", first_token=1)
    assert summary["documents"] == 1


class Numbered(torch.utils.data.Dataset):
    """Stops at no index."""

    def __len__(self):
        return len(SOME)

    def __getitem__(self, number):
        return SOME[number % len(SOME)]


class Sized(torch.utils.data.IterableDataset):
    def __len__(self):
        return len(SOME)

    def __iter__(self):
        return iter(SOME)


def stream():
    return ROWS.select(range(5)).to_iterable_dataset()


@pytest.mark.parametrize("rows", [lambda: iter(SOME), Numbered, Sized, stream])
def test_any_iterable_of_rows_gives_the_same_store(tmp_path, rows):
    tokensel.record_losses(build(), SOME, tmp_path / "list.parquet")
    tokensel.record_losses(build(), rows(), tmp_path / "h.parquet")
    assert (tmp_path / "h.parquet").read_bytes() == (tmp_path / "list.parquet").read_bytes()


def interrupted(monkeypatch, *args, **options):
    """A call that fails when it has recorded a batch."""
    losses_of, calls = recording.losses_of, iter(range(1))

    def until(*given):
        if next(calls, None) is None:
            raise OSError("broken")
        return losses_of(*given)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="broken"):
        patch.setattr(recording, "losses_of", until)
        tokensel.record_losses(*args, batch_size=2, **options)


def another_label(rows):
    return [rows[0] | {"labels": [-100, *([7] * (len(rows[0]["labels"]) - 1))]}, *rows[1:]]


@pytest.mark.parametrize("what", ["first_token", "labels", "weights", "adapters", "autocast"])
def test_what_gives_other_losses_is_not_gone_on_with(tmp_path, monkeypatch, what):
    model, path = build_lora(), tmp_path / "h.parquet"
    first = 1 if what == "first_token" else None
    rows = another_label(SOME) if what == "labels" else SOME
    interrupted(monkeypatch, model, SOME if what == "labels" else rows, path, first_token=first)
    context = contextlib.nullcontext()
    if what == "first_token":
        first = 2
    elif what == "weights":  # behind the first entries
        with torch.no_grad():
            model.get_base_model().lm_head.weight[-1] += 1.0
    elif what == "adapters":
        context = model.disable_adapter()
    elif what == "autocast":
        context = torch.autocast("cpu", torch.bfloat16)
    with context, pytest.raises(ValueError, match="belongs to an unfinished run with other settings"):
        tokensel.record_losses(model, rows, path, batch_size=2, first_token=first)
    assert not path.exists()


def test_under_autocast_losses_are_those_of_the_cast_model(tmp_path):
    with torch.autocast("cpu", torch.bfloat16):
        tokensel.record_losses(build(), SOME, tmp_path / "cast.parquet")
    tokensel.record_losses(build(), SOME, tmp_path / "whole.parquet")
    cast, whole = (HistoryStore.open(tmp_path / f"{name}.parquet") for name in ("cast", "whole"))
    row = torch.tensor([SOME[0]["input_ids"]]), torch.tensor([SOME[0]["labels"]])
    difference = (cast.lookup(*row) - whole.lookup(*row)).abs().max()
    assert 0 < difference < 0.2


@pytest.mark.parametrize("name", ["h/", "./a b", "h.parquet"])
def test_an_output_may_be_named_in_any_way(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    interrupted(monkeypatch, build(), SOME, name)
    tokensel.record_losses(build(), SOME, name)
    assert len(HistoryStore.open(name)) == 5 and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="exists; move it away"):
        tokensel.record_losses(build(), SOME, name)


def test_what_is_left_of_a_finished_output_is_named(tmp_path):
    tokensel.record_losses(build(), SOME, tmp_path / "h.parquet")
    (tmp_path / "h.parquet.partial").mkdir()
    with pytest.raises(ValueError, match=r"exists \(.*h.parquet.partial is left of its making, and may be removed\)"):
        tokensel.record_losses(build(), SOME, tmp_path / "h.parquet")
