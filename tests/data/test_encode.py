from __future__ import annotations

import json

import datasets
import pytest
from encoding import CHAT, ID, chat, encode, ids, labels, make_tokenizer, write
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening

from tokensel.data import EncodingCounts, RowError, SelectionCollator, encode_rows, load_rows

# Rows -> token ids and labels


def test_prompt_and_completion():
    assert encode({"prompt": "a b", "completion": "c d"}) == {
        "input_ids": ids("<s> a b c d </s>"),
        "labels": labels(". . . c d </s>"),
    }


def test_question_and_answer_have_a_newline_between():
    row = encode({"question": "a b", "answer": "c"})
    assert row["input_ids"] == ids("<s> a b \n c </s>")
    assert row["labels"] == labels(". . . . c </s>")


def test_chat_labels_every_assistant_turn():
    messages = [
        {"role": "user", "content": "a b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "e f"},
    ]
    row = encode({"messages": messages})
    assert row["input_ids"] == ids("<user> a b <bot> c </s> <user> d <bot> e f </s>")
    assert row["labels"] == labels(". . . . c </s> . . . e f </s>")
    tokenizer = make_tokenizer()
    assert row["input_ids"] == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)


def test_chat_that_ends_with_the_user_keeps_earlier_answers():
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert encode({"messages": messages})["labels"] == labels(". . . b </s> . .")


def test_chat_token_that_starts_in_the_prompt_is_no_response():
    # With no space between header and answer, "<bot>c" is one word.
    glued = CHAT.replace("<bot> ", "<bot>")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c d"}]
    row = encode({"messages": messages}, tokenizer=make_tokenizer(chat_template=glued))
    assert row["input_ids"] == ids("<user> a <unk> d </s>")
    assert row["labels"] == labels(". . . d </s>")


def test_token_ids_pass_through():
    row = encode({"input_ids": [5, 6, 7], "labels": [-100, 6, -100]})
    assert row == {"input_ids": [5, 6, 7], "labels": [-100, 6, -100]}


def test_the_first_token_is_never_labelled():
    assert encode({"input_ids": [5, 6, 7], "labels": [5, 6, 7]})["labels"] == [-100, 6, 7]
    row = encode({"prompt": "", "completion": "a b"}, tokenizer=make_tokenizer(start=""))
    assert row["input_ids"] == ids("a b </s>") and row["labels"] == labels(". b </s>")


def test_an_eos_that_the_tokenizer_appends_is_taken_off_the_prompt():
    tokenizer = make_tokenizer(end="</s>")
    assert encode({"prompt": "a", "completion": "b"}, tokenizer=tokenizer)["input_ids"] == ids("<s> a b </s>")
    written = encode({"prompt": "a </s>", "completion": "b"}, tokenizer=tokenizer)
    assert written["input_ids"] == ids("<s> a </s> b </s>")
    written = encode({"prompt": "a </s>", "completion": "b"})
    assert written["input_ids"] == ids("<s> a </s> b </s>")


def test_an_empty_prompt_keeps_a_bos_that_equals_eos():
    tokenizer = make_tokenizer(eos="<s>")
    row = encode({"prompt": "", "completion": "a"}, tokenizer=tokenizer)
    assert row["input_ids"] == ids("<s> a <s>") and row["labels"] == labels(". a <s>")


def test_a_completion_that_ends_with_eos_gets_no_second():
    assert encode({"prompt": "a", "completion": "b </s>"})["input_ids"] == ids("<s> a b </s>")


def test_formats_may_differ_between_lines(tmp_path):
    rows = load_rows(
        write(
            tmp_path / "x.jsonl",
            json.dumps({"prompt": "a", "completion": "b"}),
            json.dumps({"question": "c", "answer": "d"}),
        )
    )
    encoded, _ = encode_rows(rows, make_tokenizer(), 64)
    assert encoded["labels"][:] == [labels(". . b </s>"), labels(". . . d </s>")]


