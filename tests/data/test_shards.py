from __future__ import annotations

import contextlib
import errno
import os

import numpy
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tokensel.store.shards as shards_module
from tokensel.store.shards import Shards

SETTINGS = {"command": "test", "max_length": 9}


@contextlib.contextmanager
def opened(path, settings=SETTINGS):
    with Shards(path) as shards:
        shards.begin(settings)
        yield shards


def put(shards, *documents):
    """Records documents (key, values) together."""
    keys = numpy.array([key for key, _ in documents], numpy.int64)
    lengths = numpy.array([len(values) for _, values in documents], numpy.int32)
    shards.append(keys, lengths, numpy.concatenate([numpy.array(v, numpy.float32) for _, v in documents]))


def held(shards, order=None):
    return [(key, values.tolist()) for key, values in shards.documents(order)]


A, B, C, D = (5, [1.0, 2.0]), (-3, [3.0]), (1 << 62, [4.0, 5.0, 6.0]), (7, [8.0])


def test_shards_survive_and_are_read_in_any_order(tmp_path):
    with opened(tmp_path / "out") as shards:
        put(shards, A, B)
        assert held(shards) == [A, B]
        put(shards, C)
        shards.state["threshold"] = 7
        shards.save_state()
    with opened(tmp_path / "out") as shards:
        assert shards.keys.tolist() == [A[0], B[0], C[0]] and shards.lengths.tolist() == [2, 1, 3]
        assert shards.state == {"threshold": 7}
        assert held(shards, numpy.array([C[0], A[0], B[0]])) == [C, A, B]
        shards.remove()
    assert os.listdir(tmp_path) == []


def test_a_shard_that_was_not_finished_is_no_shard(tmp_path):
    with opened(tmp_path / "out") as shards:
        put(shards, A, B)
    (part,) = (tmp_path / "out.partial").glob("part-*.parquet")
    torn = part.with_name(f".part-00001.parquet.{os.getpid()}.tmp")
    whole = part.read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole)):  # wherever a process was killed while it wrote
        torn.write_bytes(whole[:size])
        with opened(tmp_path / "out") as shards:
            assert held(shards) == [A, B] and not torn.exists()


def test_wherever_a_shard_is_damaged_the_ones_before_it_stay(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shards_module, "SHARD_TOKENS", 1)  # a shard for each call
    with opened(tmp_path / "out") as shards:
        put(shards, A, B)
        put(shards, C)
        put(shards, D)
    first, second, third = sorted((tmp_path / "out.partial").glob("part-*.parquet"))
    whole, last = second.read_bytes(), third.read_bytes()
    values = whole.index(numpy.float32(C[1]).tobytes())
    damaged = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(values, values + 12)]  # a bad disk
    damaged += [whole[:size] for size in range(0, len(whole), 37)]  # a power loss
    for bytes_ in damaged:
        second.write_bytes(bytes_)
        third.write_bytes(last)
        with opened(tmp_path / "out") as shards:
            assert shards.keys.tolist() == [A[0], B[0]] and held(shards) == [A, B]
            assert "part-00001.parquet is damaged" in (told := capsys.readouterr().out)
            assert "it and the 1 shards behind it are done again" in told
            put(shards, C)
            put(shards, D)
            assert held(shards) == [A, B, C, D]
        assert (second.read_bytes(), third.read_bytes()) == (whole, last)


def test_shards_are_numbered_on_past_the_width_of_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "SHARD_TOKENS", 1)
    with opened(tmp_path / "out") as shards:
        put(shards, A)
        put(shards, B)
    first, second = sorted((tmp_path / "out.partial").glob("part-*.parquet"))
    first.rename(first.with_name("part-99999.parquet"))
    second.rename(second.with_name("part-100000.parquet"))
    with opened(tmp_path / "out") as shards:
        put(shards, C)
        assert held(shards) == [A, B, C]


def test_shards_are_read_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "SHARD_TOKENS", 7)
    random = numpy.random.default_rng(0)
    documents = [(int(key), [float(key)] * (1 + int(key) % 4)) for key in random.permutation(40)]
    with opened(tmp_path / "out") as shards:
        for document in documents:
            put(shards, document)
        assert len(list(shards.directory.glob("part-*.parquet"))) > 5
        assert held(shards) == documents
        order = random.permutation(40)
        expected = dict(documents)
        assert held(shards, order) == [(int(key), expected[int(key)]) for key in order]


