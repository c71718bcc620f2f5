"""Rows of random words, cut at random lengths, against what their tokens have to be."""

from __future__ import annotations

import pytest
from encoding import ID, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from tokensel.data import encode_rows

TOKENIZER = make_tokenizer()
words = st.lists(st.sampled_from("abcdefgh"), max_size=5)
some_words = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=5)


def cut(tokens, max_length):
    """(ids, labels) of (word, whether it is an answer); nothing predicts the first."""
    ids = [ID[word] for word, _ in tokens[:max_length]]
    answers = [False, *(answer for _, answer in tokens[1:max_length])]
    return ids, [token if answer else -100 for token, answer in zip(ids, answers, strict=True)]


def check(rows, expected, max_length):
    """Documents without an answer are dropped, and counted."""
    documents = [cut(tokens, max_length) for tokens in expected]
    kept = [d for d in documents if any(label != -100 for label in d[1])]
    if not kept:
        with pytest.raises(ValueError, match="response token"):
            encode_rows(rows, TOKENIZER, max_length)
        return
    encoded, counts = encode_rows(rows, TOKENIZER, max_length)
    assert list(zip(encoded["input_ids"], encoded["labels"], strict=True)) == kept
    assert counts.rows == len(rows) and counts.documents == len(kept)
    assert counts.without_response == len(rows) - len(kept)
    assert counts.tokens == sum(len(ids) for ids, _ in kept)
    assert counts.response_tokens == sum(label != -100 for _, labels in kept for label in labels)


@given(rows=st.lists(st.tuples(words, some_words), min_size=1, max_size=4), max_length=st.integers(2, 14))
def test_prompts_and_completions(rows, max_length):
    texts = [{"prompt": " ".join(prompt), "completion": " ".join(answer)} for prompt, answer in rows]
    expected = [
        [("<s>", False), *((w, False) for w in prompt), *((w, True) for w in answer), ("</s>", True)]
        for prompt, answer in rows
    ]
    check(texts, expected, max_length)


turns = st.lists(st.tuples(some_words, some_words), min_size=1, max_size=3)


@given(chats=st.lists(turns, min_size=1, max_size=3), max_length=st.integers(2, 30))
def test_chats(chats, max_length):
    rows, expected = [], []
    for chat in chats:
        messages, tokens = [], []
        for question, answer in chat:
            messages.append({"role": "user", "content": " ".join(question)})
            messages.append({"role": "assistant", "content": " ".join(answer)})
            tokens += [("<user>", False), *((w, False) for w in question), ("<bot>", False)]
            tokens += [*((w, True) for w in answer), ("</s>", True)]
        rows.append({"messages": messages})
        expected.append(tokens)
    check(rows, expected, max_length)