def test_text_columns_are_left_out_unless_asked_for():
    row = {"prompt": "a", "completion": "b", "noise": [0, 1, 0], "id": "x"}
    encoded, _ = encode_rows([row], make_tokenizer(), 64)
    assert sorted(encoded.column_names) == ["input_ids", "labels"]
    encoded, _ = encode_rows(datasets.Dataset.from_list([row]), make_tokenizer(), 64, keep_columns=("noise",))
    assert sorted(encoded.column_names) == ["input_ids", "labels", "noise"]
    assert encoded[0]["noise"] == [0, 1, 0]
    with pytest.raises(ValueError, match=r"keep_columns names \['colour'\].*completion"):
        encode_rows([row], make_tokenizer(), 64, keep_columns=("colour",))


def test_kept_columns_stay_with_their_rows_when_rows_are_dropped():
    rows = [{"prompt": "a", "completion": "b" if i % 2 else "", "id": i} for i in range(6)]
    encoded, _ = encode_rows(rows, make_tokenizer(), 64, keep_columns=("id",))
    assert encoded["id"][:] == [1, 3, 5]


def test_token_ids_become_int64_and_kept_columns_keep_their_type():
    small = datasets.Sequence(datasets.Value("int8"))
    row = {"input_ids": [[4, 5]], "labels": [[-100, 5]], "noise": [[0, 1]]}
    rows = datasets.Dataset.from_dict(row, features=datasets.Features(dict.fromkeys(row, small)))
    encoded, _ = encode_rows(rows, make_tokenizer(), 64, keep_columns=("noise",))
    assert encoded.features["noise"] == rows.features["noise"]
    for column in ("input_ids", "labels"):
        assert encoded.features[column].feature == datasets.Value("int64")


def test_transformers_collators_take_the_result():
    rows = [{"prompt": "a", "completion": "b c"}, {"prompt": "a b c", "completion": "d"}]
    tokenizer = make_tokenizer()
    encoded, _ = encode_rows(rows, tokenizer, 64)
    batch = DataCollatorForSeq2Seq(tokenizer)(list(encoded))
    assert batch["labels"].tolist() == [labels(". . b c </s> ."), labels(". . . . d </s>")]
    flat = DataCollatorWithFlattening()(list(encoded))
    assert flat["input_ids"].tolist() == [ids("<s> a b c </s> <s> a b c d </s>")]


# Counts


def test_truncated_and_dropped_rows_are_counted():
    rows = [
        {"prompt": "a", "completion": "b"},  # 4 tokens
        {"prompt": "a", "completion": "b c d e"},  # 7 tokens: cut to 5
        {"prompt": "a b c d", "completion": "e"},  # the prompt fills the limit
        {"prompt": "a b c d e f g", "completion": "h"},  # and more than fills it
        {"prompt": "a", "completion": ""},
        {"prompt": "a", "completion": "b c"},  # exactly 5 tokens
    ]
    encoded, report = encode_rows(rows, make_tokenizer(), 5)
    assert encoded["input_ids"][:] == [ids("<s> a b </s>"), ids("<s> a b c d"), ids("<s> a b c </s>")]
    assert encoded["labels"][:] == [labels(". . b </s>"), labels(". . b c d"), labels(". . b c </s>")]
    largest = max(ID[word] for word in "a b c d".split())
    counts = {"documents": 3, "truncated": 1, "without_response": 3, "tokens": 14, "response_tokens": 8}
    layouts = {"prompt and completion": 6}
    assert report == EncodingCounts(rows=6, **counts, longest=5, largest_id=largest, layouts=layouts)
    line = str(report)
    assert line.startswith("6 rows: 3 kept (1 of them cut") and "3 dropped without a response token" in line
    assert "14 tokens" in line and "8 of them response tokens" in line and "\n" not in line


