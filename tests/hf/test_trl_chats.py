"""Every chat template that TRL ships: our labels beside TRL's assistant mask, and training by TRL on what is recorded.

TRL masks by a training version of a template, which has `{% generation %}` marks. By those, labels are TRL's mask. By
the template itself they end with the end-of-turn token; `chat_templates.TEMPLATES` says what TRL's mask has more.
"""

from __future__ import annotations

import functools
import json

import datasets
import pytest
from chat_templates import SYSTEM_REFUSED, TEMPLATES, make_chat_tokenizer, shipped
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_training import trl  # skips the module where TRL is not installed

from tokensel.cli import main
from tokensel.data import RowError
from tokensel.data.chat import encode_chat
from tokensel.sft import SelectiveSFTConfig, SelectiveSFTTrainer
from tokensel.store import HistoryMissError
from tokensel.testing import make_model

TEXTS = shipped()
TOKENIZER = make_chat_tokenizer()

USER, ANSWER, MORE, LAST = (
    {"role": role, "content": text}
    for role, text in (("user", "hi"), ("assistant", "yes"), ("user", "more"), ("assistant", "no"))
)
SYSTEM = {"role": "system", "content": "be"}
CALL = {"type": "function", "id": "abcdef123", "function": {"name": "add", "arguments": {"a": 1}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "add", "content": "2"}
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer", "description": "x"}}, "required": ["a"]}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": PARAMETERS}}]
CASES = {
    "one turn": ([USER, ANSWER], None),
    "two turns": ([USER, ANSWER, MORE, LAST], None),
    "a system message": ([SYSTEM, USER, ANSWER, MORE, LAST], None),
    "a tool call": ([USER, CALLS, RESULT, LAST], TOOLS),
}
PARTS = {"idefics3", "smolvlm", "llava_next"}  # templates that do not write a string


def answers(ids, trained):
    """The texts of the runs of trained tokens."""
    texts, run = [], []
    for token, mine in zip([*ids, 0], [*trained, False], strict=True):
        if mine:
            run.append(token)
        elif run:
            texts.append(TOKENIZER.decode(run))
            run = []
    return texts


def of(document):
    return answers(document.ids, [label != -100 for label in document.labels])


@functools.cache
def training_template(name):
    """The template that TRL takes for assistant_only_loss."""
    TOKENIZER.chat_template = TEXTS[name]
    return trl.chat_template_utils.get_training_chat_template(TOKENIZER) or TEXTS[name]


def of_trl(name, messages, tools):
    """(token ids, mask) as TRL's trainer has them."""
    template = training_template(name)
    if name in PARTS:
        messages = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    found = TOKENIZER.apply_chat_template(messages, tools=tools, chat_template=template, **options)
    return found["input_ids"], found["assistant_masks"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", TEXTS)
def test_labels_are_those_of_trl_but_for_what_stands_around_an_answer(name, case):
    messages, tools = CASES[case]
    expected = TEMPLATES[name]

    def encode(turns="each", chat_template=TEXTS[name], messages=messages):
        return encode_chat(0, messages, TOKENIZER, tools=tools, turns=turns, chat_template=chat_template)

    refused = expected.calls.startswith("refused") if tools else name in SYSTEM_REFUSED and SYSTEM in messages
    if refused:
        with pytest.raises(RowError, match="does not write messages|the chat template refuses"):
            encode()
        return
    if tools and name == "deepseekv3":  # it takes text, and TRL's version quotes that as JSON once more
        with pytest.raises(RowError, match="TypeError"):
            encode()
        call = CALL | {"function": {"name": "add", "arguments": '{"a": 1}'}}
        assert '{"a": 1}' in of(*encode(messages=[USER, CALLS | {"tool_calls": [call]}, RESULT, LAST]))[0]
        return
    documents = encode()
    rewritten = expected.rewrites and len(messages) > 2 and not (tools and name != "qwen3")
    assert len(documents) == (2 if rewritten else 1)
    if rewritten:
        (last,) = encode(turns="last")
        assert last == documents[-1]._replace(untrained=1)
    ours = [text for document in documents for text in of(document)]
    if not expected.trained:
        assert len(ours) == len(messages) // 2 and ours[-1].startswith(messages[-1]["content"])
        assert all(text.endswith(("<|eot_id|>", "<turn|>", "<|tool_response>")) for text in ours)
        with pytest.raises(ValueError, match="not training-compatible"):
            of_trl(name, messages, tools)
        return
    ids, mask = of_trl(name, messages, tools)
    theirs = answers(ids, mask)
    if name == "llava_next":
        theirs = [text.rstrip() for text in theirs]  # TRL 1.9 has a space there
    endings = [expected.after] * (len(ours) - 1) + [expected.after if expected.last is None else expected.last]
    if expected.only_ours and tools:
        assert ours[0].endswith(expected.only_ours)
        ours[0], endings[0] = ours[0].removesuffix(expected.only_ours), ""
    assert theirs == [expected.before + text + ending for text, ending in zip(ours, endings, strict=True)]
    if not rewritten and not (tools and name == "qwen3"):
        assert documents[0].ids == (ids[:-1] if name == "glm4moe" else ids)
    by_marks = encode(chat_template=training_template(name))
    assert by_marks == [(ids, [t if m else -100 for t, m in zip(ids, mask, strict=True)], [None] * len(ids), 0)]


@pytest.mark.parametrize("name", TEXTS)
def test_an_answer_begins_where_trl_lets_a_completion_begin(name):
    """TRL's completion mask: behind what the prompt with its generation prompt and the whole have in common."""
    messages = [USER, ANSWER]
    if name in PARTS:
        messages = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
    options = {"chat_template": TEXTS[name], "tokenize": True, "return_dict": False}
    prompt = TOKENIZER.apply_chat_template(messages[:1], add_generation_prompt=True, **options)
    whole = TOKENIZER.apply_chat_template(messages, **options)
    begin = next(i for i, token in enumerate(whole) if i == len(prompt) or token != prompt[i])
    (document,) = encode_chat(0, [USER, ANSWER], TOKENIZER, prompt_messages=1, chat_template=TEXTS[name])
    assert document.ids == whole
    assert [label != -100 for label in document.labels].index(True) == begin


def write_model(path, name):
    """A tiny model with the template as it is shipped."""
    tokenizer = make_chat_tokenizer(TEXTS[name])
    make_model(tokenizer, hidden_size=16, layers=1, heads=2, kv_heads=1, seed=0).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def score(model, rows, output, **settings):
    data = output.with_suffix(".jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {"model_name_or_path": model, "dataset_name": data, "output": output, "device": "cpu"} | settings
    return main(["score", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))])


