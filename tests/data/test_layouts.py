"""Which text, chat or tokens a row is, by its columns; what is wrong with one that is none."""

from __future__ import annotations

import json

import datasets
import pytest
from data_tried import LAYOUTS, Row
from encoding import encode, ids, labels, make_tokenizer, write

from tokensel.data import RowError, encode_rows, load_rows
from tokensel.data.layouts import COLUMNS, Reading, read_row
from tokensel.data.layouts import LAYOUTS as KNOWN
from tokensel.testing import make_model, make_rows
from tokensel.testing import make_tokenizer as subwords

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c d"}
USER, ANSWER, WORSE = (
    {"role": role, "content": c} for role, c in (("user", "a"), ("assistant", "b"), ("assistant", "c"))
)


def read(row, index=0, **settings):
    """The parts of a row."""
    reading = Reading(**{"has_template": True, "role_names": {}, "rejected_weight": 0.0} | settings)
    return read_row(row, index, reading)[1]


def name_of(tried: Row) -> str:
    kinds = {type(value).__name__ for value in tried.row.values()}
    return f"{tried.layout}, {' '.join(tried.row)} {'of ' + 'and'.join(sorted(kinds))}"


@pytest.mark.parametrize("tried", LAYOUTS, ids=name_of)
def test_a_row_of_a_layout_makes_these_tokens(tried, tmp_path):
    found, counts = encode_rows([tried.row], make_tokenizer(), 64)
    assert found[0] == {"input_ids": ids(tried.tokens), "labels": labels(tried.labels)}
    assert counts.layouts == {tried.layout: 1}
    from_file = load_rows(write(tmp_path / "x.jsonl", json.dumps(tried.row)), columns=COLUMNS)
    assert encode_rows(from_file, make_tokenizer(), 64)[0][0] == found[0]


def test_every_layout_is_tried():
    assert {tried.layout for tried in LAYOUTS} == set(KNOWN)


def test_each_row_has_its_own_layout_and_they_are_counted(tmp_path):
    path = write(tmp_path / "x.jsonl", *(json.dumps(tried.row | {"id": i}) for i, tried in enumerate(LAYOUTS)))
    encoded, counts = encode_rows(load_rows(path), make_tokenizer(), 64)
    assert encoded["input_ids"][:] == [ids(tried.tokens) for tried in LAYOUTS]
    assert encoded["labels"][:] == [labels(tried.labels) for tried in LAYOUTS]
    assert counts.rows == counts.documents == len(LAYOUTS) == sum(counts.layouts.values())
    assert "layouts: 2 prompt and completion, 1 question and answer, 1 chat, 1 ShareGPT, 2 Alpaca, 1 text, 6 pair" in (
        str(counts)
    )


# Alpaca without a template


def test_alpaca_without_a_template_is_alpacas_own_text():
    asked = []

    class Tokenizer:
        chat_template, bos_token_id, eos_token_id = None, None, 0

        def __call__(self, text, return_special_tokens_mask=False, **_):
            asked.append(text)
            return {"input_ids": [ord(c) for c in text], "special_tokens_mask": [0] * len(text)}

    for given in ("three", "", None):
        encode_rows([{"instruction": "Name {them}.", "input": given, "output": "c"}], Tokenizer(), 1000)
    task = "Below is an instruction that describes a task"
    ask = ". Write a response that appropriately completes the request.\n\n### Instruction:\nName {them}."
    paired = ", paired with an input that provides further context"
    alone = f"{task}{ask}\n\n### Response:\n"
    assert asked[::2] == [f"{task}{paired}{ask}\n\n### Input:\nthree\n\n### Response:\n", alone, alone]
    assert asked[1::2] == ["c"] * 3


def test_a_chat_template_that_is_given_is_alpacas_too():
    row = {"instruction": "a", "output": "b"}
    bare = make_tokenizer(chat_template=None)
    found, _ = encode_rows([row], bare, 64, chat_template=make_tokenizer().chat_template)
    assert found[0]["input_ids"] == ids("<user> a <bot> b </s>")


# Messages


def test_answers_in_the_prompt_are_no_responses():
    prompt = [USER, ANSWER, {"role": "user", "content": "c"}]
    row = encode({"prompt": prompt, "completion": [{"role": "assistant", "content": "d"}]})
    assert row["input_ids"] == ids("<user> a <bot> b </s> <user> c <bot> d </s>")
    assert row["labels"] == labels(". . . . . . . . d </s>")


def test_roles_of_sharegpt_are_the_templates():
    turns = ["system", "human", "user", "gpt", "assistant", "function", "observation", "tool"]
    row = {"conversations": [{"from": role, "value": "a", "id": 1} for role in turns]}
    expected = ["system", "user", "user", "assistant", "assistant", "tool", "tool", "tool"]
    (chat,) = read(row)
    assert chat.messages == [{"role": role, "content": "a", "id": 1} for role in expected] and not chat.prompt_messages


