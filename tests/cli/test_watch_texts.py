"""The text that each token adds to those before it, whatever a tokenizer's decoder does to the first of all."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tokensel.report.watch import token_texts


def fast(tokenizer):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=True)


def byte_level(merges=()):
    """Every byte is a token, and what `merges`, pairs of characters of the byte alphabet, put together."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(m) for m in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return fast(tokenizer)


def llama_like(words):
    """As Llama 2's: the byte b is token b, words come after; the decoder takes the first space away."""
    vocabulary = {f"<0x{b:02X}>": b for b in range(256)} | {word: 256 + i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    steps = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence(list(steps))
    return fast(tokenizer)


TEXT = "Müller 👍 日本 . it 's 👍👍"


def test_a_character_of_several_bytes_is_its_last_tokens():
    tokenizer = byte_level()
    ids = tokenizer(TEXT)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(ids) == len(TEXT.encode()) and "".join(texts) == TEXT
    assert texts[:8] == ["M", "", "ü", "l", "l", "e", "r", " "] and texts[8:12] == ["", "", "", "👍"]
    assert "�" in "".join(tokenizer.decode([i]) for i in ids)


def test_tokens_that_end_within_a_character():
    """A space and an emoji's first byte, as in many vocabularies; a character's last byte and the next one's first."""
    space, one, two, three, four = tokens = byte_level().convert_ids_to_tokens(byte_level()(" 👍")["input_ids"])
    assert len(tokens) == 5
    tokenizer = byte_level([(space, one), (four, one)])
    text = " 👍👍👍!"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 11
    texts = token_texts(tokenizer, ids)
    assert texts == [" ", "", "", "👍", "", "", "👍", "", "", "👍", "!"]
    many = tokenizer(text[:-1] * 1 + "👍" * 50)["input_ids"]
    assert "".join(token_texts(tokenizer, many)) == tokenizer.decode(many)


def test_spaces_stay_where_the_decoder_takes_the_first_away():
    tokenizer = llama_like(["▁it", "▁is", "▁M", "ller", "▁"])
    it, is_, m, ller, space = range(256, 261)
    ids = [it, is_, m, *"ü".encode(), ller, space, *"👍".encode(), space, *"日本".encode()]
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == tokenizer.decode(ids) == "it is Müller 👍 日本"
    assert texts[:6] == ["it", " is", " M", "", "ü", "ller"]
    assert texts[6:] == [" ", "", "", "", "👍", " ", "", "", "日", "", "", "本"]


def test_spaces_before_punctuation_stay():
    words = ["it", "'s", "so", "."]
    tokenizer = fast(Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=".")))
    assert tokenizer.decode([0, 1, 2, 3]) == "it's so."  # the tidying that the tokenizer is set to
    assert token_texts(tokenizer, [0, 1, 2, 3]) == ["it", " 's", " so", " ."]


def test_bytes_that_are_no_text_swallow_none():
    tokenizer = byte_level()
    good, bad = tokenizer("👍")["input_ids"], tokenizer("👍")["input_ids"][3]
    word = tokenizer("word")["input_ids"]
    for count in (1, 2, 3, 4, 5, 9):
        texts = token_texts(tokenizer, [bad] * count + good + word)
        assert texts == ["�"] * count + ["", "", "", "👍", *"word"] or count < 4
        assert "".join(texts) == "�" * count + "👍word"
    assert token_texts(tokenizer, [bad, *word]) == ["�", *"word"]
    assert "".join(token_texts(tokenizer, [*word, *good[:2]])) == "word�"
    other = llama_like(["▁word"])
    assert "".join(token_texts(other, [0xFF, 0xFE, 256])) == "�� word"
    assert token_texts(other, [256, *[0xFF] * 6, 256])[0::7] == ["word", " word"]


def test_random_tokens_have_the_text_of_the_row():
    tokenizer = byte_level()
    for seed in range(20):
        ids = torch.randint(256, (200,), generator=torch.Generator().manual_seed(seed)).tolist()
        assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("text", ["日👍 word", "�"])
def test_a_long_row_is_decoded_in_short_pieces(text):
    tokenizer, pieces = byte_level(), []

    class Counting:
        def decode(self, ids, **options):
            pieces.append(len(ids))
            return tokenizer.decode(ids, **options)

    ids = tokenizer(text * (20_000 // len(text.encode())))["input_ids"]
    texts = token_texts(Counting(), ids)
    assert len(ids) > 19_000 and max(pieces) <= 12 and len(pieces) <= 3 * len(ids)
    if text != "�":
        assert "".join(texts) == tokenizer.decode(ids)
