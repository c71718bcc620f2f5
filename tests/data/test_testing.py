from __future__ import annotations

import re

import pytest
import torch

from tokensel.data import encode_rows
from tokensel.testing import NOISE_KINDS, docstring_rows, make_model, make_rows, make_tokenizer, plant_noise

ROWS = make_rows(60, seed=3)
TOKENIZER = make_tokenizer(ROWS, vocab_size=600)
SENTENCES = (
    "As always, please remember to check every detail with a qualified expert before you act on it.",
    "Thank you for reaching out today; we hope that this reply has been of great value to you.",
    "For more information, kindly visit our help pages or contact the friendly support team.",
)


def plant(kind, share=1.0, seed=0, rows=ROWS):
    return plant_noise(rows, TOKENIZER, kind=kind, share=share, seed=seed)


def as_chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def clean_ids(row):
    """(prompt, response without its end), tokenised here."""
    prompt = TOKENIZER.convert_tokens_to_ids(["<s>"]) + TOKENIZER(row["prompt"], add_special_tokens=False)["input_ids"]
    return prompt, TOKENIZER(row["completion"], add_special_tokens=False)["input_ids"]


# Rows


def test_rows_are_the_same_for_a_seed_and_others_for_another():
    assert make_rows(40, seed=1) == make_rows(40, seed=1)
    assert make_rows(40, seed=1) != make_rows(40, seed=2)
    assert make_rows(60, seed=3)[:20] == make_rows(20, seed=3)
    assert make_rows(0, seed=1) == []


def test_rows_have_a_prompt_and_a_completion_of_several_sentences():
    rows = make_rows(200, seed=0)
    assert len(rows) == 200
    for row in rows:
        assert list(row) == ["prompt", "completion"]
        assert row["prompt"].endswith("\n") and row["completion"].endswith(".") and ". " in row["completion"]
    openings = {row["prompt"].split()[0] for row in rows}
    assert {"Sort", "Continue", "How"} < openings  # every kind of task comes up


def test_the_arithmetic_in_the_answers_is_right():
    found = 0
    for row in make_rows(300, seed=0):
        for a, word, b, c in re.findall(r"(\d+) (times|minus) (\d+) is (\d+)", row["completion"]):
            assert int(c) == (int(a) * int(b) if word == "times" else int(a) - int(b)), row
            found += 1
        if row["prompt"].startswith("Sort"):
            given = [int(n) for n in re.findall(r"\d+", row["prompt"])]
            answer = row["completion"].split("In order they are ")[1]
            assert [int(n) for n in re.findall(r"\d+", answer)] == sorted(given)
        if row["prompt"].startswith("Continue"):
            a, b, c = (int(n) for n in re.findall(r"\d+", row["prompt"]))
            answer = row["completion"].split("The next terms are ")[1]
            assert [int(n) for n in re.findall(r"\d+", answer)] == [c + i * (b - a) for i in (1, 2, 3)]
    assert found > 100


# The tokenizer and the model


def test_the_tokenizer_gives_back_any_text():
    for text in [row["prompt"] + row["completion"] for row in ROWS] + [*SENTENCES, "Grüße, 你好 \t🙂\n\n  x "]:
        ids = TOKENIZER(text)["input_ids"]
        assert ids[0] == TOKENIZER.bos_token_id
        assert TOKENIZER.decode(ids[1:], clean_up_tokenization_spaces=False) == text


