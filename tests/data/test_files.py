"""Every kind of file, alone, in lists and in directories, whole and as a stream; what cannot be read says where."""

from __future__ import annotations

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_tried import FILES, MANY, ROWS, write_directory, write_list, write_saved
from encoding import ids, make_tokenizer, write

from tokensel.data import RowError, encode, encode_rows, load_rows, place_of_row
from tokensel.data.chat import Encoded
from tokensel.data.layouts import COLUMNS
from tokensel.data.readers import READERS, kind_of


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Streams make a folder of their own in the cache of `datasets`; the user's may not be writable."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_of_a_kind_has_these_rows_and_places(file, tmp_path):
    path = file.write(tmp_path)
    assert load_rows(path)[:] == {name: [row[name] for row in ROWS] for name in ROWS[0]}
    assert list(load_rows(path, streaming=True)) == ROWS
    assert place_of_row(path, 1) == str(tmp_path / file.place)


def test_every_kind_of_file_is_tried(tmp_path):
    assert {kind_of(file.write(tmp_path)) for file in FILES} == set(READERS)


@pytest.mark.parametrize("many", MANY, ids=lambda many: many.name)
def test_many_files_are_one_dataset(many, tmp_path):
    name = many.write(tmp_path)
    assert list(load_rows(name)) == list(load_rows(name, streaming=True)) == ROWS * many.times


def test_the_place_of_a_row_of_a_list_is_in_its_file(tmp_path):
    assert place_of_row([str(path) for path in write_list(tmp_path)], 2 * 5 + 1) == f"{tmp_path}/rows.csv:3"


def test_a_directory_has_the_splits_that_its_files_names_tell(tmp_path):
    directory = write_directory(tmp_path)
    assert list(load_rows(str(directory), "test")) == list(load_rows(directory, "test", streaming=True)) == ROWS
    assert place_of_row(directory, 1, "test") == f"{directory}/test.tsv:3"


def test_a_directory_of_files_of_which_some_cannot_be_read_is_refused(tmp_path):
    directory = write_directory(tmp_path)
    for name in ("LICENSE", "make.py", "test-1.csv.xz", "notes.md", ".hidden.txt"):
        (directory / name).write_text("a")
    assert len(load_rows(directory)) == len(ROWS) * 8
    with pytest.raises(ValueError, match=r"split 'test' that are not read, beside test.tsv .*: test-1.csv.xz. Unpack"):
        load_rows(directory, "test")
    for name in ("train-1.jsonl.bz2", "train-2.arrow"):
        (directory / name).write_text("a")
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"split 'train' .*: train-1.jsonl.bz2, train-2.arrow. Unpack"):
            load_rows(directory, streaming=streaming)