def test_names_of_roles_win_over_those_that_are_known():
    turns = [{"from": "human", "value": "a"}, {"from": "Human", "value": "b"}, {"from": "tool", "value": "c"}]
    (chat,) = read({"conversations": turns}, role_names={"Human": "user", "tool": "ipython"})
    assert [message["role"] for message in chat.messages] == ["user", "user", "ipython"]


def test_weights_of_sharegpt_stand_on_their_answers():
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": -2}]
    assert encode({"conversations": turns})["token_weights"] == [0, 0, 0, -2, -2]


@pytest.mark.parametrize("key, value, column", [("role", "content", "messages"), ("from", "value", "conversations")])
def test_an_unknown_role_is_named_with_its_row_and_mapped_by_a_setting(key, value, column):
    row = {column: [{key: "user", value: "a"}, {key: "bot", value: "b"}]}
    with pytest.raises(
        RowError, match=rf"row 0: {column}\[1\].{key} is 'bot'; known roles are .*role_names.*bot=assist"
    ):
        encode(row)
    found, _ = encode_rows([row], make_tokenizer(), 64, role_names={"bot": "assistant"})
    assert found[0]["labels"] == labels(". . . b </s>")


# Pairs


def test_rejected_answers_are_rows_of_their_own_with_a_weight():
    found, counts = encode_rows([PAIR, PAIR | {"weight": 2}], make_tokenizer(), 64, rejected_weight=-1)
    chosen, rejected = ids("<s> a b </s>"), ids("<s> a c d </s>")
    assert found["input_ids"][:] == [chosen, rejected, chosen, rejected]
    assert found["token_weights"][:] == [[0, 0, 1, 1], [0, 0, -1, -1, -1], [0, 0, 2, 2], [0, 0, -2, -2, -2]]
    assert str(counts).startswith("2 rows, 4 documents: 4 kept") and counts.layouts == {"pair": 2}
    assert set(encode(PAIR)) == {"input_ids", "labels"}


def test_a_pair_beside_messages_is_one_when_rejected_answers_are_asked_for():
    row = {"prompt": "a", "messages": [USER, ANSWER], "chosen": [USER, ANSWER], "rejected": [USER, WORSE]}
    (chat,), _ = encode_rows([row], make_tokenizer(), 64)
    (chosen, rejected), counts = encode_rows([row], make_tokenizer(), 64, rejected_weight=-1)
    assert chat["input_ids"] == chosen["input_ids"] == ids("<user> a <bot> b </s>")
    assert rejected["input_ids"] == ids("<user> a <bot> c </s>") and rejected["token_weights"] == [0, 0, 0, -1, -1]
    assert counts.layouts == {"pair": 1}


@pytest.mark.parametrize(
    "pair",
    [
        {"chosen": "a b c", "rejected": "a b d e"},
        {"chosen": "a bc", "rejected": "a bd"},
        {"chosen": [USER, ANSWER, USER, ANSWER], "rejected": [USER, ANSWER, USER, WORSE]},
    ],
)
def test_what_both_answers_begin_with_is_the_prompt_as_in_trl(pair):
    from trl.data_utils import extract_prompt

    assert read(pair, rejected_weight=-1) == read(extract_prompt(pair), rejected_weight=-1)


BARE = make_tokenizer(chat_template=None)
OPEN = {"chosen": "a b", "rejected": "a c"}  # what both begin with is no prompt where one is asked


@pytest.mark.parametrize(
    "asked, chat, text",
    [
        ({"question": "d"}, "<user> d <bot>", "<s> d \n"),
        ({"question": "d", "input": "e"}, "<user> d \n e <bot>", "<s> d \n e \n"),
        ({"input": "d", "instruction": "", "question": ""}, "<user> d <bot>", "<s> d \n"),
        ({"prompt": "", "question": "d"}, "<user> d <bot>", "<s> d \n"),
        ({"prompt": "d", "question": "e"}, "<s> d", "<s> d"),
    ],
)
def test_the_question_of_a_pair_is_its_prompt(asked, chat, text):
    for tokenizer, prompt in ((make_tokenizer(), chat), (BARE, text)):
        chosen, rejected = encode_rows([asked | OPEN], tokenizer, 64, rejected_weight=-1)[0]
        assert chosen["input_ids"] == ids(f"{prompt} a b </s>") and rejected["input_ids"] == ids(f"{prompt} a c </s>")
        assert chosen["labels"] == [-100] * len(prompt.split(" ")) + ids("a b </s>")


def test_the_instruction_of_a_pair_is_read_as_alpaca():
    row = {"instruction": "d", "input": "e"}
    for has_template in (True, False):
        (alpaca,) = read(row | {"output": "a b"}, has_template=has_template)
        assert read(row | OPEN, has_template=has_template) == [alpaca]