def train(model, rows, output, history, **changes):
    args = SelectiveSFTConfig(
        output_dir=str(output),
        method="rel",
        history="recorded",
        history_store=str(history),
        **{"assistant_only_loss": True} | changes,
        max_steps=1,
        per_device_train_batch_size=2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
    )
    rows = datasets.Dataset.from_list(rows)
    trainer = SelectiveSFTTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        args,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.train()
    return trainer


ROWS = [{"messages": [USER, ANSWER, MORE, LAST]}, {"messages": [MORE, LAST]}]


@pytest.mark.parametrize("name", [name for name in ("qwen2_5", "gptoss", "qwen3", "llama3") if name in TEXTS])
def test_trl_trains_on_what_score_recorded_by_its_version_of_the_template(tmp_path, name, capsys):
    model = write_model(tmp_path / "model", name)
    store = tmp_path / "h.parquet"
    assert score(model, ROWS, store, chat_template="trl") == 0, capsys.readouterr().err
    trainer = train(model, ROWS, tmp_path / "run", store)
    logged = trainer.state.log_history[0]
    assert logged["rel_mean"] == pytest.approx(0, abs=1e-5)  # the history is the model as it is
    assert trainer.processing_class.chat_template == TEXTS[name]


@pytest.mark.skipif("llama3_2" not in TEXTS, reason="this TRL does not ship the template")
def test_trl_trains_completions_on_what_score_recorded_by_the_template_itself(tmp_path, capsys):
    """Of a template that TRL has no version of; its date would be another on the next day."""
    model = write_model(tmp_path / "model", "llama3_2")
    dated = {"chat_template_kwargs": {"date_string": "26 Jul 2024"}}
    rows = [
        {"prompt": [USER], "completion": [ANSWER]} | dated,
        {"prompt": [SYSTEM, MORE], "completion": [LAST]} | dated,
    ]
    assert score(model, rows, tmp_path / "h.parquet") == 0, capsys.readouterr().err
    trainer = train(model, rows, tmp_path / "run", tmp_path / "h.parquet", assistant_only_loss=False)
    assert trainer.state.log_history[0]["rel_mean"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name, problem", [("qwen3", "is not in the history store"), ("gptoss", "had none then")])
def test_a_store_of_another_template_is_named(tmp_path, name, problem, capsys):
    model = write_model(tmp_path / "model", name)
    store = tmp_path / "h.parquet"
    assert score(model, ROWS, store, turns="each") == 0, capsys.readouterr().err
    with pytest.raises(
        HistoryMissError, match=f"{problem}.* chats with turns='each' and another .*--chat_template trl"
    ):
        train(model, ROWS, tmp_path / "run", store)


def test_a_model_trained_by_trls_version_keeps_its_own_template(tmp_path, capsys):
    model = write_model(tmp_path / "model", "qwen3")
    store = tmp_path / "h.parquet"
    assert score(model, ROWS, store, chat_template="trl") == 0, capsys.readouterr().err
    run = {"model_name_or_path": model, "dataset_name": store.with_suffix(".jsonl"), "output_dir": tmp_path / "run"}
    run |= {"method": "rel", "history_store": store, "chat_template": "trl", "max_steps": 1, "use_cpu": "true"}
    run |= {"report_to": "none", "save_strategy": "no", "bf16": "false"}
    words = [part for name, value in run.items() for part in (f"--{name}", str(value))]
    assert main(["train", *words]) == 0, capsys.readouterr().err
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template == TEXTS["qwen3"]


def test_a_template_that_trl_has_no_version_of_is_named(tmp_path, capsys):
    model = write_model(tmp_path / "model", "qwen3")
    tokenizer = make_chat_tokenizer(TEXTS["qwen3"] + " ")
    tokenizer.save_pretrained(model)
    assert score(model, ROWS, tmp_path / "h.parquet", chat_template="trl") == 2
    assert "chat_template 'trl', but of the model's template: The chat template is not" in capsys.readouterr().err
