"""Spans that many rows say word for word."""

from __future__ import annotations

import random

import numpy
import pytest

from tokensel.data import weights_without_repeats


def row(prompt, answer):
    return {"input_ids": [*prompt, *answer], "labels": [-100] * len(prompt) + answer}


def by_hand(rows, length, fewest):
    """Every span of every row compared with every other one."""
    spans = []
    for each in rows:
        labels = each["labels"]
        places = range(len(labels) - length + 1)
        spans.append({i: tuple(labels[i : i + length]) for i in places if -100 not in labels[i : i + length]})
    weights = []
    for each, own in zip(rows, spans, strict=True):
        bad = {
            place
            for start, span in own.items()
            if sum(span in other.values() for other in spans) >= fewest
            for place in range(start, start + length)
        }
        weights.append([float(label != -100 and i not in bad) for i, label in enumerate(each["labels"])])
    return weights


def test_a_sentence_that_three_rows_share_is_left_out():
    sentence = [7, 8, 9, 10]
    rows = [row([1, 2], [*range(20, 20 + i), *sentence, 40 + i]) for i in range(3)]
    rows.append(row([1, *sentence], [60, 61, 62, 63, 64]))  # in a prompt it is nobody's answer
    weights = weights_without_repeats(rows, length=4)
    assert weights[0] == [0, 0, 0, 0, 0, 0, 1]
    assert weights[2] == [0, 0, 1, 1, 0, 0, 0, 0, 1]
    assert weights[3] == [0] * 5 + [1] * 5
    two = weights_without_repeats(rows[:2], length=4)
    assert two[1] == [0, 0, 1, 1, 1, 1, 1, 1]  # two rows may say the same


def test_all_spans_of_random_rows_are_those_found_by_hand():
    rng = random.Random(0)
    rows = []
    for _ in range(60):
        labels = []
        for _ in range(rng.randint(0, 4)):  # several answers in a row, between them -100
            labels += [-100] * rng.randint(0, 2) + [rng.randint(0, 2) for _ in range(rng.randint(0, 9))]
        rows.append({"input_ids": [label if label >= 0 else 1 for label in labels], "labels": labels})
    for length, share, fewest in ((3, 0.01, 3), (5, 0.1, 6), (4, 0.5, 30), (2, 1.0, 60)):
        expected = by_hand(rows, length, fewest)
        assert weights_without_repeats(rows, length=length, share=share) == expected
        if length == 5:
            assert 0.1 < numpy.mean([w for each in expected for w in each]) < 0.9  # or it would say nothing


def test_what_a_row_repeats_itself_counts_once():
    rows = [row([1], [5, 6, 7, 9, 5, 6, 7, 8, 5, 6, 7])] + [row([1], [2, 3, 4, i]) for i in range(2)]
    assert weights_without_repeats(rows, length=3)[0] == [0] + [1] * 11


def test_datasets_take_the_weights_as_a_column():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([row([1, 2], [7, 8, 9, i]) for i in range(20, 24)])
    with_weights = rows.add_column("token_weights", weights_without_repeats(rows, length=3))
    assert with_weights[1]["token_weights"] == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    "settings, named",
    [({"length": 1}, "length"), ({"share": 0}, "share"), ({"share": 1.5}, "share"), ({"length": "ten"}, "length")],
)
def test_bounds(settings, named):
    with pytest.raises((ValueError, TypeError), match=named):
        weights_without_repeats([row([1], [2, 3])], **settings)


def test_rows_are_read_twice():
    with pytest.raises(ValueError, match="rows must be a list or a dataset"):
        weights_without_repeats(iter([row([1], [2, 3])]))
    assert weights_without_repeats([]) == []
