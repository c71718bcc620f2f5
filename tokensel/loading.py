"""A model, its tokenizer and a dataset by their names, for the commands; what does not fit together is refused here."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tokensel.arguments import parse_mapping
from tokensel.data import EncodingCounts, RowError, encode_rows, load_rows, place_of_row
from tokensel.data.layouts import COLUMNS
from tokensel.data.rows import Names, are_files, files_of, shared, told
from tokensel.files import check_directory, naming_model
from tokensel.model import apply_to
from tokensel.parallel import rank_of_ranks
from tokensel.settings import DataArguments, RunArguments, ScoreArguments
from tokensel.store import tokenizer_fingerprint


def load_tokenizer(settings: DataArguments) -> PreTrainedTokenizerBase:
    """The model's tokenizer; one without a padding token pads with EOS. A file of a chat template becomes its own.

    Raises:
        FileNotFoundError: `model_name_or_path` looks like a directory, and there is none, or no file `chat_template`.
        ValueError: its files or that file are damaged, or it brings code of its own.
    """
    tokenizer = _tokenizer("model_name_or_path", settings.model_name_or_path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if settings.chat_template not in (None, "trl"):
        file = Path(settings.chat_template)  # type: ignore[arg-type]
        if not file.is_file():
            raise FileNotFoundError(
                errno.ENOENT, "chat_template is 'trl' or a Jinja file, which is not there", str(file)
            )
        try:
            tokenizer.chat_template = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"chat_template {file} is no text: {error}") from error
    return tokenizer


def _tokenizer(setting: str, name: str | None) -> PreTrainedTokenizerBase:
    check_directory(setting, name)
    with naming_model(name):
        # said, not left out: transformers would ask, and take the "y" of whatever is piped in
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


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


def load_model(settings: DataArguments, **options: Any) -> PreTrainedModel:
    """The causal language model; options of `from_pretrained`.

    Raises:
        ValueError: its files are damaged, or it brings code of its own.
    """
    name, options = settings.model_name_or_path, {"dtype": settings.dtype, "trust_remote_code": False} | options
    with naming_model(name):
        return AutoModelForCausalLM.from_pretrained(name, **options)


def scoring_device(settings: ScoreArguments) -> str:
    """The device of this process, of settings that do not contradict each other.

    Raises:
        ValueError: they do, or a device that cannot be used, or more ranks than GPUs.
    """
    for one, other in itertools.combinations(("fully_shard", "device_map", "device"), 2):
        if getattr(settings, one) and getattr(settings, other):
            raise ValueError(f"{one} and {other} both say where the model is; give one")
    if settings.load_in_8bit and settings.load_in_4bit:
        raise ValueError("load_in_8bit and load_in_4bit contradict each other; give one")
    if settings.fully_shard and (settings.load_in_8bit or settings.load_in_4bit):
        raise ValueError("fully_shard spreads weights of 16 or 32 bits; give device_map='auto' with load_in_8bit")
    ranks = rank_of_ranks()[1]
    if settings.fully_shard and ranks == 1:
        raise ValueError(
            "fully_shard spreads the model over ranks; start them: torchrun --nproc_per_node=N -m tokensel score ..."
        )
    if settings.device_map and ranks > 1:
        raise ValueError("device_map spreads the model over the devices of one process; with ranks, give fully_shard")
    return _device(settings.device, ranks)


def load_scoring_model(settings: ScoreArguments, device: str) -> PreTrainedModel:
    """The model to score with, where it shall run."""
    bits = settings.load_in_8bit or settings.load_in_4bit
    options: dict[str, Any] = {}
    if bits:
        from transformers import BitsAndBytesConfig

        names = ("load_in_8bit", "load_in_4bit")
        options["quantization_config"] = BitsAndBytesConfig(**{name: getattr(settings, name) for name in names})
    if settings.device_map or bits:
        return load_model(settings, device_map=settings.device_map or device, **options)
    model = load_model(settings)
    return _spread(model, device) if settings.fully_shard else model.to(device)  # type: ignore[arg-type]


def load_scoring_models(
    settings: ScoreArguments, tokenizer: PreTrainedTokenizerBase, device: str
) -> dict[str, PreTrainedModel]:
    """The models that score, where they shall run: "", and of wrong answers "contrast_"."""
    models = {"": load_scoring_model(settings, device)}
    if settings.contrast_model_name_or_path:
        models["contrast_"] = load_contrast_model(settings, tokenizer).to(device)  # type: ignore[arg-type]
    return models


def _spread(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """The model, patched, its weights spread over the ranks layer by layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    apply_to(model, layer=None)  # before the head is sharded
    layers = {*model._no_split_modules} if model._no_split_modules else set()
    mesh = init_device_mesh(device.partition(":")[0], (rank_of_ranks()[1],))
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _device(name: str | None, ranks: int) -> str:
    """The device of this process; by default the GPU of its number, where there are any."""
    if name is None:
        name = "cpu"
        if torch.cuda.is_available():
            local = int(os.environ.get("LOCAL_RANK", "0")) if ranks > 1 else 0
            if local >= torch.cuda.device_count():
                raise ValueError(
                    f"rank {local} of this machine has no GPU: there are {torch.cuda.device_count()}. Start as many "
                    "ranks as GPUs (--nproc_per_node)"
                )
            name = f"cuda:{local}"
    try:
        torch.empty(0, device=name)
        if name.startswith("cuda"):
            torch.cuda.set_device(name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {error}") from error
    return name


@contextlib.contextmanager
def naming_what_fits() -> Iterator[None]:
    """Names the ways out where a device has too little memory.

    Raises:
        ValueError: it had.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{str(error).partition('. ')[0]}. What needs less: a smaller --tokens_per_batch, --dtype bfloat16, "
            "--load_in_8bit true or --load_in_4bit true; or spread the model: --device_map auto, or --fully_shard true "
            "under torchrun"
        ) from error


def first_token_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands before a response whose prompt is left out: BOS, or EOS where there is none."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def load_contrast_model(settings: ScoreArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model of wrong answers.

    Raises:
        ValueError: its tokenizer is another.
    """
    name = settings.contrast_model_name_or_path
    theirs = _tokenizer("contrast_model_name_or_path", name)
    if tokenizer_fingerprint(theirs) != tokenizer_fingerprint(tokenizer):
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


def encoding(settings: DataArguments, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The settings as arguments of `encode_rows`."""
    template = chat_template_of(settings, tokenizer)
    return {
        "max_length": settings.max_length,
        "rejected_weight": settings.rejected_weight,
        "role_names": parse_mapping("role_names", settings.role_names, "bot=assistant"),
        "turns": settings.turns,
        "chat_template": template if isinstance(template, str) else None,
    }


def encode_dataset(
    settings: DataArguments,
    name: Names,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    streaming: bool = False,
    **options: Any,
) -> tuple[datasets.Dataset, EncodingCounts]:
    """Rows of files or of a named dataset as token ids, and how many there were; prints the latter.

    Raises:
        ValueError: a row that cannot be encoded; says where it stands.
    """
    options = encoding(settings, tokenizer) | options
    try:
        rows, counts = encode_rows(load_rows(name, split, streaming=streaming, columns=COLUMNS), tokenizer, **options)
    except RowError as error:
        raise ValueError(f"{place_of_row(name, error.row, split)}: {error.reason}") from error
    if streaming:  # nothing has been read yet
        counts.longest = settings.max_length  # at most
    else:
        print(f"{told(name)}: {counts}", flush=True)
    return rows, counts


class EncodedRows:
    """The rows of a dataset to score as token ids, read and encoded while they are iterated over.

    Attributes:
        counts: what there was, once they have been.

    Raises:
        FileNotFoundError: at once, where there is no such file.
        ValueError: while iterating, a row that cannot be encoded, with its place; no row, or none with a response.
    """

    def __init__(self, settings: ScoreArguments, tokenizer: PreTrainedTokenizerBase) -> None:
        self.settings, self.tokenizer = settings, tokenizer
        self.counts = EncodingCounts()
        self._are_files = files_of(settings.dataset_name, settings.dataset_split) is not None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        settings, name, split = self.settings, self.settings.dataset_name, self.settings.dataset_split
        streaming = settings.dataset_streaming or self._are_files
        options = {"streaming": streaming, "both_answers": settings.both_answers, "weights": False}
        rows, self.counts = encode_dataset(settings, name, split, self.tokenizer, **options)
        try:
            yield from rows.select_columns(["input_ids", "labels"])
        except RowError as error:
            raise ValueError(f"{place_of_row(name, error.row, split)}: {self._reason(error)}") from error
        if not self.counts.rows:
            raise ValueError(f"{told(name)} has no rows; expected one JSON object a line")
        if not self.counts.documents:
            raise ValueError(
                f"none of the {self.counts.rows} rows has a response token within max_length={settings.max_length}; "
                "raise max_length or check the completions"
            )
        if streaming:
            print(f"{told(name)}: {self.counts}", flush=True)

    def _reason(self, error: RowError) -> str:
        """What is wrong with a row, told with the fields that nobody reads: a stream has left them out."""
        name, split, both = self.settings.dataset_name, self.settings.dataset_split, self.settings.both_answers
        if not self._are_files:
            return error.reason
        row = next(itertools.islice(load_rows(name, split, streaming=True), error.row, None))
        options = encoding(self.settings, self.tokenizer)
        try:
            encode_rows([row], self.tokenizer, weights=False, both_answers=both, **options)
        except RowError as told_whole:
            return told_whole.reason
        except ValueError:  # which speaks of all rows
            pass
        return error.reason