def test_the_tokenizer_has_its_special_tokens_first_and_the_size_asked_for():
    assert TOKENIZER.convert_tokens_to_ids(["<pad>", "<s>", "</s>"]) == [0, 1, 2]
    assert (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (0, 1, 2)
    assert len(TOKENIZER) == 600
    again = make_tokenizer(ROWS, vocab_size=600)
    assert again.get_vocab() == TOKENIZER.get_vocab()


def test_the_tokenizer_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    TOKENIZER.save_pretrained(tmp_path)
    text = ROWS[0]["prompt"] + ROWS[0]["completion"]
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == TOKENIZER(text)["input_ids"]


def test_the_model_has_the_size_asked_for():
    D, layers, heads, kv_heads, V = 48, 2, 4, 1, len(TOKENIZER)
    model = make_model(TOKENIZER, hidden_size=D, layers=layers, heads=heads, kv_heads=kv_heads, seed=0)
    F, kv = D * 8 // 3, D // heads * kv_heads
    block = 2 * D * D + 2 * D * kv + 3 * D * F + 2 * D
    assert sum(p.numel() for p in model.parameters()) == 2 * V * D + layers * block + D
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert model.config.max_position_embeddings == 512
    assert (model.config.pad_token_id, model.config.eos_token_id) == (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id)


def test_the_model_depends_on_its_seed_alone_and_leaves_the_global_generator():
    def build(seed):
        return make_model(TOKENIZER, hidden_size=16, layers=1, heads=2, kv_heads=1, seed=seed).state_dict()

    torch.manual_seed(5)
    first, after = build(1), torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    second, other = build(1), build(2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


# Noise


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_planting_is_the_same_for_a_seed(kind):
    assert plant(kind, 0.5, seed=4) == plant(kind, 0.5, seed=4)
    assert (plant(kind, 0.5, seed=4) == plant(kind, 0.5, seed=5)) is (kind == "none")


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_lists_are_of_one_length_and_the_prompt_and_the_end_stay(kind):
    for row, planted in zip(ROWS, plant(kind), strict=True):
        prompt, _ = clean_ids(row)
        ids, labels, noise = planted["input_ids"], planted["labels"], planted["noise"]
        P = len(prompt)
        assert len(ids) == len(labels) == len(noise)
        assert ids[:P] == prompt and labels[:P] == [-100] * P and noise[:P] == [0] * P
        assert labels[P:] == ids[P:] and set(noise) <= {0, 1}
        assert ids[-1] == TOKENIZER.eos_token_id and noise[-1] == 0
        assert not set(ids[P:-1]) & set(TOKENIZER.all_special_ids)


@pytest.mark.parametrize("kind, share", [("none", 1.0), ("boilerplate", 0.0), ("random", 0.0), ("mixed", 0.0)])
def test_without_noise_the_rows_are_their_clean_tokens(kind, share):
    for row, planted in zip(ROWS, plant(kind, share), strict=True):
        prompt, response = clean_ids(row)
        assert planted["input_ids"] == [*prompt, *response, TOKENIZER.eos_token_id]
        assert not any(planted["noise"])


def test_boilerplate_is_one_sentence_between_two_and_nothing_else_changes():
    places = set()
    for row, planted in zip(ROWS, plant("boilerplate"), strict=True):
        prompt, response = clean_ids(row)
        ids, noise = planted["input_ids"], planted["noise"]
        assert [i for i, n in zip(ids, noise, strict=True) if not n] == [*prompt, *response, TOKENIZER.eos_token_id]
        where = [t for t, n in enumerate(noise) if n]
        assert where == list(range(where[0], where[-1] + 1))  # one run
        assert TOKENIZER.decode([ids[t] for t in where]).strip() in SENTENCES
        before, after = TOKENIZER.decode(ids[len(prompt) : where[0]]), TOKENIZER.decode(ids[where[-1] + 1 : -1])
        assert before.endswith(".") and after.startswith(" ") and before + after == row["completion"]
        places.add(before.count(". "))
    assert len(places) > 1  # not always behind the first sentence


def test_random_noise_replaces_thirty_percent_of_the_response_in_place():
    drawn = []
    for row, planted in zip(ROWS, plant("random"), strict=True):
        prompt, response = clean_ids(row)
        ids, noise = planted["input_ids"], planted["noise"]
        clean = [*prompt, *response, TOKENIZER.eos_token_id]
        assert len(ids) == len(clean) and sum(noise) == round(0.3 * len(response))
        assert all(a == b for a, b, n in zip(ids, clean, noise, strict=True) if not n)
        drawn += [i for i, n in zip(ids, noise, strict=True) if n]
    assert len(set(drawn)) > 0.5 * len(drawn)  # spread over the vocabulary, not a few tokens
    assert min(drawn) >= 3 and max(drawn) < len(TOKENIZER) and max(drawn) > 0.9 * len(TOKENIZER)


def test_mixed_noise_is_both():
    for row, planted in zip(ROWS, plant("mixed"), strict=True):
        prompt, response = clean_ids(row)
        kept = [i for i, n in zip(planted["input_ids"], planted["noise"], strict=True) if not n]
        clean = iter([*prompt, *response, TOKENIZER.eos_token_id])
        assert all(token in clean for token in kept)  # what is left is a subsequence of the clean tokens
        total = len(planted["input_ids"]) - len(prompt) - 1
        added = total - len(response)
        assert added > 5 and sum(planted["noise"]) > added
        assert sum(planted["noise"]) <= added + round(0.3 * total)


@pytest.mark.parametrize("kind", ["boilerplate", "random"])
def test_share_is_of_the_rows(kind):
    rows = make_rows(400, seed=0)
    noisy = [any(planted["noise"]) for planted in plant(kind, 0.25, rows=rows)]
    assert 60 <= sum(noisy) <= 140  # 100 expected, four and a half standard deviations
    assert all(any(planted["noise"]) for planted in plant(kind, 1.0))


def test_rows_are_not_changed():
    rows = make_rows(5, seed=0)
    plant("mixed", rows=rows)
    assert rows == make_rows(5, seed=0)


def test_an_unknown_kind_and_a_share_outside_0_to_1_are_errors():
    with pytest.raises(ValueError, match="kind must be one of none, boilerplate, random, mixed, swapped; got 'typos'"):
        plant("typos")
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"share must be in \[0, 1\]; got {share}"):
            plant("random", share)


def test_a_chat_without_noise_is_as_encode_rows_has_it_and_with_noise_its_answer_alone_changes():
    tokenizer = make_tokenizer(ROWS, vocab_size=600)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    chats = [as_chat(row["prompt"], row["completion"]) for row in ROWS]
    encoded, _ = encode_rows(chats, tokenizer, max_length=512)
    clean = plant_noise(chats, tokenizer, kind="none", share=0, seed=0)
    assert [row["input_ids"] for row in clean] == encoded["input_ids"]
    assert [row["labels"] for row in clean] == encoded["labels"]
    noisy = plant_noise(chats, tokenizer, kind="random", share=1, seed=0)
    specials = tokenizer.convert_tokens_to_ids(["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"])
    for row, before in zip(noisy, clean, strict=True):
        changed = [a != b for a, b in zip(row["input_ids"], before["input_ids"], strict=True)]
        response = sum(label != -100 for label in row["labels"]) - 1  # without <|end|>
        assert sum(row["noise"]) == round(0.3 * response) and len(row["noise"]) == len(row["input_ids"])
        assert all(n or not c for c, n in zip(changed, row["noise"], strict=True))
        planted = [token for token, n in zip(row["input_ids"], row["noise"], strict=True) if n]
        assert not set(planted) & set(specials)
        assert all(label != -100 for label, n in zip(row["labels"], row["noise"], strict=True) if n)


def test_a_chat_that_ends_otherwise_than_with_its_answer_is_an_error():
    tokenizer = make_tokenizer(ROWS, vocab_size=600)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(ValueError, match="a chat must end with an assistant's answer"):
        plant_noise([as_chat("sort", "it")], tokenizer, kind="none", share=0, seed=0)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="a chat must end with an assistant's answer"):
        chat = [{"role": "assistant", "content": "sort"}, {"role": "user", "content": "it"}]
        plant_noise([{"messages": chat}], tokenizer, kind="none", share=0, seed=0)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, r"messages must be a list of at least one turn; got \[\]"),
        ({"messages": None}, "messages must be a list of at least one turn; got None"),
        (as_chat("sort", None), r"the content of messages\[1\] must be a string; got None"),
        (as_chat(None, "it"), r"the content of messages\[0\] must be a string; got None"),
        ({"messages": [{"content": "it"}]}, r"the role of messages\[0\] must be a string; got None"),
        ({"messages": ["it"]}, r"the role of messages\[0\] must be a string; got None"),
        ({"prompt": "sort", "completion": None}, "the completion must be a string; got None"),
        ({"completion": "it"}, "the prompt must be a string; got None"),
    ],
)
def test_a_row_without_its_texts_is_named(row, reason):
    tokenizer = make_tokenizer(ROWS, vocab_size=600)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match=rf"rows\[1\]: {reason}"):
        plant_noise([as_chat("sort", "it"), row], tokenizer, kind="none", share=0, seed=0)


