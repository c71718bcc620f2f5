"""Chats: what reaches the template, and which of its tokens are trained."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
from encoding import CHAT, encode, ids, labels, make_tokenizer
from recorded import arguments

from tokensel.cli import main
from tokensel.data import EncodingCounts, RowError, encode_rows
from tokensel.data.chat import encode_chat
from tokensel.store import HistoryMissError, HistoryStore, HistoryWriter

USER, BOT = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
FOUR = [USER, BOT, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
CLOSED = CHAT.replace("</s> ", "</s> \n ")  # as ChatML: a newline behind the end of turn
# What a message has reaches the text: a name, reasoning, calls, and the tools before all
RICH = (
    "{% for t in tools or [] %}{{ t.name }} {% endfor %}{% for m in messages %}<{{ 'user' if m.role != 'assistant' "
    "else 'bot' }}> {% if m.name is defined %}{{ m.name }} {% endif %}"
    "{% if m.reasoning_content is defined %}{{ m.reasoning_content }} <go> {% endif %}"
    "{% if m.content %}{{ m.content }} {% endif %}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }} {% for k, v in c.function.arguments.items() %}"
    "{{ k }} {{ v }} {% endfor %}{% endfor %}</s> {% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
)
# Earlier turns lose their reasoning, as those of Qwen3
FORGETFUL = RICH.replace("is defined %}{{ m.reasoning", "is defined and loop.last %}{{ m.reasoning")
MARKED = CHAT.replace("<bot> {{ m.content }} </s>", "<bot> {% generation %}{{ m.content }} </s>{% endgeneration %}")


def call(**arguments):
    return {"type": "function", "function": {"name": "e", "arguments": arguments}}


def of(messages, template=CHAT, **options):
    return encode_chat(0, messages, make_tokenizer(chat_template=template), **options)


def one(messages, template=CHAT, **options):
    """(ids, labels) of the only document."""
    (document,) = of(messages, template, **options)
    return document.ids, document.labels


# What reaches the template


def test_calls_reasoning_names_and_tools_reach_the_template():
    messages = [
        USER | {"name": "h"},
        {"role": "assistant", "content": None, "reasoning_content": "c", "tool_calls": [call(f="g")]},
        {"role": "tool", "content": "d"},
        BOT,
    ]
    tools = [{"name": "e"}]
    row = {"messages": messages, "tools": tools}
    text = "e <user> h a </s> <bot> c <go> e f g </s> <user> d </s> <bot> b </s>"
    expected = {"input_ids": ids(text), "labels": labels(". . . . . . c <go> e f g </s> . . . . b </s>")}
    tokenizer = make_tokenizer(chat_template=RICH)
    assert encode(row, tokenizer=tokenizer) == expected
    assert encode(row | {"tools": json.dumps(tools)}, tokenizer=tokenizer) == expected
    assert encode(row | {"tools": []}, tokenizer=tokenizer)["input_ids"] == expected["input_ids"][1:]
    assert tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False) == ids(text)


def test_keys_that_arrow_fills_in_are_not_there():
    rows = [
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call(f="g")]}]},
        {"messages": [USER | {"name": "h"}, {"role": "assistant", "content": "", "tool_calls": [call(d="b")]}]},
        {"messages": [USER, BOT]},
    ]
    rows = datasets.Dataset.from_list(rows)
    filled = rows[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert filled == {"f": "g", "d": None} and rows[0]["messages"][0]["name"] is None
    encoded, _ = encode_rows(rows, make_tokenizer(chat_template=RICH), 64)
    assert encoded["input_ids"][:] == [
        ids("<user> a </s> <bot> e f g </s>"),
        ids("<user> h a </s> <bot> e d b </s>"),
        ids("<user> a </s> <bot> b </s>"),
    ]


def test_chats_that_differ_in_a_call_alone_are_two_documents():
    chats = [[USER, {"role": "assistant", "content": "", "tool_calls": [call(f=value)]}] for value in "gh"]
    assert one(chats[0], RICH) != one(chats[1], RICH)


def test_settings_of_the_template_come_with_the_row():
    template = CHAT.replace("<bot> {{ m.content }}", "<bot> {{ word }} {{ m.content }}")
    row = {"messages": [USER, BOT], "chat_template_kwargs": {"word": "h", "other": None}}
    assert encode(row, tokenizer=make_tokenizer(chat_template=template))["input_ids"] == ids("<user> a <bot> h b </s>")


def test_strings_become_parts_where_the_template_takes_only_those():
    template = CHAT.replace("{{ m.content }}", "{{ m.content[0].text }}")
    expected = (ids("<user> a <bot> b </s>"), labels(". . . b </s>"))
    assert one([USER, BOT], template) == expected
    parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in (USER, BOT)]
    assert one(parts, template) == expected


# Which tokens are trained


def test_the_newline_behind_the_end_of_turn_is_not_trained():
    found = one(FOUR, CLOSED)
    assert found == (
        ids("<user> a <bot> b </s> \n <user> c <bot> d </s> \n"),
        labels(". . . b </s> . . . . d </s> ."),
    )


def test_a_chat_that_begins_with_the_assistant_trains_neither_system_prompt_nor_header():
    system = CHAT.replace("{% for m in", "h g {% for m in", 1)  # which the template writes by itself
    assert one([BOT, USER, BOT], system) == (
        ids("h g <bot> b </s> <user> a <bot> b </s>"),
        labels(". . . b </s> . . . b </s>"),
    )


def test_a_template_without_generation_prompt_trains_no_header():
    template = CLOSED.partition("{% if add_generation_prompt")[0]
    assert one([USER, BOT], template)[1] == labels(". . . b </s> .")
    bare = "{% for m in messages %}{{ m.content }} {{ '</s> ' if m.role == 'assistant' }}{% endfor %}"
    assert one([USER, BOT], bare) == (ids("a b </s>"), labels(". b </s>"))


def test_a_generation_prompt_that_opens_a_block_is_not_the_answers():
    """Of a model that always reasons: the prompt opens a block that an answer without reasoning does not have."""
    template = CHAT.replace("%}<bot> {% endif %}", "%}<bot> <go> {% endif %}")
    assert one(FOUR, template)[1] == labels(". . . b </s> . . . d </s>")
    begins_alike = CHAT.replace("%}<bot> {% endif %}", "%}<bot> b c {% endif %}")
    assert one([USER, BOT], begins_alike)[1] == labels(". . . b </s>")


def test_a_plain_text_template_trains_up_to_the_next_turn():
    template = CHAT.replace("</s> ", "\n ")
    assert one(FOUR, template)[1] == labels(". . . b \n . . . d \n")


def test_what_closes_the_whole_chat_is_not_trained():
    closing = CHAT.replace("</s> ", "<go> \n ").replace("<bot> {% endif %}", "<bot> {% else %}</s>{% endif %}")
    tokenizer = make_tokenizer(chat_template=closing)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<go>"]})
    (document,) = encode_chat(0, FOUR, tokenizer)
    assert document.ids == ids("<user> a <bot> b <go> \n <user> c <bot> d <go> \n </s>")
    assert document.labels == labels(". . . b <go> . . . . d <go> . .")


def test_the_last_turn_may_end_with_another_token():
    """As GPT-OSS's, which returns where earlier turns end."""
    template = CHAT.replace("</s> ", "{{ '</s> ' if loop.last and not add_generation_prompt else '<go> ' }}")
    tokenizer = make_tokenizer(chat_template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<go>"]})
    (document,) = encode_chat(0, FOUR, tokenizer)
    assert document.labels == labels(". . . b <go> . . . d </s>")


def test_without_an_end_of_turn_the_next_roles_token_is_the_end():
    """As GLM's; the last answer has none."""
    tokenizer = make_tokenizer(chat_template=CHAT.replace("</s> ", ""))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<bot>"]})
    (document,) = encode_chat(0, FOUR, tokenizer)
    assert document.ids == ids("<user> a <bot> b <user> c <bot> d")
    assert document.labels == labels(". . . b <user> . . d")


@pytest.mark.parametrize("template", [CHAT, MARKED])
def test_messages_of_the_prompt_are_not_trained(template):
    assert one(FOUR, template, prompt_messages=2)[1] == labels(". . . . . . . . d </s>")
    assert one(FOUR, template)[1] == labels(". . . b </s> . . . d </s>")


def test_marks_are_followed_and_weighed_by_their_message():
    wide = MARKED.replace("<bot> {% generation %}", "{% generation %}<bot> ").replace("</s>{%", "</s> \n{%")
    messages = [USER, BOT | {"weight": 2}, USER, BOT, BOT | {"weight": 3}]
    (document,) = of(messages, wide)
    assert document.labels == labels(". . <bot> b </s> \n . . <bot> b </s> \n <bot> b </s> \n")
    assert document.weights == [None] * 2 + [2] * 4 + [None] * 6 + [3] * 4
    (document,) = of([USER, BOT, USER, BOT | {"weight": 0}], wide)
    assert document.weights == [None] * 8 + [0] * 4


# Templates that rewrite earlier turns


REASONED = [USER, BOT | {"reasoning_content": "e"}, FOUR[2], FOUR[3] | {"reasoning_content": "f"}]


def test_where_earlier_turns_are_rewritten_the_last_answer_is_trained():
    assert one(REASONED, FORGETFUL) == (
        ids("<user> a </s> <bot> b </s> <user> c </s> <bot> f <go> d </s>"),
        labels(". . . . . . . . . . f <go> d </s>"),
    )
    assert one([*REASONED, USER], FORGETFUL) == one(REASONED, FORGETFUL)
    assert one([*FOUR, USER], FORGETFUL)[1] == labels(". . . . b </s> . . . . d </s> . . .")  # nothing is rewritten


def test_a_prompt_that_is_rewritten_behind_an_answer_is_not_trained():
    """As GPT-OSS's, whose calls lose their reasoning once the last answer is there."""
    shown = "is defined and (loop.last or messages[-1].role == 'tool') %}{{ m.reasoning"
    late = RICH.replace("is defined %}{{ m.reasoning", shown)
    messages = [
        USER,
        {"role": "assistant", "content": "", "reasoning_content": "c", "tool_calls": [call(f="g")]},
        {"role": "tool", "content": "d"},
        BOT,
    ]
    for template in (late, late.partition("{% if add_generation_prompt")[0]):
        found = one(messages, template)
        assert found == (
            ids("<user> a </s> <bot> e f g </s> <user> d </s> <bot> b </s>"),
            labels(". . . . . . . . . . . . b </s>"),
        )


def test_an_answer_that_the_template_refuses_alone_is_left_out():
    """As Qwen3.5, which wants a message of the user's."""
    strict = (
        CHAT + "{{ '' if messages | selectattr('role', 'equalto', 'user') | list else raise_exception('no user') }}"
    )
    for turns in ("last", "each"):
        (document,) = of([BOT, USER, BOT], strict, turns=turns)
        assert document.labels == labels(". . . . . . b </s>") and document.untrained == 1
    with pytest.raises(RowError, match=r"refuses messages\[:1\]: TemplateError: no user"):
        of([BOT, USER], strict)


def test_each_answer_may_become_a_row():
    found = [(d.ids, d.labels) for d in of(REASONED, FORGETFUL, turns="each")]
    assert found == [
        (ids("<user> a </s> <bot> e <go> b </s>"), labels(". . . . e <go> b </s>")),
        one(REASONED, FORGETFUL),
    ]
    assert len(of(FOUR, FORGETFUL, turns="each")) == 1


def test_answers_left_out_and_rows_of_their_own_are_counted_and_told():
    rows = [{"messages": REASONED}, {"messages": FOUR}, {"messages": [USER, BOT, *REASONED]}]
    tokenizer = make_tokenizer(chat_template=FORGETFUL)
    encoded, counts = encode_rows(rows, tokenizer, 64)
    assert isinstance(counts, EncodingCounts) and len(encoded) == 3
    assert (counts.chats, counts.untrained_answers, counts.answers_as_rows) == (3, 3, 0)
    assert "earlier turns: 3 answers before the last are not trained (turns='each' makes a row of each)" in str(counts)
    encoded, counts = encode_rows(rows, tokenizer, 64, turns="each")
    assert len(encoded) == 6 and (counts.untrained_answers, counts.answers_as_rows) == (0, 3)
    assert "earlier turns: 3 answers before the last became rows of their own" in str(counts)
    assert "rewrites" not in str(encode_rows(rows[1:2], tokenizer, 64)[1])


# Bad input


GOT = "tools must be a list of JSON schemas, or that as JSON; got"


@pytest.mark.parametrize(
    "messages, tools, template, message",
    [
        ([USER, BOT], "e", CHAT, "tools must be a list of JSON schemas, or that as JSON; Expecting value"),
        ([USER, BOT], {"name": "e"}, CHAT, f"{GOT} dict"),
        ([USER, BOT], '{"name": "e"}', CHAT, f"{GOT} dict"),
        ([USER, BOT], ["e"], CHAT, f"{GOT} a list of str"),
        (
            [USER, BOT],
            None,
            CHAT + "{{ 1 + 'a' }}",
            r"refuses messages\[:2\]: TypeError: unsupported",
        ),
        ([USER, BOT], None, CHAT + "{{ raise_exception('no') }}", r"refuses messages\[:2\]: TemplateError: no"),
        (
            [USER, {"role": "assistant", "content": None}],
            None,
            CHAT,
            r"\[1\].content must be a string; got None",
        ),
        (
            [{"role": "user", "content": None, "tool_calls": [{}]}],
            None,
            CHAT,
            r"\[0\].content must .* got None",
        ),
        ([USER, {"role": "assistant", "content": ["b"]}], None, CHAT, r"messages\[1\].content must .* got list"),
        (
            [USER, BOT | {"tool_calls": "e"}],
            None,
            RICH,
            r"\[1\].tool_calls must be a list of mappings; got str",
        ),
        (
            [USER, BOT | {"content": "", "tool_calls": [call(f="g")]}],
            None,
            CHAT,
            r"does not write messages\[1\].tool_calls, so that an answer without them would be trained",
        ),
        ([USER, BOT | {"tool_calls": [call(f="g")]}], None, MARKED, r"does not write messages\[1\].tool_calls"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}]}, BOT],
            None,
            CHAT,
            r"messages\[0\].content is a list of parts, which the chat template does not take; give a string",
        ),
    ],
)
def test_what_cannot_be_a_chat_names_row_and_reason(messages, tools, template, message):
    with pytest.raises(RowError, match=f"row 7: .*{message}"):
        encode_chat(7, messages, make_tokenizer(chat_template=template), tools=tools)