def test_a_directory_that_says_how_it_is_read_is_read_so(tmp_path):
    directory = write_directory(tmp_path)
    files = "data_files:\n  - split: train\n    path: test.tsv\n"
    (directory / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  {files}---\n# Rows\n")
    assert len(load_rows(directory)) == len(ROWS)
    with pytest.raises(ValueError, match='Unknown split "test"'):
        load_rows(directory, "test")


def test_what_datasets_saved_is_read(tmp_path):
    saved = write_saved(tmp_path)
    assert list(load_rows(saved)) == ROWS and list(load_rows(saved / "train")) == ROWS
    assert list(load_rows(saved, "test", streaming=True)) == ROWS[1:]
    with pytest.raises(ValueError, match="saved has no split 'dev'; there are train, test"):
        load_rows(saved, "dev")


def test_a_named_dataset_is_streamed_by_datasets(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (a, k))
    assert load_rows("owner/name", "test", streaming=True) == (("owner/name",), {"split": "test", "streaming": True})


CHAT = {"role": "assistant", "content": "b"}
ENCODED = Encoded([1, 2], [-100, 2], [None, None])

# Columns that nobody reads, drift, null types

WILD = [
    {"prompt": "a", "completion": "b", "id": 1, "meta": {"x": 1}, "none": None},
    {"prompt": "c", "completion": "d", "id": "one", "meta": [3, "y", {"z": None}], "score": 2**70},
    {"prompt": "e", "completion": "f", "id": None, "meta": "\ud800", "none": [], "more": {"a": {"b": [1.5]}}},
]


def test_columns_that_nobody_reads_never_stop_a_run(tmp_path):
    path = write(tmp_path / "x.jsonl", *map(json.dumps, WILD))
    expected = [ids("<s> a b </s>"), ids("<s> c d </s>"), ids("<s> e f </s>")]
    for columns in (None, COLUMNS):
        for streaming in (False, True):
            rows = load_rows(path, columns=columns, streaming=streaming)
            assert [row["input_ids"] for row in encode_rows(rows, make_tokenizer(), 8)[0]] == expected
    assert [row["input_ids"] for row in encode_rows(WILD, make_tokenizer(), 8)[0]] == expected


def test_a_column_that_is_not_asked_for_is_there_without_its_values(tmp_path):
    for path in (FILES[0].write(tmp_path), FILES[-1].write(tmp_path)):
        assert load_rows(path, columns=["prompt"])[:] == {"prompt": ["a", "d, e"], "completion": [None, None]}


def test_schemas_of_files_may_drift(tmp_path):
    tables = [{"text": ["a"], "x": [1]}, {"text": pa.array([None], pa.null()), "question": ["b"], "answer": ["c"]}]
    tables.append({"text": ["d"], "x": [{"y": 1}]})
    for i, table in enumerate(tables):
        pq.write_table(pa.table(table), tmp_path / f"{i}.parquet")
    paths = sorted(tmp_path.glob("*.parquet"))
    encoded, counts = encode_rows(load_rows(paths), make_tokenizer(), 8)
    assert encoded["input_ids"][:] == [ids("<s> a </s>"), ids("<s> b \n c </s>"), ids("<s> d </s>")]
    assert counts.layouts == {"text": 2, "question and answer": 1}


def test_a_column_that_would_have_to_be_decoded_is_not(tmp_path):
    image = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"text": ["a"], "image": [{"bytes": b"no image", "path": None}]}, features=image)
    rows.to_parquet(tmp_path / "x.parquet")
    assert encode_rows(rows, make_tokenizer(), 8)[0]["input_ids"][:] == [ids("<s> a </s>")]
    for streaming in (False, True):
        read = load_rows(tmp_path / "x.parquet", columns=COLUMNS, streaming=streaming)
        assert [row["input_ids"] for row in encode_rows(read, make_tokenizer(), 8)[0]] == [ids("<s> a </s>")]


def test_objects_come_back_as_they_stood_in_the_file(tmp_path, monkeypatch):
    chats = [[{"role": "user", "content": "a", "x": 0.123456789012345678, "y": {"z": None}}], [{"role": "user"}]]
    path = write(tmp_path / "x.jsonl", *(json.dumps({"messages": chat}) for chat in [*chats, [CHAT]]))
    seen = []
    monkeypatch.setattr(encode, "encode_chat", lambda index, messages, *_, **__: seen.append(messages) or [ENCODED])
    encode_rows(load_rows(path), make_tokenizer(), 8)
    assert len(list(encode_rows(load_rows(path, streaming=True), make_tokenizer(), 8)[0])) == 3
    assert seen == [*chats, [CHAT]] * 2


