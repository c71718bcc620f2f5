from __future__ import annotations

import numpy
import pytest
import torch
from oracles import next_token_nll
from recorded import LIMIT, arguments, select

from tokensel import recording
from tokensel.cli import main
from tokensel.data import encode_rows, load_rows
from tokensel.store import HistoryStore
from tokensel.testing import make_model, make_rows, make_tokenizer

pytestmark = pytest.mark.usefixtures("small_row_groups")

# Responses without their prompts


def test_alone_is_the_loss_behind_bos_only(tmp_path, model_dir, data):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert main(arguments(model_dir, data, tmp_path / "alone.parquet", without_prompt="true")) == 0
    store = HistoryStore.open(tmp_path / "alone.parquet", content="alone_nll")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    rows, _ = encode_rows(load_rows(data), tokenizer, LIMIT)
    for row in rows.select(range(5)):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        response = ids[labels != -100]
        alone = torch.cat([torch.tensor([tokenizer.bos_token_id]), response])
        with torch.no_grad():
            expected = next_token_nll(model(alone[None]).logits[0].double(), alone)
        found = store.lookup(ids, labels)[labels != -100].double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_alone_drops_every_turn_of_the_prompt():
    document = numpy.array([[1, -100], [5, -100], [6, 6], [7, -100], [8, 8], [9, 9]], numpy.int32)
    assert recording.without_prompt(document, 2).tolist() == [[2, -100], [6, 6], [8, 8], [9, 9]]


def test_t_shirt_end_to_end(tmp_path, model_dir, data):
    assert main(arguments(model_dir, data, tmp_path / "base.parquet")) == 0
    assert main(arguments(model_dir, data, tmp_path / "alone.parquet", without_prompt="true")) == 0
    files = {name: tmp_path / f"{name}.parquet" for name in ("base", "alone")}
    assert select(tmp_path / "w.parquet", "t_shirt", files, "rho=0.5") == 0
    import pyarrow.parquet as pq

    weights = [set(w) - {None} for w in pq.read_table(tmp_path / "w.parquet")["weight"].to_pylist()]
    kept = [{x for x in w if x == x} for w in weights]
    assert sorted(map(tuple, kept)) == [(0.0,)] * 15 + [(1.0,)] * 15  # whole samples


# The contrast of two models


def test_the_contrast_is_the_softmax_of_twice_one_minus_the_other(tmp_path, model_dir, data, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    wrong = make_model(tokenizer, hidden_size=16, layers=1, heads=2, kv_heads=1, seed=1)
    wrong.save_pretrained(tmp_path / "wrong")
    tokenizer.save_pretrained(tmp_path / "wrong")
    settings = {"contrast_model_name_or_path": tmp_path / "wrong"}
    assert main(arguments(model_dir, data, tmp_path / "c.parquet", **settings)) == 0, capsys.readouterr().err
    store = HistoryStore.open(tmp_path / "c.parquet", content="contrast_nll")
    right = AutoModelForCausalLM.from_pretrained(model_dir)
    for row in encode_rows(load_rows(data), tokenizer, LIMIT)[0].select(range(5)):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            z = 2 * right(ids).logits.double() - wrong(ids).logits.double()
        expected = next_token_nll(z[0], ids[0])
        response = labels[0, 1:] != -100
        found = store.lookup(ids, labels)[0, 1:].double()
        torch.testing.assert_close(found[response], expected[response], rtol=1e-5, atol=1e-5)


def test_a_contrast_that_cannot_be_made_is_refused(tmp_path, model_dir, data, capsys):
    settings = {"contrast_model_name_or_path": model_dir, "without_prompt": "true"}
    assert main(arguments(model_dir, data, tmp_path / "c.parquet", **settings)) == 2
    assert "without_prompt and contrast_model_name_or_path" in capsys.readouterr().err
    other = make_tokenizer(make_rows(60, seed=5), vocab_size=300)
    make_model(other, hidden_size=16, layers=1, heads=2, kv_heads=1, seed=1).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    settings = {"contrast_model_name_or_path": tmp_path / "other"}
    assert main(arguments(model_dir, data, tmp_path / "c.parquet", **settings)) == 2
    assert f"{tmp_path / 'other'} has another tokenizer than {model_dir}" in capsys.readouterr().err


# Training on what was selected


def test_a_weights_store_trains_what_select_kept(tmp_path, model_dir, data, capsys):
    from tokensel.trainer import SelectiveTrainer

    for name in ("base", "reference"):
        dtype = {"base": "float32", "reference": "bfloat16"}[name]  # another model, if a near one
        assert main(arguments(model_dir, data, tmp_path / f"{name}.parquet", dtype=dtype)) == 0
    files = {name: tmp_path / f"{name}.parquet" for name in ("base", "reference")}
    assert select(tmp_path / "w.parquet", "token_cleaning", files, "rho=0.6") == 0
    store = HistoryStore.open(tmp_path / "w.parquet", content="weight")
    seen = []

    def record(self, inputs, output):
        labels = torch.where(output.response, inputs["labels"], -100)
        where = {"key_mask": inputs.get("attention_mask"), "segment_ids": output.sample}
        seen.append((output.weights, store.lookup(inputs["input_ids"], labels, **where), output.response))
        return original(self, inputs, output)

    original = SelectiveTrainer.record_selection
    settings = {
        "model_name_or_path": model_dir,
        "dataset_name": data,
        "max_length": LIMIT,
        "weights_store": tmp_path / "w.parquet",
        "use_cpu": "true",
        "report_to": "none",
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "max_steps": 2,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SelectiveTrainer, "record_selection", record)
        for method, packing in (("weighted", "false"), ("weighted", "true"), ("random", "false")):
            more = {"method": method, "packing": packing, "output_dir": tmp_path / f"{method} {packing}"}
            argv = [part for name, value in (settings | more).items() for part in (f"--{name}", str(value))]
            seen.clear()
            assert main(["train", *argv]) == 0, capsys.readouterr().err
            assert len(seen) == 2
            for weights, selected, response in seen:
                assert 0.3 < selected.sum() / response.sum() < 0.9
                if method == "weighted":
                    assert torch.equal(weights, selected)
                else:  # chooses among what was selected, of each sample
                    assert 0.55 < weights.sum() / selected.sum() < 0.75 and (weights <= selected).all()


def test_a_history_store_is_not_taken_for_weights(tmp_path, model_dir, data, capsys):
    assert main(arguments(model_dir, data, tmp_path / "h.parquet")) == 0
    argv = ["train", "--model_name_or_path", model_dir, "--dataset_name", data, "--max_length", str(LIMIT)]
    argv += ["--weights_store", str(tmp_path / "h.parquet"), "--output_dir", str(tmp_path / "run")]
    argv += ["--method", "weighted", "--use_cpu", "true", "--report_to", "none"]
    assert main(argv) == 2
    assert "here belong weights: `tokensel select`" in capsys.readouterr().err