def test_other_settings_are_named():
    with pytest.raises(RowError, match="chat_template_kwargs must be a mapping; got str"):
        of([USER, BOT], template_kwargs="a")
    with pytest.raises(ValueError, match="turns must be one of last, each; got 'all'"):
        encode_rows([{"messages": FOUR}], make_tokenizer(), 64, turns="all")


# A template of the user's, for a model without one


def test_a_file_of_a_template_is_taken_and_a_store_tells_it(tmp_path, model_dir, capsys):
    data, template = tmp_path / "x.jsonl", tmp_path / "x.jinja"
    data.write_text(json.dumps({"messages": FOUR}) + "\n", encoding="utf-8")
    template.write_text(CHAT, encoding="utf-8")
    assert main(arguments(model_dir, data, tmp_path / "h.parquet")) == 2
    assert "set tokenizer.chat_template, or --chat_template FILE" in capsys.readouterr().err
    settings = {"chat_template": template, "turns": "each"}
    assert main(arguments(model_dir, data, tmp_path / "h.parquet", **settings)) == 0
    store = HistoryStore.open(tmp_path / "h.parquet")
    assert store.metadata["chat"] == {"template": CHAT, "turns": "each"}
    assert main(arguments(model_dir, data, tmp_path / "i.parquet", chat_template=tmp_path / "none.jinja")) == 2
    error = capsys.readouterr().err
    assert "chat_template is 'trl' or a Jinja file, which is not there" in error and str(tmp_path) in error


@pytest.mark.parametrize(
    "template, said",
    [
        (CHAT, ""),
        (CLOSED, " and another chat template than this run's .*--chat_template trl\\)"),
        (CHAT + "{{ strftime_now('%Y') }}", " and a template that writes the day's date .*chat_template_kwargs\\)"),
    ],
)
def test_a_missing_document_names_the_settings_of_chats(tmp_path, template, said):
    tokens = torch.tensor([[5, 6, 7]])
    chat = {"template": template, "turns": "last"}
    with HistoryWriter(tmp_path / "h.parquet", chat=chat) as writer:
        writer.add(tokens, tokens, torch.ones(1, 3))
    own = template if "strftime" in template else CHAT
    store = HistoryStore.open(tmp_path / "h.parquet", tokenizer=make_tokenizer(chat_template=own))
    told = f"max_length None, chats with turns='last'{said}. Run .* chat template, turns"
    with pytest.raises(HistoryMissError, match=told):
        store.lookup(tokens + 1, tokens)