def test_the_longest_row_and_the_largest_id_are_of_all_rows():
    rows = [
        {"prompt": "a", "completion": "b c d"},
        {"prompt": "h", "completion": "a"},
        {"prompt": "a", "completion": "b"},
    ]
    report = encode_rows(rows, make_tokenizer(), 8)[1]
    assert (report.longest, report.largest_id) == (6, ID["h"])
    assert encode_rows(rows, make_tokenizer(), 5)[1].longest == 5


def test_counts_are_the_same_when_run_twice(tmp_path):
    lines = [json.dumps({"prompt": "a", "completion": "b c d"})] * 3
    datasets.Dataset.from_json(str(write(tmp_path / "x.jsonl", *lines)), cache_dir=str(tmp_path / "cache"))
    reports = []
    for _ in range(2):
        rows = datasets.Dataset.from_json(str(tmp_path / "x.jsonl"), cache_dir=str(tmp_path / "cache"))
        reports.append(encode_rows(rows, make_tokenizer(), 4)[1])
    layouts = {"prompt and completion": 3}
    assert reports[0] == reports[1] == EncodingCounts(3, 3, 3, 0, 12, 6, 4, largest_id=ID["c"], layouts=layouts)


def test_rows_without_a_response_in_a_whole_first_batch():
    rows = [{"prompt": "a", "completion": ""}] * 1000 + [{"prompt": "a", "completion": "b"}]
    encoded, report = encode_rows(rows, make_tokenizer(), 8)
    assert len(encoded) == 1 and report.without_response == 1000


def test_no_row_with_a_response_is_an_error():
    with pytest.raises(ValueError, match="none of the 2 rows has a response token within max_length=4"):
        rows = [{"prompt": "a b c", "completion": "d"}, {"prompt": "a", "completion": ""}]
        encode_rows(rows, make_tokenizer(), 4)


# Weights


def test_a_messages_weight_stands_on_its_answer():
    row = encode(
        chat(
            ("user", "a", None),
            ("assistant", "b c", -0.5),
            ("user", "d", 0),
            ("assistant", "e", None),
            ("user", "f", None),
            ("assistant", "g", 2),
        )
    )
    assert row["input_ids"] == ids("<user> a <bot> b c </s> <user> d <bot> e </s> <user> f <bot> g </s>")
    assert row["token_weights"] == [0, 0, 0, -0.5, -0.5, -0.5, 0, 0, 0, 1, 1, 0, 0, 0, 2, 2]


def test_a_weight_on_a_row_is_a_factor_of_its_response():
    text = {"prompt": "a b", "completion": "c"}
    weights = [0, 0, 0, 3, 3]  # <s> a b c </s>
    rows = [text | {"weight": 3}, text | {"weight": None}, {"question": "a", "answer": "c", "weight": -1.5}]
    found = [row["token_weights"] for row in encode_rows(rows, make_tokenizer(), 64)[0]]
    assert found == [weights, [0, 0, 0, 1, 1], [0, 0, 0, -1.5, -1.5]]
    messages = chat(("user", "a", None), ("assistant", "b", -2), ("assistant", "c", None))
    assert encode(messages | {"weight": 3})["token_weights"] == [0, 0, 0, -6, -6, 0, 3, 3]
    ids_and_labels = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "token_weights": [9, 0.5, 2, -1]}
    assert encode(ids_and_labels | {"weight": 3})["token_weights"] == [0, 0.5, 6, -3]


def test_a_weight_for_each_token_is_cut_with_its_row():
    row = {"input_ids": [5, 6, 7, 8], "labels": [5, -100, 7, 8], "token_weights": [9, 0.5, 2, -1]}
    assert encode(row)["token_weights"] == [0, 0.5, 2, -1]  # nothing predicts the first token
    assert encode(row, max_length=3)["token_weights"] == [0, 0.5, 2]


