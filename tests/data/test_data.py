from __future__ import annotations

import json

import datasets
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, PreTrainedTokenizerFast

from tokensel.data import EncodingCounts, RowError, SelectionCollator, encode_rows, load_rows, place_of_row

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<bot>", "<go>", *"abcdefgh", "\n"]
ID = {word: i for i, word in enumerate(WORDS)}
CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}<user> {{ m.content }} "
    "{% else %}<bot> {{ m.content }} </s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)


def make_tokenizer(start="<s>", end="", chat_template=CHAT, eos="</s>"):
    """Words between spaces; a newline is a word of its own."""
    core = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", behavior="removed"),
            pre_tokenizers.Split("\n", behavior="isolated"),
        ]
    )
    pieces = f"{start} $A {end}".split()
    core.post_processor = processors.TemplateProcessing(
        single=pieces, special_tokens=[(word, ID[word]) for word in ("<s>", "</s>")]
    )
    core.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token=eos,
        unk_token="<unk>",
        pad_token="<pad>",
        chat_template=chat_template,
    )


def ids(text):
    return [ID[word] for word in text.split(" ")]


def labels(text):
    """`.` stands for -100."""
    return [-100 if word == "." else ID[word] for word in text.split(" ")]


def encode(row, max_length=64, tokenizer=None):
    encoded, _ = encode_rows([row], tokenizer or make_tokenizer(), max_length)
    return encoded[0]


def write(path, *lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


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
    counts = {"truncated": 1, "without_response": 3, "tokens": 14, "response_tokens": 8}
    assert report == EncodingCounts(rows=6, **counts, longest=5, largest_id=largest)
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
    assert reports[0] == reports[1] == EncodingCounts(3, 3, 0, 12, 6, longest=4, largest_id=ID["c"])


def test_rows_without_a_response_in_a_whole_first_batch():
    rows = [{"prompt": "a", "completion": ""}] * 1000 + [{"prompt": "a", "completion": "b"}]
    encoded, report = encode_rows(rows, make_tokenizer(), 8)
    assert len(encoded) == 1 and report.without_response == 1000


def test_no_row_with_a_response_is_an_error():
    with pytest.raises(ValueError, match="none of the 2 rows has a response token within max_length=4"):
        rows = [{"prompt": "a b c", "completion": "d"}, {"prompt": "a", "completion": ""}]
        encode_rows(rows, make_tokenizer(), 4)


# Bad rows


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": None, "completion": "b"}, "row 1: prompt must be a string; got None"),
        ({"prompt": "a", "completion": None}, "row 1: completion must be a string; got None"),
    ],
)
def test_a_missing_text_names_row_and_field(row, message):
    with pytest.raises(ValueError, match=message):
        encode_rows([{"prompt": "a", "completion": "b"}, row], make_tokenizer(), 8)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": 3, "completion": "b"}, "row 0: prompt must be a string; got int"),
        ({"question": "a", "answer": ["b"]}, "row 0: answer must be a string; got list"),
        ({"messages": "a"}, "row 0: messages must be a list of {role, content}; got str"),
        ({"messages": []}, "row 0: messages must be a list"),
        ({"messages": ["a"]}, r"row 0: messages\[0\].role must be a string; got str"),
        ({"messages": [{"role": "user"}]}, r"row 0: messages\[0\].content must be a string; got None"),
        ({"messages": [{"role": "user", "content": 1}]}, r"row 0: messages\[0\].content must be .*; got int"),
        ({"input_ids": "ab", "labels": [1]}, "row 0: input_ids must be a list of integers; got str"),
        ({"input_ids": [1], "labels": [0.5]}, "row 0: labels must be a list of integers"),
        ({"input_ids": [1, 2], "labels": [1]}, r"row 0: labels must be as long as input_ids \(2\).*got 1"),
        (
            {"input_ids": [1, 16], "labels": [-100, 1]},
            "row 0: input_ids holds 16, but the tokenizer has tokens 0 to 15",
        ),
        ({"input_ids": [1, -100], "labels": [-100, 1]}, "row 0: input_ids holds -100, but the tokenizer has tokens 0"),
        ({"input_ids": [1, 2], "labels": [-100, 16]}, "row 0: labels holds 16, but the tokenizer has tokens 0 to"),
        ({"input_ids": [1, 2], "labels": [-100, -1]}, "row 0: labels holds -1, but the tokenizer has tokens 0 to"),
    ],
)
def test_a_field_of_another_type_names_row_and_field(row, message):
    with pytest.raises(ValueError, match=message):
        encode(row)


def test_unknown_columns_are_named_with_the_accepted_ones():
    with pytest.raises(ValueError, match=r"row 0: its columns are \['input', 'text'\]; accepted are") as error:
        encode({"text": "a", "input": "b"})
    for fields in ("messages", "prompt and completion", "question and answer", "input_ids and labels"):
        assert fields in str(error.value)


def test_types_that_differ_between_rows_name_the_row():
    with pytest.raises(ValueError, match="row 1: field 'prompt' is int here and str before"):
        rows = [{"prompt": "a", "completion": "b"}, {"prompt": 2, "completion": "b"}]
        encode_rows(rows, make_tokenizer(), 8)


def test_no_rows_rows_that_are_not_dicts_and_a_tiny_limit():
    with pytest.raises(ValueError, match="rows is empty"):
        encode_rows([], make_tokenizer(), 8)
    with pytest.raises(TypeError, match="row 0 is str"):
        encode_rows(["a"], make_tokenizer(), 8)
    with pytest.raises(ValueError, match="max_length must be at least 2.*got 1"):
        encode_rows([{"prompt": "a", "completion": "b"}], make_tokenizer(), 1)


