"""A prompt and a response as text -> token ids and labels."""

from __future__ import annotations

from typing import Any

from tokensel.documents import IGNORE_INDEX


def eos_of(tokenizer: Any) -> int:
    """The id of the token that ends a response.

    Raises:
        ValueError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so a response would have no end; set tokenizer.eos_token")
    return int(tokenizer.eos_token_id)


def encode_text(prompt: str, completion: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """(token ids, labels) of a prompt, and behind it a response that ends with EOS; each is tokenised by itself."""
    bos, eos = tokenizer.bos_token_id, eos_of(tokenizer)
    start = tokenizer(prompt, return_special_tokens_mask=True, verbose=False)
    ids, special = list(start["input_ids"]), start["special_tokens_mask"]
    # Some tokenizers close every text with EOS; a prompt goes on. EOS written in the prompt's own text stays,
    # and so does the only token of an empty prompt, which opens the document.
    if len(ids) > 1 and special[-1] and ids[-1] == eos:
        ids.pop()
    response = list(tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"])
    if response and response[-1] != eos:
        response.append(eos)
    # The text may spell out the BOS that the tokenizer puts at its start.
    if ids and special[0] and ids[0] == bos and [*ids, *response][1:2] == [bos]:
        del ids[0]
    return ids + response, [IGNORE_INDEX] * len(ids) + response