def test_prompt_and_response_weights():
    row = {"prompt": "a b", "completion": "c"}

    def weights(row, **given):
        return encode_rows([row], make_tokenizer(), 64, **given)[0][0]["token_weights"]

    assert weights(row, prompt_weight=0.25) == [0, 0.25, 0.25, 1, 1]
    assert weights(row, response_weight=0.5) == [0, 0, 0, 0.5, 0.5]
    assert weights(row | {"weight": -2}, prompt_weight=0.25, response_weight=0.5) == [0, 0.25, 0.25, -1, -1]
    given = {"input_ids": [5, 6, 7], "labels": [-100, -100, 7], "token_weights": [0, 3, 4]}
    assert weights(given, prompt_weight=0.25, response_weight=0.5) == [0, 3, 2]


def test_without_weights_there_is_no_column():
    assert set(encode({"prompt": "a", "completion": "b"})) == {"input_ids", "labels"}
    assert set(encode(chat(("user", "a", None), ("assistant", "b", None)))) == {"input_ids", "labels"}


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "a", "completion": "b", "weight": "c"}, "weight must be a finite number, .* got 'c'"),
        ({"prompt": "a", "completion": "b", "weight": float("inf")}, "weight must be a finite number, .* got inf"),
        ({"prompt": "a", "completion": "b", "weight": 1e39}, r"weight must be a finite number, .* got 1e\+39"),
        ({"prompt": "a", "completion": "b", "weight": True}, "weight must be a finite number, .* got True"),
        ({"prompt": "a", "completion": "b", "token_weights": [1.0]}, "token_weights goes with input_ids and labels"),
        (chat(("user", "a", None), ("assistant", "b", float("nan"))), r"messages\[1\].weight must be .* got nan"),
        (chat(("user", "a", 0.5), ("assistant", "b", 1)), r"messages\[0\].weight is 0.5, but .* the user's"),
        ({"input_ids": [5, 6], "labels": [5, 6], "token_weights": [1.0]}, r"token_weights must .* \(2\); got 1"),
        ({"input_ids": [5, 6], "labels": [5, 6], "token_weights": 1.0}, "token_weights must be a list .* got float"),
        ({"input_ids": [5, 6], "labels": [5, 6], "token_weights": [1.0, None]}, r"token_weights\[1\] .* got None"),
        ({"input_ids": [5, 6], "labels": [5, 6], "token_weights": [1.0, float("inf")]}, r"token_weights\[1\] .* inf"),
    ],
)
def test_a_weight_that_is_none_names_its_row(row, message):
    with pytest.raises(RowError, match=f"row 0: {message}"):
        encode(row)


def test_settings_of_weights_are_checked():
    for name in ("prompt_weight", "response_weight"):
        with pytest.raises(ValueError, match=f"{name} must be a finite number; got nan"):
            encode_rows([{"prompt": "a", "completion": "b"}], make_tokenizer(), 64, **{name: float("nan")})


@pytest.mark.parametrize("side", ["left", "right"])
def test_weights_are_padded_and_concatenated_with_their_tokens(side):
    tokenizer = make_tokenizer()
    tokenizer.padding_side = side
    rows = [{"prompt": "a", "completion": "b", "weight": 2}, {"prompt": "a b c", "completion": "d", "weight": -1}]
    encoded = list(encode_rows(rows, tokenizer, 64)[0])
    batch = SelectionCollator(DataCollatorForSeq2Seq(tokenizer, return_tensors="pt"))(encoded)
    short = [0, 0, 2, 2]
    assert batch["token_weights"].tolist() == [
        [0, 0, *short] if side == "left" else [*short, 0, 0],
        [0, 0, 0, 0, -1, -1],
    ]
    assert (batch["token_weights"] != 0).eq(batch["labels"] != -100).all()
    packed = SelectionCollator(DataCollatorWithFlattening(return_tensors="pt"))(encoded)
    assert packed["token_weights"].tolist() == [[*short, 0, 0, 0, 0, -1, -1]]
    assert (packed["token_weights"] != 0).eq(packed["labels"] != -100).all()
    plain = [{name: row[name] for name in ("input_ids", "labels")} for row in encoded]
    assert "token_weights" not in SelectionCollator(DataCollatorForSeq2Seq(tokenizer, return_tensors="pt"))(plain)