def test_the_question_of_a_pair_of_answers_as_messages_is_theirs():
    (chat,) = read({"question": "a", "chosen": [ANSWER], "rejected": [WORSE]})
    assert (chat.messages, chat.prompt_messages) == ([USER, ANSWER], 1)
    (told,) = read({"question": "x", "chosen": [USER, ANSWER], "rejected": [USER, WORSE]})
    assert told.messages == [USER, ANSWER]


def test_cells_of_pairs_stand_beside_empty_ones_of_others():
    rows = [{"question": "a", "answer": "", **OPEN}, {"question": "a", "answer": "b", "chosen": "", "rejected": ""}]
    assert encode_rows(rows, make_tokenizer(), 64)[1].layouts == {"pair": 1, "question and answer": 1}


# The column `system`


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"instruction": "a", "output": "b"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"question": "a", "chosen": "b", "rejected": "c"},
        {"chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
    ],
    ids=lambda row: " ".join(row),
)
def test_a_system_column_is_the_first_message_of_a_chat(row):
    system = {"role": "system", "content": "s"}
    plain = read(row, rejected_weight=-1)
    for part, alone in zip(read(row | {"system": "s"}, rejected_weight=-1), plain, strict=True):
        assert part == alone._replace(messages=[system, *alone.messages], prompt_messages=alone.prompt_messages + 1)
    assert read(row | {"system": ""}, rejected_weight=-1) == read(row | {"system": None}, rejected_weight=-1) == plain
    with pytest.raises(RowError, match="row 0: system must be a string; got int"):
        read(row | {"system": 3})


def test_a_system_column_reaches_the_template_or_is_refused(tmp_path):
    row = {"system": "c", "instruction": "a", "output": "b"}
    path = write(tmp_path / "x.jsonl", json.dumps(row))
    shown = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}</s>"
    chats = make_tokenizer(chat_template=shown.replace("{{ m.role }}", "{{ '<go>' if m.role == 'system' else '' }}"))
    found, _ = encode_rows(load_rows(path, columns=COLUMNS), chats, 64)
    assert found[0]["input_ids"] == ids("<go> c a b </s>")
    for unlike in (row, {"system": "c", **PAIR}, {"system": "c", "question": "a", **OPEN}):
        with pytest.raises(RowError, match="row 0: system is a message, .* but the row is text"):
            encode(unlike, tokenizer=BARE)
    assert encode({"system": "c", "text": "a"})["input_ids"] == ids("<s> a </s>")  # it may be anything there


def test_messages_that_begin_with_their_own_system_message_keep_it():
    for role in ("system", "developer"):
        own = [{"role": role, "content": "own"}, USER, ANSWER]
        assert read({"messages": own, "system": "s"}) == read({"messages": own})
    (chat,) = read({"messages": [USER, ANSWER], "system": "s"}, role_names={"system": "developer"})
    assert chat.messages[0] == {"role": "developer", "content": "s"}


def test_answers_that_do_not_differ_have_no_response():
    rows = [{"chosen": "a b", "rejected": "a b"}, PAIR]
    encoded, counts = encode_rows(rows, make_tokenizer(), 64)
    assert len(encoded) == 1 and counts.without_response == 1


# Beginnings


@pytest.mark.parametrize(
    "row, tokens, responses",
    [
        ({"prompt": "<s> a", "completion": "b"}, "<s> a b </s>", ". . b </s>"),
        ({"question": "<s> a", "answer": "b"}, "<s> a \n b </s>", ". . . b </s>"),
        ({"prompt": "", "completion": "<s> a"}, "<s> a </s>", ". a </s>"),
        ({"text": "<s> a b </s>"}, "<s> a b </s>", ". a b </s>"),
        ({"text": "a <s> b"}, "<s> a <s> b </s>", ". a <s> b </s>"),
        ({"prompt": "<s> <s> a", "completion": "b"}, "<s> <s> a b </s>", ". . . b </s>"),
    ],
)
def test_a_text_that_spells_out_bos_does_not_get_two(row, tokens, responses):
    found = encode(row)
    assert found == {"input_ids": ids(tokens), "labels": labels(responses)}


def test_a_bos_of_the_text_alone_stays():
    plain = make_tokenizer(start="")
    assert encode({"prompt": "<s> <s> a", "completion": "b"}, tokenizer=plain)["input_ids"] == ids("<s> <s> a b </s>")


