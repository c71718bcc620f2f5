"""Both answers of preference pairs as documents: the tokens that TRL's DPOTrainer makes of them, recorded and found."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
from encoding import ids, labels, make_tokenizer, write
from oracles import next_token_nll

from tokensel.cli import main
from tokensel.data import RowError, encode_rows
from tokensel.documents import documents_of
from tokensel.store import HistoryStore
from tokensel.testing import make_model, make_rows
from tokensel.testing import make_tokenizer as subwords

SOME = make_rows(8, seed=5)
TOKENIZER = subwords(make_rows(60, seed=5), vocab_size=320)
TOKENIZER.chat_template = (  # its generation prompt goes on otherwise than a chat does, and a turn ends with a newline
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}{% if m.name %} by {{ m.name }}{% endif %}</s>\n"
    "{% endfor %}"
    "{% if tools %}{{ tools | length }}{% endif %}{{ style }}"
    "{% if add_generation_prompt %}<s>assistant\nHm{% endif %}"
)


def chat(*contents):
    return [
        {"role": role, "content": content} for role, content in zip(("user", "assistant") * 2, contents, strict=False)
    ]


TEXTS = [
    {"prompt": a["prompt"], "chosen": a["completion"], "rejected": b["completion"]}
    for a, b in zip(SOME[::2], SOME[1::2], strict=True)
]
PAIRS = {
    "texts": TEXTS,
    "a word goes on where the prompt ends": [
        {"prompt": (whole := row["prompt"] + row["chosen"])[:9], "chosen": whole[9:], "rejected": "s, or not"}
        for row in TEXTS
    ],
    "texts without a prompt": [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in TEXTS],
    "EOS is spelt out": [row | {"chosen": row["chosen"] + "</s>"} for row in TEXTS],
    "chats": [
        {"prompt": chat(row["prompt"]), **{name: chat("", row[name])[1:] for name in ("chosen", "rejected")}}
        for row in TEXTS
    ],
    "chats without a prompt": [
        {name: chat("Hello", "Yes?", row["prompt"], row[name]) for name in ("chosen", "rejected")} for row in TEXTS
    ],
    "chats with keys and tools": [
        {
            "prompt": [{"role": "user", "content": "Who?", "name": "Ada"}],
            **{name: chat("", row[name])[1:] for name in ("chosen", "rejected")},
            "tools": json.dumps([{"type": "function", "function": {"name": "f", "parameters": {}}}]),
            "chat_template_kwargs": {"style": "short"},
        }
        for row in TEXTS
    ],
}


def of_trl(kind, tmp_path, max_length=None):
    """TRL's trainer of the rows."""
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'tokensel[trl]'")
    if "text" not in kind and "EOS" not in kind and not hasattr(trl.data_utils, "common_prefix_length"):
        pytest.skip(
            f"TRL {trl.__version__} cuts answers at the length of the prompt's own tokens, which go on otherwise"
        )
    policy, reference = (make_model(TOKENIZER, hidden_size=16, layers=1, heads=2, kv_heads=1, seed=0) for _ in range(2))
    args = trl.DPOConfig(str(tmp_path / "out"), report_to="none", use_cpu=True, bf16=False, max_length=max_length)
    data = datasets.Dataset.from_list(PAIRS[kind])
    return trl.DPOTrainer(policy, reference, args, train_dataset=data, processing_class=TOKENIZER)


def trained(trainer):
    """The answers as its collator makes them."""
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        answers = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        for tokens, wanted, valid in zip(batch["input_ids"], answers, batch["attention_mask"].bool(), strict=True):
            yield {"input_ids": tokens[valid].tolist(), "labels": wanted[valid].tolist()}


