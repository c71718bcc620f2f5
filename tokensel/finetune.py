"""Fine-tuning by settings alone: what `tokensel train` does."""

from __future__ import annotations

from pathlib import Path

from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, set_seed

from tokensel.arguments import SelectiveTrainingArguments
from tokensel.data import SelectionCollator
from tokensel.data.rows import told
from tokensel.loading import chat_template_of, encode_dataset, held_out, load_model, load_tokenizer
from tokensel.metrics import peak_memory_mib
from tokensel.model_facts import check_fit, limits_of
from tokensel.settings import RunArguments
from tokensel.trainer import SelectiveTrainer


def last_complete_checkpoint(output_dir: str) -> str:
    """The newest checkpoint that was written to its end: the trainer's state is the last file of one.

    Raises:
        FileNotFoundError: there is none.
    """
    numbered = (p for p in Path(output_dir).glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdecimal())
    complete = [p for p in numbered if (p / "trainer_state.json").is_file()]
    if not complete:
        raise FileNotFoundError(f"{output_dir} holds no complete checkpoint to resume from")
    return str(max(complete, key=lambda p: int(p.name.removeprefix("checkpoint-"))))


def train(settings: RunArguments, arguments: SelectiveTrainingArguments) -> dict[str, float]:
    """Fine-tunes with token selection and saves the model (or adapter) to `output_dir` -> the metrics."""
    assert arguments.output_dir is not None  # a required setting

    method = arguments.build_method()  # a wrong name should not have to wait for the model to load
    checkpoint = arguments.resume_from_checkpoint
    if checkpoint == "last":
        checkpoint = last_complete_checkpoint(arguments.output_dir)
    elif checkpoint is None and any(Path(arguments.output_dir).glob("checkpoint-*")):
        raise ValueError(
            f"output_dir {arguments.output_dir} already holds checkpoints; go on with --resume_from_checkpoint last "
            "or choose another output_dir"
        )
    set_seed(arguments.seed)
    tokenizer = load_tokenizer(settings)
    read = [(settings.dataset_name, settings.dataset_split), *filter(None, [held_out(settings)])]
    weights = {"prompt_weight": settings.prompt_weight, "response_weight": settings.response_weight}
    stream = settings.dataset_streaming
    encoded = [encode_dataset(settings, name, split, tokenizer, stream, **weights) for name, split in read]
    model = load_model(settings)
    limits = limits_of(model)
    for (name, _), (_, counts) in zip(read, encoded, strict=True):
        check_fit(told(name), counts.longest, counts.largest_id, limits, tokenizer)
    if settings.use_peft:
        from peft import LoraConfig, get_peft_model

        targets = settings.lora_target_modules
        lora = LoraConfig(
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=targets if targets == "all-linear" else targets.split(","),
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora)  # type: ignore[assignment]
        if arguments.gradient_checkpointing:
            model.enable_input_require_grads()
    (rows, counts), *rest = encoded
    evaluated = rest[0][0].select_columns(["input_ids", "labels"]) if rest else None
    packed = DataCollatorWithFlattening(return_tensors="pt")
    collator = packed if settings.packing else DataCollatorForSeq2Seq(tokenizer, return_tensors="pt")
    trainer = SelectiveTrainer(
        model,
        arguments,
        data_collator=SelectionCollator(collator),
        train_dataset=rows,
        eval_dataset=evaluated,
        processing_class=tokenizer,
        method=method,
    )
    for store in trainer.recorded.values():
        store.chat_template = chat_template_of(settings, tokenizer)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    if stream:
        print(f"{told(settings.dataset_name)}: {counts}", flush=True)
    trainer.save_model()
    trainer.save_state()
    metrics = dict(result.metrics)
    if evaluated is not None:
        metrics |= trainer.evaluate()
    metrics |= trainer.selection_totals()
    metrics["peak_memory_mib"] = peak_memory_mib(str(trainer.args.device))
    trainer.save_metrics("all", metrics)
    steps = trainer.state.global_step
    held = f"held-out loss {metrics['eval_loss']:.4f}, " if evaluated is not None else ""
    print(
        f"{arguments.output_dir}: {steps} steps, train loss {metrics['train_loss']:.4f}, {held}"
        f"kept {metrics['kept_share']:.1%} of {metrics['responses']:.0f} response tokens, "
        f"{metrics['tokens_per_second']:.0f} tokens/s, peak memory {metrics['peak_memory_mib']:.0f} MiB"
    )
    return metrics
