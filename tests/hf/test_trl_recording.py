"""A trainer records the rows that it trains, by its own tokens, and one like it finds every document again."""

from __future__ import annotations

import datasets
import pytest
import torch
from training import ROWS, TOKENIZER, build, build_lora, make_trainer
from trl_training import CHAT_TOKENIZER, CHATS, COMPLETIONS, SOME, TEXTS, make, run

import tokensel
from tokensel.store import HistoryMissError, HistoryStore

# rows that TRL tokenises otherwise than `tokensel score`: a word goes on where the prompt ends
SPLIT = datasets.Dataset.from_list(
    [{"prompt": (both := r["prompt"] + r["completion"])[:7], "completion": both[7:]} for r in SOME]
)
LAYOUTS = {
    "completions": (COMPLETIONS, {}),
    "split words": (SPLIT, {}),
    "all of the completions": (COMPLETIONS, {"completion_only_loss": False}),
    "packed and cut": (COMPLETIONS, {"packing": True, "max_length": 40}),
    "cut": (COMPLETIONS, {"max_length": 40}),
    "chats": (CHATS, {"assistant_only_loss": True}),
    "text": (TEXTS, {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_trainer_of_trl_records_it_finds(tmp_path, layout):
    rows, changes = LAYOUTS[layout]
    recorder = make(tmp_path, rows, method="full", **changes)
    summary = recorder.record_history(tmp_path / "h.parquet")
    chosen = {"method": "rel", "history": "recorded", "history_store": str(tmp_path / "h.parquet")}
    trainer = run(tmp_path, rows, learning_rate=0.0, **chosen, **changes)
    assert sum(int(output.response.sum()) for _, output in trainer.seen) == summary["response_tokens"]
    for _, output in trainer.seen:  # the model has not moved: its losses are the history, which is float32
        assert ((output.history_nll - output.nll).abs() <= output.nll * 2.0**-23).all()
    tokensel.record_losses(build(), recorder.train_dataset, tmp_path / "same.parquet", tokenizer=CHAT_TOKENIZER)
    if layout != "all of the completions":  # what counts there is a setting, and no column
        stores = [HistoryStore.open(tmp_path / f"{name}.parquet") for name in ("h", "same")]
        assert stores[0].fingerprint() == stores[1].fingerprint()


def test_a_plain_trainer_records_what_its_collator_makes_with_the_adapters_on(tmp_path):
    def collate(rows):
        batch = TOKENIZER.pad({"input_ids": [row["input_ids"] for row in rows]}, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, :3] = -100
        return dict(batch) | {"labels": labels}

    rows = ROWS.select_columns(["input_ids"])
    trainer = make_trainer(tmp_path, build_lora(), rows, collator=collate, method="full")
    trainer.record_history(tmp_path / "h.parquet", batch_size=3)
    chosen = {"method": "rel", "history": "recorded", "history_store": str(tmp_path / "h.parquet")}
    trained = make_trainer(tmp_path, trainer.model, rows, collator=collate, learning_rate=0.0, **chosen)
    trained.train()
    for _, output in trained.seen:
        assert ((output.history_nll - output.nll).abs() <= output.nll * 2.0**-23).all()
        assert int(output.response.sum()) > 40


def test_a_document_that_was_not_recorded_says_who_records_it(tmp_path):
    make(tmp_path, COMPLETIONS.select(range(4)), method="full").record_history(tmp_path / "h.parquet")
    with pytest.raises(HistoryMissError, match=r"trainer.record_history\(path\)"):
        run(tmp_path, method="rel", history="recorded", history_store=str(tmp_path / "h.parquet"))


def test_what_cannot_be_recorded_is_refused(tmp_path):
    trainer = make(tmp_path, COMPLETIONS.to_iterable_dataset(), method="full", max_steps=1)
    with pytest.raises(TypeError, match="training set must have a length; got IterableDataset"):
        trainer.record_history(tmp_path / "h.parquet")

    def with_pictures(rows):
        return {"input_ids": torch.tensor([[4, 5]]), "labels": torch.tensor([[4, 5]]), "pixels": torch.zeros(1, 3)}

    trainer = make_trainer(tmp_path, collator=with_pictures, method="full")
    with pytest.raises(ValueError, match="only text can be recorded, but the batches have pixels"):
        trainer.record_history(tmp_path / "h.parquet")
    assert not (tmp_path / "h.parquet").exists()