def test_a_tokenizer_without_eos_is_refused():
    with pytest.raises(ValueError, match="no EOS token"):
        encode({"prompt": "a", "completion": "b"}, tokenizer=make_tokenizer(eos=None))


CHAT_ROW = {
    "messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
}


def test_chat_without_a_template_is_refused():
    with pytest.raises(ValueError, match="no chat_template"):
        encode(CHAT_ROW, tokenizer=make_tokenizer(chat_template=None))


def test_a_template_that_rewrites_earlier_turns_is_refused():
    rewriting = CHAT.replace("{{ m.content }} </s>", "{% if loop.last %}{{ m.content }}{% endif %} </s>")
    with pytest.raises(ValueError, match=r"row 0: the chat template renders messages\[:2\] differently"):
        encode(CHAT_ROW, tokenizer=make_tokenizer(chat_template=rewriting))


def test_a_template_whose_generation_prompt_is_not_a_prefix_is_refused():
    other = CHAT.replace("%}<bot> {% endif %}", "%}<go> {% endif %}")
    with pytest.raises(ValueError, match="cannot be told apart"):
        encode(CHAT_ROW, tokenizer=make_tokenizer(chat_template=other))


def test_what_a_template_refuses_names_the_row():
    refusing = CHAT + "{{ raise_exception('no system role') }}"
    with pytest.raises(ValueError, match="row 0: the chat template refuses.*no system role"):
        encode(CHAT_ROW, tokenizer=make_tokenizer(chat_template=refusing))


# Reading


def test_jsonl_skips_blank_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\n   \n{"prompt": "\xc3\xa9", "extra": 1}')
    assert load_rows(path)[:] == {"prompt": ["a", "é"], "extra": [None, 1]}
    assert load_rows(str(path)).num_rows == 2


def test_a_file_with_any_suffix_is_read_as_jsonl(tmp_path):
    assert load_rows(write(tmp_path / "rows", '{"a": 1}'))[0] == {"a": 1}


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"prompt": "a"', "delimiter"),
        ("plain text", "Expecting value"),
        ("[1, 2]", "expected one JSON object a line, found list"),
        ("null", "expected one JSON object a line, found NoneType"),
        ("{}", "expected one JSON object a line, found an empty object"),
        ('{"prompt": 3}', "field 'prompt' is int here and str before"),
        ('{"prompt": "a", "id": 123456789012345678901234567890}', "field 'id' cannot be stored: Python int too large"),
        ('{"prompt": "\\ud800"}', "field 'prompt' cannot be stored: 'utf-8' codec can't encode"),
        ('{"prompt": ' + 50_000 * "[", "recursion"),
    ],
    ids=["open", "words", "list", "null", "no fields", "another type", "huge integer", "half a character", "deep"],
)
def test_a_bad_line_names_file_line_and_reason(tmp_path, line, reason):
    path = write(tmp_path / "x.jsonl", '{"prompt": "a"}', "", line)
    with pytest.raises(ValueError) as error:
        load_rows(path)
    assert str(error.value).startswith(f"{path}:3: ") and reason in str(error.value)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_place_of_a_row_in_a_file_is_its_line(tmp_path, end):
    path = tmp_path / "x.jsonl"
    lines = ["", '{"prompt": "a", "completion": "b"}', "  ", '{"prompt": null, "completion": "b"}']
    path.write_bytes(end.join(lines).encode())
    with pytest.raises(RowError, match="row 1: prompt must be a string; got None") as error:
        encode_rows(load_rows(path), make_tokenizer(), 8)
    assert (error.value.row, error.value.reason) == (1, "prompt must be a string; got None")
    assert [place_of_row(str(path), row) for row in (0, 1)] == [f"{path}:2", f"{path}:4"]
    assert place_of_row("owner/name", 7) == "owner/name, row 7"


def test_a_line_that_is_not_utf8_names_file_and_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(ValueError) as error:
        load_rows(path)
    assert str(error.value).startswith(f"{path}:2: ") and "utf-8" in str(error.value)


def test_types_that_differ_below_the_field_still_name_the_file(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"labels": [1]}', '{"labels": ["a"]}')
    with pytest.raises(ValueError) as error:
        load_rows(path)
    assert str(error.value).startswith(f"{path}:1 and later rows: a field has more than one type")


@pytest.mark.parametrize("text", ["", "\n  \n"])
def test_an_empty_file_is_an_error(tmp_path, text):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        load_rows(path)
    assert str(error.value).startswith(f"{path} has no rows")


@pytest.mark.parametrize("name", ["none.jsonl", "none.json", "./none", "/none/none", "a/b/c", "~/none", "data/x.csv"])
def test_a_path_that_does_not_exist_is_not_taken_for_a_dataset_name(name, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("must not be asked"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_rows(name)


@pytest.mark.parametrize("name", ["gsm8k", "owner/name-v1.5"])
def test_a_dataset_name_goes_to_load_dataset_with_its_split(name, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or "rows")
    assert load_rows(name, split="test") == "rows"
    assert asked == [((name,), {"split": "test"})]


def test_a_directory_of_data_files_is_loaded_for_real(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows").mkdir()
    write(tmp_path / "rows" / "train.jsonl", '{"prompt": "a", "completion": "b"}')
    assert load_rows(str(tmp_path / "rows"))[0] == {"prompt": "a", "completion": "b"}


# Weights


def chat(*messages):
    return {"messages": [{"role": r, "content": c} | ({} if w is None else {"weight": w}) for r, c, w in messages]}


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