def test_a_single_row_has_no_other_to_be_swapped_with():
    tokenizer = make_tokenizer(ROWS, vocab_size=600)
    with pytest.raises(ValueError, match=r"rows\[0\]: there is no other row .* at least two rows"):
        plant_noise(ROWS[:1], tokenizer, kind="swapped", share=1, seed=0)
    assert not sum(plant_noise(ROWS[:1], tokenizer, kind="swapped", share=0, seed=0)[0]["noise"])


# Docstrings


def test_docstrings_make_hundreds_of_different_questions_with_answers_in_prose():
    rows = docstring_rows()
    assert len(rows) >= 1500
    questions, answers = zip(*[[message["content"] for message in row["messages"]] for row in rows], strict=True)
    assert all([message["role"] for message in row["messages"]] == ["user", "assistant"] for row in rows)
    assert len(set(questions)) == len(set(answers)) == len(rows)
    for question, answer in zip(questions, answers, strict=True):
        assert re.fullmatch(r"What (does `[\w.]+` do|is the (class|module) `[\w.]+`( for)?)\?", question)
        assert answer.isascii() and 8 <= len(answer.split()) <= 90 and "\n" not in answer and ">>>" not in answer
        assert not answer.endswith(":")
    known = dict(zip(questions, answers, strict=True))
    assert known["What does `textwrap.dedent` do?"].startswith("Remove any common leading whitespace from every line")
    assert known["What is the class `fractions.Fraction`?"].startswith("This class implements rational numbers.")


def test_docstrings_are_shuffled_by_their_seed_alone():
    first, again, other = docstring_rows(1), docstring_rows(1), docstring_rows(2)
    assert first == again != other
    by_question = sorted(first, key=str)
    assert by_question == sorted(other, key=str) != first
