"""Losses and weights on disk: the NLL (or weight) of every response token, in one Parquet file, by document."""

from tokensel.store.format import content_of, tokenizer_fingerprint
from tokensel.store.reader import HistoryMissError, HistoryStore, StoreReader
from tokensel.store.writer import HistoryWriter

__all__ = ["HistoryMissError", "HistoryStore", "HistoryWriter", "StoreReader", "content_of", "tokenizer_fingerprint"]
