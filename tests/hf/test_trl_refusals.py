"""TRL's SFTTrainer under the mixin. Float64 and SGD, so that equal updates are equal to rounding (see test_trainer)."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from peft import PromptTuningConfig
from training import TOKENIZER, build, losses, record
from transformers import DataCollatorForSeq2Seq, TrainingArguments
from trl_training import CHAT_TOKENIZER, COMPLETIONS, TEXTS, Mine, make, run, settings, trl

import tokensel
from tokensel.arguments import SelectiveTrainingArguments
from tokensel.sft import SelectiveSFTTrainer
from tokensel.store import HistoryMissError

# What is refused


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"packing": True, "packing_strategy": "wrapped"}, "loses the boundaries of documents.*'bfd'"),
        ({"loss_type": "dft"}, "loss_type must be 'nll'.*method='dft'"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor.*set it to 0"),
        ({"compute_loss_func": lambda *a, **k: None}, "compute_loss_func is not supported"),
        (
            {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}},
            "fused_linear_cross_entropy.*take it out",
        ),
        ({"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}, "virtual tokens.*use LoRA"),
    ],
)
def test_settings_that_train_another_loss_or_other_documents_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **changes)


def test_wrapped_packing_is_no_matter_where_nothing_is_packed(tmp_path):
    make(tmp_path, packing_strategy="wrapped")


def test_trls_name_for_its_chunked_loss_is_accepted(tmp_path):
    assert losses(run(tmp_path, loss_type="chunked_nll", max_steps=1)) == losses(run(tmp_path, max_steps=1))


def test_liger_keeps_its_layers_and_loses_its_loss(tmp_path):
    # Liger's kernels need a GPU; what it would patch is decided by this configuration
    trainer = make(tmp_path, use_liger_kernel=False)
    args = dataclasses.replace(trainer.args, use_liger_kernel=True, liger_kernel_config={"rope": False})
    tokensel.arguments.refuse_arguments(args, None, of_trl=True)
    assert args.liger_kernel_config == {"rope": False, "fused_linear_cross_entropy": False}


def test_training_goes_through_with_liger_applied(tmp_path):
    pytest.importorskip("liger_kernel", reason="Liger is not installed")
    layers = dict.fromkeys(("rope", "rms_norm", "swiglu"), False)  # which need a GPU
    applied = run(tmp_path, use_liger_kernel=True, liger_kernel_config=layers, max_steps=1)
    assert losses(applied) == losses(run(tmp_path, max_steps=1))


def test_a_forward_replaced_after_the_trainer_was_made_is_noticed(tmp_path):
    trainer = make(tmp_path)
    plain = type(trainer.model).forward.__get__(trainer.model)
    trainer.model.forward = lambda *args, selection=None, **kwargs: plain(*args, **kwargs)  # as Liger's swallows it
    with pytest.raises(TypeError, match="forward was replaced"):
        trainer.train()


@pytest.mark.parametrize("args", [None, trl.SFTConfig(output_dir="unused", use_cpu=True, bf16=False)])
def test_arguments_without_a_method_say_so(args):
    with pytest.raises(ValueError, match=r"method is missing, and has no default; .*args=SelectiveSFTConfig\(method="):
        SelectiveSFTTrainer(build(), args, train_dataset=COMPLETIONS, processing_class=TOKENIZER)


@pytest.mark.parametrize("kind", [trl.SFTConfig, TrainingArguments])
def test_plain_arguments_train_where_the_method_is_given(tmp_path, kind):
    plain = {name: value for name, value in settings(tmp_path).items() if hasattr(kind, name) or name == "output_dir"}
    method = tokensel.methods.get("random", rho=0.6)
    tokenizer = copy.deepcopy(CHAT_TOKENIZER)
    trainer = Mine(build(), kind(**plain), train_dataset=COMPLETIONS, processing_class=tokenizer, method=method)
    trainer.train()
    assert losses(trainer) == losses(run(tmp_path, method="random", method_args="rho=0.6"))


def test_arguments_of_another_trainer_are_named(tmp_path):
    args = SelectiveTrainingArguments(output_dir=str(tmp_path), use_cpu=True, method="full")
    with pytest.raises(TypeError, match="must be a SelectiveSFTConfig; got SelectiveTrainingArguments"):
        SelectiveSFTTrainer(build(), args, train_dataset=COMPLETIONS, processing_class=TOKENIZER)


STREAM = TEXTS.to_iterable_dataset()


@pytest.mark.parametrize("changes", [{}, {"packing": True}, {"padding_free": True, "max_length": None}])
@pytest.mark.parametrize("method", ["attention", "sstoken"])
def test_attention_to_the_prompt_of_data_without_prompts_is_refused(tmp_path, changes, method):
    history = {} if method == "attention" else {"history": "recorded", "history_store": "unread.parquet"}
    with pytest.raises(ValueError, match=r"the first \d+ rows .*have none: no label is -100.*assistant_only_loss"):
        make(tmp_path, TEXTS, method=method, **history, **changes)


def test_a_stream_without_prompts_is_refused_by_its_first_rows(tmp_path):
    message = (
        f"method 'attention' .* the first {len(TEXTS)} rows of the training data, as the data collator makes batches"
    )
    with pytest.raises(ValueError, match=message):
        make(tmp_path, STREAM, method="attention", max_steps=1)


def test_a_stream_is_trained_as_its_rows_are(tmp_path):
    chosen = {"method": "attention", "max_steps": 3, "dataloader_num_workers": 0}
    streamed = run(tmp_path, COMPLETIONS.to_iterable_dataset(), **chosen)
    inputs = [row for seen, _ in streamed.seen for row in seen["input_ids"].tolist()]
    whole = make(tmp_path).train_dataset
    assert [[t for t in row if t != 0] for row in inputs] == [[t for t in r if t != 0] for r in whole["input_ids"]]
    assert all(output.mass is not None for _, output in streamed.seen)


def test_a_document_that_packing_has_cut_is_named(tmp_path):
    rows = make(tmp_path).train_dataset
    history = record(tmp_path / "h.parquet", build(seed=2), rows=rows)
    longest = max(len(r) for r in rows["input_ids"])
    trainer = make(
        tmp_path, method="rel", history="recorded", history_store=history, packing=True, max_length=longest - 3
    )
    with pytest.raises(HistoryMissError):
        trainer.train()


def test_weights_of_the_data_that_trls_collator_drops_are_missed_loudly(tmp_path):
    rows = make(tmp_path).train_dataset
    rows = rows.map(lambda row: {"token_weights": [1.0] * len(row["input_ids"])})
    for packing in ({}, {"packing": True}):
        with pytest.raises(ValueError, match="drops the column token_weights.*skip_prepare_dataset"):
            make(tmp_path, rows, method="weighted", **packing)

    def collator(rows):
        batch = DataCollatorForSeq2Seq(TOKENIZER, return_tensors="pt")([{k: r[k] for k in names} for r in rows])
        width = batch["labels"].shape[1]
        batch["token_weights"] = torch.tensor([r["token_weights"] + [0.0] * (width - len(r["labels"])) for r in rows])
        return batch

    names = ("input_ids", "labels")
    kept = run(tmp_path, rows, method="weighted", data_collator=collator, dataset_kwargs={"skip_prepare_dataset": True})
    assert all("token_weights" in inputs for inputs, _ in kept.seen)