def test_a_shard_is_written_when_it_waits_too_long(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(shards_module.time, "monotonic", lambda: now[0])
    with opened(tmp_path / "out") as shards:
        for seconds, documents, files in ((0, [A], 0), (9, [B], 0), (11, [C], 1), (5000, [D], 1), (5040, [], 1)):
            now[0] = 1000.0 + seconds
            put(shards, *documents) if documents else None
            assert len(list(shards.directory.glob("part-*.parquet"))) == files
        now[0] = 1000.0 + 5051  # a hundredth of the time, by now
        put(shards, (9, [1.0]))
        assert len(list(shards.directory.glob("part-*.parquet"))) == 2


def test_what_version_0_1_left_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "rows").write_bytes(b"tsj1")
    with pytest.raises(ValueError, match="left by tokensel 0.1, .*; finish it with that version, or remove it"):
        with opened(tmp_path / "out"):
            pytest.fail("the block must not run")
    assert (tmp_path / "out.partial" / "rows").read_bytes() == b"tsj1"


def test_shards_of_other_settings_are_refused_with_the_difference(tmp_path):
    with opened(tmp_path / "out") as shards:
        put(shards, A)
    with pytest.raises(ValueError, match="out.partial belongs to .* other settings: max_length was 9 and is 8. Give"):
        with opened(tmp_path / "out", SETTINGS | {"max_length": 8}):
            pytest.fail("the block must not run")
    with opened(tmp_path / "out") as shards:
        assert held(shards) == [A]


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("mine")
    os.mkdir(tmp_path / "out.partial")
    (tmp_path / "out.partial" / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic link"):
        with opened(tmp_path / "out"):
            pytest.fail("the block must not run")
    os.mkdir(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / ".x.tmp").write_text("mine")
    (tmp_path / "other.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="other.partial is a link; remove it"):
        with opened(tmp_path / "other"):
            pytest.fail("the block must not run")
    assert (tmp_path / "victim").read_text() == (tmp_path / "elsewhere" / ".x.tmp").read_text() == "mine"


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_settings_that_are_damaged_are_named(tmp_path, text):
    with opened(tmp_path / "out") as shards:
        put(shards, A)
    (tmp_path / "out.partial" / "settings.json").write_text(text)
    with pytest.raises(ValueError, match="settings.json (is damaged|holds no object).*remove the directory"):
        with opened(tmp_path / "out"):
            pytest.fail("the block must not run")


def test_what_is_no_shard_is_not_read_as_one(tmp_path, capsys):
    with opened(tmp_path / "out") as shards:
        put(shards, A)
    (tmp_path / "out.partial" / "part-x.parquet").write_bytes(b"not mine")
    pq.write_table(pa.table({"key": [1]}), tmp_path / "out.partial" / "part-00007.parquet")
    with opened(tmp_path / "out") as shards:
        assert held(shards) == [A]
    assert "part-00007.parquet is damaged (the columns key)" in capsys.readouterr().out


def test_two_processes_do_not_share_shards(tmp_path):
    with opened(tmp_path / "out"):
        with pytest.raises(BlockingIOError, match="another process is writing"):
            with opened(tmp_path / "out"):
                pytest.fail("the block must not run")


def test_a_run_that_failed_before_its_first_record_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError):
        with opened(tmp_path / "out"):
            raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_a_rank_that_fails_leaves_the_directory_to_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "rank_of_ranks", lambda: (0, 2))
    with pytest.raises(RuntimeError):
        with opened(tmp_path / "out"):
            raise RuntimeError
    assert (tmp_path / "out.partial" / "settings.json").is_file()


@pytest.mark.parametrize("room", [0, 10, 30, 60])
def test_a_full_disk_keeps_the_shards_and_says_so(tmp_path, monkeypatch, room):
    def full(table, path, **options):
        path.write_bytes(b"x" * room)  # what had room is there, in the temporary file
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="kept in .*out.partial. Free some space and run the same command again") as error:
        with opened(tmp_path / "out") as shards:
            put(shards, A, B)
            assert held(shards) == [A, B]  # written
            monkeypatch.setattr(shards_module.pq, "write_table", full)
            monkeypatch.setattr(shards_module, "SHARD_TOKENS", 1)
            put(shards, C, A, B)
    monkeypatch.undo()
    assert error.value.errno == errno.ENOSPC
    with opened(tmp_path / "out") as shards:
        assert held(shards) == [A, B]


def test_a_full_disk_before_the_first_shard_says_that_nothing_was_kept(tmp_path, monkeypatch):
    def full(table, path, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards_module.pq, "write_table", full)
    with pytest.raises(OSError, match="nothing of this run was kept. Free some space") as error:
        with opened(tmp_path / "out") as shards:
            put(shards, A)
            held(shards)
    assert error.value.errno == errno.ENOSPC and os.listdir(tmp_path) == []
