"""A model, its tokenizer and a dataset by their names, for the commands; what does not fit together is refused here."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tokensel.arguments import parse_mapping
from tokensel.data import EncodingCounts, RowError, encode_rows, load_rows, place_of_row
from tokensel.data.layouts import COLUMNS
from tokensel.data.rows import Names, are_files, shared, told
from tokensel.files import check_directory
from tokensel.settings import DataArguments, RunArguments, ScoreArguments
from tokensel.store import tokenizer_fingerprint


def load_tokenizer(settings: DataArguments) -> PreTrainedTokenizerBase:
    """The model's tokenizer; one without a padding token pads with EOS. A file of a chat template becomes its own.

    Raises:
        FileNotFoundError: `model_name_or_path` looks like a directory, and there is none, or no file `chat_template`.
    """
    check_directory("model_name_or_path", settings.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(settings.model_name_or_path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if settings.chat_template not in (None, "trl"):
        file = Path(settings.chat_template)  # type: ignore[arg-type]
        if not file.is_file():
            raise FileNotFoundError(
                errno.ENOENT, "chat_template is 'trl' or a Jinja file, which is not there", str(file)
            )
        tokenizer.chat_template = file.read_text(encoding="utf-8")
    return tokenizer


def chat_template_of(settings: DataArguments, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The template that chats go through. TRL's version is for training alone, so it stays out of the tokenizer.

    Raises:
        ValueError: TRL is not installed, or has no version of the model's template.
    """
    if settings.chat_template != "trl" or not tokenizer.chat_template:
        return tokenizer.chat_template
    try:
        from trl.chat_template_utils import get_training_chat_template
    except ImportError as error:
        raise ValueError("chat_template 'trl' needs TRL: pip install 'tokensel[trl]'") from error
    try:
        return get_training_chat_template(tokenizer) or tokenizer.chat_template
    except ValueError as error:
        raise ValueError(f"chat_template 'trl', but of the model's template: {error}") from error


def chat_of(settings: DataArguments, counts: EncodingCounts, tokenizer: PreTrainedTokenizerBase) -> dict | None:
    """How chats became tokens, for a store to tell; None where the rows hold none."""
    if not counts.chats:
        return None
    return {"template": chat_template_of(settings, tokenizer), "turns": settings.turns}


def load_model(settings: DataArguments) -> PreTrainedModel:
    """The causal language model.

    Raises:
        ValueError: its weights file is damaged.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(settings.model_name_or_path, dtype=settings.dtype)
    except SafetensorError as error:
        raise ValueError(f"{settings.model_name_or_path} holds a damaged weights file: {error}") from error


def load_contrast_model(settings: ScoreArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model of wrong answers.

    Raises:
        ValueError: its tokenizer is another.
    """
    name = settings.contrast_model_name_or_path
    check_directory("contrast_model_name_or_path", name)
    if tokenizer_fingerprint(AutoTokenizer.from_pretrained(name)) != tokenizer_fingerprint(tokenizer):
        raise ValueError(
            f"contrast_model_name_or_path {name} has another tokenizer than {settings.model_name_or_path}; a contrast "
            "is of two models with the same tokens"
        )
    assert name is not None
    return load_model(replace(settings, model_name_or_path=name))


def held_out(settings: RunArguments) -> tuple[Names, str] | None:
    """(name, split) of the rows to evaluate on; None without.

    Raises:
        ValueError: some of them are read from where the training rows are read.
    """
    if settings.eval_dataset_name is None and settings.eval_dataset_split is None:
        return None
    name: Names = settings.eval_dataset_name or settings.dataset_name
    split = settings.eval_dataset_split or ("train" if are_files(name) else settings.dataset_split)
    if both := shared((settings.dataset_name, settings.dataset_split), (name, split)):
        raise ValueError(
            f"{both} would be trained and held out; set eval_dataset_split to another split, or to a slice where the "
            "trained one has ended (train[:90%] and train[90%:]), or eval_dataset_name to other rows"
        )
    return name, split


def encode_dataset(
    settings: DataArguments,
    name: Names,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    streaming: bool = False,
    **weights: Any,
) -> tuple[datasets.Dataset, EncodingCounts]:
    """Rows of files or of a named dataset as token ids, and how many there were; prints the latter.

    Raises:
        ValueError: a row that cannot be encoded; says where it stands.
    """
    template = chat_template_of(settings, tokenizer)
    try:
        rows, counts = encode_rows(
            load_rows(name, split, streaming=streaming, columns=COLUMNS),
            tokenizer,
            settings.max_length,
            rejected_weight=settings.rejected_weight,
            role_names=parse_mapping("role_names", settings.role_names, "bot=assistant"),
            turns=settings.turns,
            chat_template=template if isinstance(template, str) else None,
            **weights,
        )
    except RowError as error:
        raise ValueError(f"{place_of_row(name, error.row, split)}: {error.reason}") from error
    if streaming:  # nothing has been read yet
        counts.longest = settings.max_length  # at most
    else:
        print(f"{told(name)}: {counts}", flush=True)
    return rows, counts


def check_fit(name: Names, counts: EncodingCounts, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Refuses what fails in the forward with an index error that names nothing, or, with rotary positions, not at all.

    Raises:
        ValueError: rows longer than the model has positions, or a token without an embedding.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and counts.longest > positions:
        raise ValueError(
            f"{told(name)} has rows of up to {counts.longest} tokens, but {model.name_or_path} has {positions} "
            f"positions; cut them with --max_length {positions}, or, if its positions reach further (YaRN and the "
            "like), raise max_position_embeddings in its config.json"
        )
    embeddings = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    needed = max(counts.largest_id, tokenizer.pad_token_id or 0)
    if needed >= embeddings:
        raise ValueError(
            f"token {needed} ({tokenizer.convert_ids_to_tokens(needed)!r}) has no embedding: {model.name_or_path} has "
            f"{embeddings}. The tokenizer belongs to another model, or tokens were added without "
            "model.resize_token_embeddings"
        )