@pytest.mark.parametrize("kind", PAIRS)
def test_both_answers_have_the_tokens_of_trls_trainer(tmp_path, kind):
    trainer = of_trl(kind, tmp_path)
    encoded, counts = encode_rows(PAIRS[kind], TOKENIZER, 256, both_answers=True)
    assert list(encoded) == list(trained(trainer))
    assert counts.layouts == {"pair": len(TEXTS)} and counts.documents == 2 * len(TEXTS)
    prompts = sorted({len(row["prompt_ids"]) for row in trainer.train_dataset})
    limit = (
        prompts[0] + 2 if len(prompts) == 1 else prompts[-1]
    )  # at which some prompts fill it, and some answers are cut
    cut, counts = encode_rows(PAIRS[kind], TOKENIZER, limit, both_answers=True)
    trainer = of_trl(kind, tmp_path, limit)
    assert list(cut) == list(trained(trainer)) and counts.truncated and counts.documents < 8 or len(prompts) == 1
    assert list(cut) == [document for row in trainer.train_dataset for document in documents_of(row, limit)]


USER, ANSWER = chat("a", "b")


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "a", "chosen": "b"}, r"rejected is missing \(chosen and rejected\)"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "rejected must be a string; got None"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "chosen has no answer behind the prompt; give one, or leave"),
        ({"chosen": "a b", "rejected": "a"}, "rejected has no answer behind the prompt"),
        ({"chosen": [USER, ANSWER], "rejected": [USER]}, "rejected has no answer behind the prompt"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "b"},
            "chosen and rejected are equal, so that neither is preferred",
        ),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}, "chosen and rejected are equal"),
        ({"chosen": [ANSWER], "rejected": [USER]}, "chosen and rejected begin with different messages"),
        (
            {"prompt": "a", "completion": "b"},
            "both_answers takes preference pairs .* but the row is a prompt and compl",
        ),
    ],
)
def test_a_row_that_is_no_pair_is_named(row, message):
    with pytest.raises(RowError, match=f"row 0: {message}"):
        encode_rows([row], make_tokenizer(), 64, both_answers=True)


def test_answers_begin_where_the_tokens_of_one_differ_from_the_prompts():
    (chosen, rejected), _ = encode_rows(
        [{"prompt": "a", "chosen": " b", "rejected": "b"}], make_tokenizer(), 64, both_answers=True
    )
    assert chosen == {"input_ids": ids("<s> a b </s>"), "labels": labels(". a b </s>")}  # "ab" is another word
    with pytest.raises(ValueError, match="both_answers and rejected_weight both make documents"):
        encode_rows([{}], make_tokenizer(), 64, both_answers=True, rejected_weight=-1.0)


def test_score_records_both_answers(tmp_path, capsys):
    model = make_model(TOKENIZER, hidden_size=16, layers=1, heads=2, kv_heads=1, seed=0)
    model.save_pretrained(tmp_path / "model"), TOKENIZER.save_pretrained(tmp_path / "model")
    rows = [*PAIRS["texts"], *PAIRS["chats"]]
    data = write(tmp_path / "pairs.jsonl", *map(json.dumps, rows))
    command = ["score", "--model_name_or_path", tmp_path / "model", "--dataset_name", data, "--max_length", 64]
    command = [str(word) for word in [*command, "--both_answers", "true", "--output", tmp_path / "r.parquet"]]
    assert main(command) == 0, capsys.readouterr().err
    assert "8 pair" in capsys.readouterr().out
    store = HistoryStore.open(tmp_path / "r.parquet", tokenizer=TOKENIZER)
    encoded, _ = encode_rows(rows, TOKENIZER, 64, both_answers=True)
    assert len(store) == len(encoded) == 16
    for row in encoded:
        tokens, wanted = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            expected = next_token_nll(model(tokens).logits[0].double(), tokens[0])
        response = wanted[0, 1:] != -100
        found = store.lookup(tokens, wanted)[0, 1:].double()
        torch.testing.assert_close(found[response], expected[response], rtol=1e-5, atol=1e-5)
    write(tmp_path / "pairs.jsonl", json.dumps(rows[0]), json.dumps(rows[0] | {"rejected": rows[0]["chosen"]}))
    assert main([*command[:-1], str(tmp_path / "s.parquet")]) == 2
    assert "pairs.jsonl:2: chosen and rejected are equal" in capsys.readouterr().err
