from __future__ import annotations

import datasets
import pytest
from encoding import CHAT, encode, make_tokenizer, write

from tokensel.data import RowError, encode_rows, load_rows, place_of_row

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
        ({"messages": ["a"]}, r"row 0: messages\[0\] must be a message, {role, content}; got str"),
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
    with pytest.raises(ValueError, match=r"row 0: its columns are \['input', 'txt'\]; accepted are") as error:
        encode({"txt": "a", "input": "b"})
    for fields in ("messages", "prompt and completion", "question and answer", "input_ids and labels"):
        assert fields in str(error.value)


def test_a_type_that_differs_from_earlier_rows_names_row_and_field():
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": 2, "completion": "b"}]
    with pytest.raises(RowError, match="row 1: prompt must be a string; got int"):
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
        ('{"prompt": ' + 50_000 * "[", "recursion"),
    ],
    ids=["open", "words", "list", "null", "no fields", "deep"],
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


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"prompt": 3, "completion": "b"}', "prompt must be a string; got int"),
        ('{"prompt": "\\ud800", "completion": "b"}', "prompt is no text: 'utf-8' codec can't encode"),
        ('{"input_ids": [1, 2], "labels": ["a", "b"]}', "labels must be a list of integers; got list"),
        ('{"prompt": "a", "completion": "b", "weight": "2"}', "weight must be a finite number"),
    ],
    ids=["another type", "half a character", "another type below", "text for a number"],
)
def test_a_row_that_is_of_another_type_than_those_before_names_file_and_line(tmp_path, line, reason):
    path = write(tmp_path / "x.jsonl", '{"prompt": "a", "completion": "b", "labels": [1], "weight": 1}', "", line)
    with pytest.raises(RowError, match="row 1") as error:
        encode_rows(load_rows(path), make_tokenizer(), 8)
    assert reason in error.value.reason and place_of_row(path, error.value.row) == f"{path}:3"


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