# What cannot be read


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.json", b'\n[{"a": 1},\n {"a": }]', ":3: Expecting value"),
        ("x.json", b'[{"a": 1},\n {"a": "\xff"}]', ":2: 'utf-8' codec can't decode"),
        ("x.json", b'[{"a": 1}, 3]', ", row 1: expected an array of JSON objects, found int"),
        ("x.json", b'[{"a": 1}, {}]', ", row 1: expected an array of JSON objects, found an empty object"),
        ("x.json", b'[1, 2]\n["a"]\n', ":2: Extra data; expected one JSON array of objects, or one a line"),
        ("x.json", b'{\n "a": 1\n}\n', ":1: Expecting property name"),
        ("x.json", b"[]", " has no rows"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9, mtime=0)[:-9], " cannot be read: Truncated compressed stream"),
        ("x.jsonl.gz", b'{"a": 1}\n', " cannot be read: zlib inflate failed"),
        ("x.jsonl.zst", b'{"a": 1}\n', " cannot be read: ZSTD decompress failed"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n{"a"}\n', mtime=0), ":2: Expecting ':'"),
        ("x.csv", b"", " has no rows"),
        ("x.csv", b"a,b\n", " has no rows"),
        ("x.csv", b"a,b\n1,2\n3\n", ":3: 1 cells, but the header has 2"),
        ("x.csv", b'a,b\n"1\n1",2\n3,4,5\n', ":4: 3 cells, but the header has 2"),
        ("x.csv", b'a,b\n1,2\n"3\n3",4,5\n', ":3: 3 cells, but the header has 2"),
        ("x.csv", b'a,b\n1,"2\n', ":2: unexpected end of data"),
        ("x.csv", b"a,b\n1,\xff\n", ":2: 'utf-8' codec can't decode"),
        ("x.csv", b"a,a\n1,2\n", ":1: the header has 'a' twice"),
        ("x.csv", b"a,weight\n1,2\n1,two\n", ":3: weight must be a number; got 'two'"),
        ("x.parquet", b"PAR1 it is not", " cannot be read: "),
    ],
)
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
def test_what_cannot_be_read_says_where_in_one_line(name, content, message, streaming, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    if streaming and "no rows" in message:
        assert list(load_rows(path, streaming=True)) == []
        return
    with pytest.raises(ValueError) as error:
        list(load_rows(path, streaming=streaming))
    assert str(error.value).startswith(f"{path}{message}") and "\n" not in str(error.value)


def test_cells_are_text_and_a_weight_is_a_number(tmp_path):
    path = write(tmp_path / "x.csv", "prompt,completion,weight", "007,NA,2", "null,1.50,", ",,-0.5")
    expected = {"prompt": ["007", "null", ""], "completion": ["NA", "1.50", ""], "weight": [2, None, -0.5]}
    assert load_rows(path)[:] == expected
    (tmp_path / "y.csv").write_bytes("\ufeffprompt,completion\r\na,".encode() + b'"' + b"b" * 200_000 + b'"\r\n')
    assert load_rows(tmp_path / "y.csv")[:] == {"prompt": ["a"], "completion": ["b" * 200_000]}


def test_empty_cells_are_of_the_layouts_of_other_rows(tmp_path):
    header = "messages,prompt,completion,question,answer,instruction,input,output,text,tools,weight"
    cells = [
        ",a,b,,,,,,,,",
        ",,,a,b,,,,,,2",
        ",,,,,a,,b,,,",
        ",,,,,a,c,b,,,",
        ",,,,,,,,a,,",
        ",a,,,,,,,,,",
        ",,b,,,,,,,,",
    ]
    texts = "<s> a b </s>", "<s> a \n b </s>", "<user> a <bot> b </s>", "<user> a \n c <bot> b </s>", "<s> a </s>"
    path = write(tmp_path / "x.csv", header, *cells, ",,,,,,,,,,")
    for streaming in (False, True):
        found, counts = encode_rows(load_rows(path, streaming=streaming), make_tokenizer(), 16)
        assert [row["input_ids"] for row in found] == list(map(ids, [*texts, "<s> b </s>"]))
        assert (counts.rows, counts.without_response) == (8, 2)
    assert counts.layouts == {"prompt and completion": 4, "question and answer": 1, "Alpaca": 2, "text": 1}
    assert load_rows(path)[0] | {"messages": None, "tools": None, "weight": None} == load_rows(path)[0]


def test_splits_and_names_that_are_not_there(tmp_path):
    path = FILES[0].write(tmp_path)
    with pytest.raises(ValueError, match=r"rows.jsonl is a file, whose rows are all of the split 'train'; got 'test'"):
        load_rows(path, "test")
    with pytest.raises(FileNotFoundError, match="no such file.*none.jsonl"):
        load_rows([path, tmp_path / "none.jsonl"])
    with pytest.raises(FileNotFoundError, match="no such file.*owner/name"):
        load_rows([str(path), "owner/name"])
    with pytest.raises(ValueError, match="the list of files is empty"):
        load_rows([])
    assert load_rows([path]).num_rows == 2


# Streams


def test_a_stream_gives_what_is_read_at_once_and_counts_it(tmp_path):
    paths, tokenizer = write_list(tmp_path), make_tokenizer()
    whole, counts = encode_rows(load_rows(paths), tokenizer, 8, keep_columns=["prompt"])
    stream, counted = encode_rows(load_rows(paths, streaming=True), tokenizer, 8, keep_columns=["prompt"])
    read = list(stream)
    assert read == list(whole) and counted == counts
    assert stream.num_shards == len(paths)


def test_a_stream_has_the_fields_that_its_first_row_lacks(tmp_path):
    asked = {"instruction": "a", "output": "b"}
    drifting = [asked, asked | {"input": "c"}, {"text": "d", "id": {"x": 1}}, asked | {"input": "", "weight": 0.0}]
    path = write(tmp_path / "x.jsonl", *map(json.dumps, drifting))
    made = datasets.IterableDataset.from_generator(drifting.__iter__)
    texts = ["<user> a <bot> b </s>", "<user> a \n c <bot> b </s>", "<s> d </s>", "<user> a <bot> b </s>"]
    for rows in (load_rows(path), load_rows(path, streaming=True), made):
        found = list(encode_rows(rows, make_tokenizer(), 8, prompt_weight=0.5)[0])
        assert [row["input_ids"] for row in found] == list(map(ids, texts))
        assert found[1]["token_weights"] == [0, 0.5, 0.5, 0.5, 0.5, 1, 1] and found[3]["token_weights"][-2:] == [0, 0]
    assert list(load_rows(path, streaming=True, columns=["text"]))[1:3] == [{"text": None}, {"text": "d"}]


ROW, WEIGHED = {"text": "a"}, {"text": "b", "weight": 0.5}
CHATS = [{"messages": [{"role": "user", "content": "a"}, CHAT | more]} for more in ({}, {"weight": 0.5})]


def test_a_stream_has_weights_where_its_columns_or_its_first_row_or_a_setting_do(tmp_path):
    paths = [write(tmp_path / f"{i}.jsonl", json.dumps(row)) for i, row in enumerate([ROW, WEIGHED])]
    typed = datasets.Dataset.from_list([WEIGHED, ROW]).to_iterable_dataset()
    chats = datasets.IterableDataset.from_generator(CHATS[::-1].__iter__)
    tokenizer = make_tokenizer()
    for rows in (load_rows(paths, streaming=True), load_rows(paths[0], streaming=True, columns=COLUMNS), typed, chats):
        assert all("token_weights" in row for row in encode_rows(rows, tokenizer, 8)[0])
    for rows in (load_rows(paths[0], streaming=True), load_rows(paths[0]).to_iterable_dataset()):
        assert list(encode_rows(rows, tokenizer, 8)[0]) == [{"input_ids": [1, 7, 2], "labels": [-100, 7, 2]}]
        assert list(encode_rows(rows, tokenizer, 8, response_weight=2.0)[0])[0]["token_weights"] == [0, 2, 2]


def test_a_stream_without_weights_goes_through_collators(tmp_path):
    from transformers import DataCollatorForSeq2Seq

    stream, _ = encode_rows(load_rows(FILES[0].write(tmp_path), streaming=True), make_tokenizer(), 8)
    assert stream.column_names == ["input_ids", "labels"]
    assert set(DataCollatorForSeq2Seq(make_tokenizer())(list(stream))) == {"input_ids", "labels", "attention_mask"}


@pytest.mark.parametrize("rows", [[ROW, WEIGHED], CHATS], ids=["row", "message"])
def test_a_weight_in_a_stream_without_is_refused_with_its_row(rows, tmp_path):
    path = write(tmp_path / "x.jsonl", *map(json.dumps, rows))
    stream, _ = encode_rows(load_rows(path, streaming=True), make_tokenizer(), 8)
    with pytest.raises(RowError, match="row 1: it gives a weight, but the first row of the stream gives none"):
        list(stream)


def test_workers_share_a_stream(tmp_path):
    from torch.utils.data import DataLoader

    paths = [file.write(tmp_path) for file in FILES[:2]]
    stream, _ = encode_rows(load_rows(paths, streaming=True), make_tokenizer(), 8)
    assert len(list(DataLoader(stream, batch_size=None, num_workers=2))) == 4


@pytest.mark.parametrize("typed", [False, True])
def test_a_stream_without_a_layout_names_its_columns(tmp_path, typed):
    path = write(tmp_path / "x.jsonl", '{"txt": "a"}')
    rows = load_rows(path).to_iterable_dataset() if typed else load_rows(path, streaming=True)
    with pytest.raises(RowError, match=r"row 0: its columns are \['txt'\]; accepted are"):
        list(encode_rows(rows, make_tokenizer(), 8)[0])


def test_a_row_of_a_stream_that_cannot_be_encoded_is_named(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"text": "a"}', '{"text": 3}', '{"text": null}')
    stream, _ = encode_rows(load_rows(path, streaming=True), make_tokenizer(), 8)
    with pytest.raises(RowError, match="row 1: text must be a string; got int"):
        list(stream)
