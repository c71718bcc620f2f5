"""Where the model of `tokensel score` may be: laid over devices and a disk, in 8 or 4 bits, and what is refused."""

from __future__ import annotations

import pytest
import torch
from recorded import LIMIT, arguments

import tokensel
from tokensel import loading, recording
from tokensel.cli import main
from tokensel.data import encode_rows, load_rows
from tokensel.store import HistoryStore

pytestmark = pytest.mark.usefixtures("small_row_groups")


@pytest.fixture
def whole(tmp_path, model_dir, data):
    assert main(arguments(model_dir, data, tmp_path / "whole.parquet")) == 0
    return tmp_path / "whole.parquet"


def test_a_model_that_is_spread_by_a_device_map_gives_the_same_bytes(tmp_path, model_dir, data, whole):
    assert main(arguments(model_dir, data, tmp_path / "h.parquet", device_map="auto")) == 0
    assert (tmp_path / "h.parquet").read_bytes() == whole.read_bytes()


PLACES = {"model.layers.1": "disk"} | dict.fromkeys(
    ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
)


@pytest.mark.parametrize("on_disk", ["a layer", "the head"])
def test_layers_may_lie_on_a_disk_and_the_head_may_not(tmp_path, model_dir, data, whole, on_disk):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    places = PLACES | ({"lm_head": "disk"} if on_disk == "the head" else {})
    model = AutoModelForCausalLM.from_pretrained(model_dir, device_map=places, offload_folder=tmp_path / "offloaded")
    assert any(parameter.is_meta for parameter in model.parameters())
    rows, _ = encode_rows(load_rows(data), AutoTokenizer.from_pretrained(model_dir), LIMIT)
    if on_disk == "the head":
        with pytest.raises(
            ValueError, match="lm_head.weight is offloaded by its device_map; keep the head on a device"
        ):
            tokensel.record_losses(model, rows, tmp_path / "h.parquet", batch_size=4)
        return
    tokensel.record_losses(model, rows, tmp_path / "h.parquet", batch_size=4)
    assert HistoryStore.open(tmp_path / "h.parquet").fingerprint() == HistoryStore.open(whole).fingerprint()


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_in_few_bits_give_nearly_the_same_losses(tmp_path, model_dir, data, whole, bits):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    assert main(arguments(model_dir, data, tmp_path / "h.parquet", **{f"load_in_{bits}bit": "true"})) == 0
    import pyarrow.parquet as pq

    rounded, exact = (
        torch.tensor([x for row in pq.read_table(path)["nll"].to_pylist() for x in row])
        for path in (tmp_path / "h.parquet", whole)
    )
    difference = (rounded - exact).nan_to_num(0).abs()
    assert 0 < difference.max() < 0.2


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"fully_shard": "true"}, "fully_shard spreads the model over ranks; start"),
        ({"fully_shard": "true", "device_map": "auto"}, "fully_shard and device_map both say where the model is"),
        ({"device": "cpu", "device_map": "auto"}, "device_map and device both say where the model is"),
        ({"load_in_8bit": "true", "load_in_4bit": "true"}, "load_in_8bit and load_in_4bit contradict each other"),
        ({"device": "gpu7"}, "device 'gpu7' cannot be used"),
        ({"ray_actors": 0}, "ray_actors must be positive"),
        ({"tokens_per_batch": 9}, "batch_size and tokens_per_batch both say how much"),
        ({"tokens_per_batc": 9}, "did you mean tokens_per_batch?"),
    ],
)
def test_settings_that_contradict_each_other_are_named(tmp_path, model_dir, data, capsys, settings, message):
    assert main(arguments(model_dir, data, tmp_path / "h.parquet", **settings)) == 2
    assert message in capsys.readouterr().err


def test_too_little_memory_says_what_needs_less(tmp_path, model_dir, data, capsys, monkeypatch):
    def too_much(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.")

    monkeypatch.setattr(recording, "losses_of", too_much)
    assert main(arguments(model_dir, data, tmp_path / "h.parquet")) == 2
    error = capsys.readouterr().err
    assert (
        "CUDA out of memory. What needs less: a smaller --tokens_per_batch" in error and "--fully_shard true" in error
    )


def test_more_ranks_than_gpus_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="rank 1 of this machine has no GPU: there are 1. Start as many ranks as GPUs"):
        loading._device(None, 2)
