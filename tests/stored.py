"""Documents whose losses are stored, and batches of them."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tokensel.store import HistoryWriter

LENGTHS = [5, 9, 2, 7, 3, 8]


def make_tokenizer(words=("a", "b", "c")):
    vocabulary = {word: i for i, word in enumerate(("<pad>", "<s>", "</s>", "<unk>", *words))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def make_documents():
    """(ids, labels, nll) of documents in which the first third is prompt."""
    generator = torch.Generator().manual_seed(0)
    documents = []
    for length in LENGTHS:
        ids = torch.randint(0, 50, (length,), generator=generator)
        labels = ids.clone()
        labels[: max(1, length // 3)] = -100
        documents.append((ids, labels, torch.rand(length, generator=generator) * 5))
    return documents


def padded(documents, side="right"):
    """(ids, labels, nll, key_mask), each [B, S]; padding is filled with values that must not be read."""
    width = max(len(ids) for ids, _, _ in documents)
    ids = torch.full((len(documents), width), 7)
    labels = torch.full_like(ids, -100)
    nll = torch.full(ids.shape, torch.nan)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, document in enumerate(documents):
        length = len(document[0])
        place = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, place], labels[row, place], nll[row, place] = document
        mask[row, place] = True
    return ids, labels, nll, mask


def write(path, documents, **options):
    ids, labels, nll, mask = padded(documents)
    with HistoryWriter(path, **options) as writer:
        writer.add(ids[:2], labels[:2], nll[:2], key_mask=mask[:2])
        writer.add(ids[2:], labels[2:], nll[2:], key_mask=mask[2:])
    return path