def test_text_alone_is_what_trl_makes_of_it_but_for_a_second_bos(tmp_path):
    from trl import SFTConfig, SFTTrainer

    tokenizer = subwords(make_rows(60, seed=5), vocab_size=320)
    model = make_model(tokenizer, hidden_size=16, layers=1, heads=2, kv_heads=1, seed=0)
    texts = ["Ada buys.", "Ada </s>", "<s>Ada"]
    rows = datasets.Dataset.from_dict({"text": texts})
    arguments = SFTConfig(str(tmp_path), report_to="none", use_cpu=True, max_length=64)
    of_trl = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer).train_dataset["input_ids"][:]
    ours, _ = encode_rows(rows, tokenizer, 64)
    assert ours["input_ids"][:] == [*of_trl[:2], of_trl[2][1:]] and of_trl[2][:2] == [tokenizer.bos_token_id] * 2
    assert ours["labels"][:] == [[-100, *tokens[1:]] for tokens in ours["input_ids"][:]]


def test_the_first_token_of_a_text_without_bos_is_not_predicted():
    row = encode({"text": "a b"}, tokenizer=make_tokenizer(start=""))
    assert row == {"input_ids": ids("a b </s>"), "labels": labels(". b </s>")}


# What is wrong


@pytest.mark.parametrize(
    "row, message",
    [
        ({"instruction": "a"}, r"output is missing \(instruction and output\); its columns are .*'instruction'"),
        ({"instruction": "a", "output": None}, "output must be a string; got None"),
        ({"instruction": "a", "output": ["b"]}, "output must be a string; got list"),
        ({"instruction": "a", "input": 3, "output": "b"}, "input must be a string; got int"),
        ({"conversations": []}, "conversations must be a list of {role, content}; got an empty list"),
        ({"conversations": "a"}, "conversations must be a list of {role, content}; got str"),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\].value must be a string; got None"),
        ({"conversations": [{"from": "human", "value": 3}]}, r"conversations\[0\].value must be a string; got int"),
        ({"conversations": [{"from": 3, "value": "a"}]}, r"conversations\[0\].from must be a string; got int"),
        ({"conversations": [{"value": "a"}]}, r"conversations\[0\].role must be a string; got None"),
        ({"conversations": [None]}, r"conversations\[0\] must be a message, {role, content}; got None"),
        ({"messages": []}, "messages must be a list of {role, content}; got an empty list"),
        ({"prompt": "a"}, r"completion is missing \(prompt and completion\)"),
        ({"prompt": [USER], "completion": []}, "completion must be a list of {role, content}; got an empty list"),
        ({"prompt": [USER], "completion": "b"}, "completion must be a list of {role, content}; got str"),
        ({"prompt": [], "completion": [ANSWER]}, "prompt must be a list of {role, content}; got an empty list"),
        ({"prompt": "a", "completion": [ANSWER]}, "completion must be a string; got list"),
        ({"text": None}, "answer and question and text hold nothing"),
        ({"text": ["a"]}, "text must be a string; got list"),
        ({"chosen": "a"}, r"rejected is missing \(chosen and rejected\)"),
        ({"chosen": "a", "rejected": 3}, "rejected must be a string; got int"),
        ({"chosen": "a", "rejected": [ANSWER]}, "rejected must be a string; got list"),
        ({"chosen": [ANSWER], "rejected": "a"}, "rejected must be a list of {role, content}; got str"),
        ({"chosen": [ANSWER], "rejected": []}, "rejected must be a list of {role, content}; got an empty list"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt must be a string; got int"),
        ({"prompt": "a", "chosen": [ANSWER], "rejected": [WORSE]}, "prompt must be a list of messages.*; got str"),
    ],
)
def test_a_column_that_is_missing_empty_or_of_another_type_is_named_with_its_row(row, message):
    with pytest.raises(RowError, match=f"row 1: {message}"):
        read({"question": None, "answer": None} | row, index=1)  # beside a row of questions and answers


def test_in_a_mixed_file_the_layout_that_comes_nearest_says_what_is_wrong():
    rows = [*(tried.row for tried in LAYOUTS), {"instruction": "a"}]
    with pytest.raises(RowError, match=f"row {len(LAYOUTS)}: output must be a string; got None"):
        encode_rows(rows, make_tokenizer(), 64)


def test_rejected_weight_is_checked():
    with pytest.raises(ValueError, match="rejected_weight must be a finite number; got inf"):
        encode_rows([PAIR], make_tokenizer(), 64, rejected_weight=float("inf"))


def test_padding_of_token_ids_is_no_part_of_the_document():
    row = {"input_ids": [0, 5, 6, 7, 0], "labels": [0, 5, 6, 7, 0], "attention_mask": [0, 1, 1, 1, 0]}
    found = encode(row | {"token_weights": [9, 1, 2, 3, 9]})
    assert (found["input_ids"], found["labels"]) == ([5, 6, 7], [-100, 6, 7]) and found["token_weights"] == [0, 2, 3]
    for mask, problem in (([1], "as long as input_ids \\(5\\); got 1"), ("1", "must be lists; got")):
        with pytest.raises(RowError, match=f"attention_mask .*{problem}"):
            encode(row | {"attention_mask": mask})
