"""A preference pair -> its two answers as documents, with the token ids that TRL's DPOTrainer (1.16) makes of them."""

from __future__ import annotations

from typing import Any

from tokensel.data.chat import Encoded, TemplatedChat, checked_messages, checked_tools
from tokensel.data.layouts import Chat, Text, common_length
from tokensel.data.rows import RowError
from tokensel.data.text import eos_of
from tokensel.documents import IGNORE_INDEX


def encode_pair(
    index: int, answers: list[Any], tokenizer: Any, row: dict[str, Any], chat_template: str | None = None
) -> list[Encoded]:
    """The chosen and the rejected answer, each behind the prompt, of their full length.

    Unlike elsewhere, prompt and answer are tokenised as one text, or rendered as one chat. The answers begin where the
    tokens of one of them first differ from those of the prompt alone, and all that follows is a response, as in TRL.

    Args:
        index: the row's number, for errors.
        answers: the chosen and the rejected one, as `read_row` gives a pair: two `Text` or two `Chat`.
        tokenizer: a transformers tokenizer; a fast one with a chat template for chats.
        row: of it `tools` and `chat_template_kwargs` reach the template.
        chat_template: another than the tokenizer's.
    Raises:
        RowError: an answer without content, equal answers, chats without a prompt, or a template that refuses them.
    """
    chats = isinstance(answers[0], Chat)
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if len(answer.messages) == answer.prompt_messages if chats else not answer.response:
            raise RowError(index, f"{name} has no answer behind the prompt; give one, or leave the row out")
    if answers[0][:2] == answers[1][:2]:
        raise RowError(index, "chosen and rejected are equal, so that neither is preferred; leave the row out")
    if not chats:
        prompt, *both = _ids_of_texts(answers, tokenizer)
    elif answers[0].prompt_messages:
        prompt, *both = _ids_of_chats(index, answers, tokenizer, row, chat_template)
    else:
        raise RowError(index, "chosen and rejected begin with different messages; give what both answer as prompt")
    begin = min(common_length(prompt, ids) for ids in both)
    return [Encoded(ids, [IGNORE_INDEX] * begin + ids[begin:], [None] * len(ids)) for ids in both]


def _ids_of_texts(answers: list[Text], tokenizer: Any) -> list[list[int]]:
    eos = tokenizer.convert_ids_to_tokens(eos_of(tokenizer))
    whole = [
        answer.prompt + answer.response + ("" if answer.response.endswith(eos) else eos)  # as text, where TRL puts it
        for answer in answers
    ]
    return [list(tokenizer(text, verbose=False)["input_ids"]) for text in (answers[0].prompt, *whole)]


def _ids_of_chats(
    index: int, answers: list[Chat], tokenizer: Any, row: dict[str, Any], chat_template: str | None
) -> list[list[int]]:
    tools, options = checked_tools(index, row.get("tools")), row.get("chat_template_kwargs")
    chosen, rejected = (
        TemplatedChat(index, checked_messages(index, answer.messages), tokenizer, tools, options, chat_template)
        for answer in answers
    )
    prompt = chosen.messages[: answers[0].prompt_messages]
    asked = [(chosen, prompt, True), (chosen, chosen.messages, False), (rejected, rejected.messages, False)]
    return [
        list(chat.apply(messages, tokenize=True, return_dict=True, add_generation_prompt=open_)["input_ids"])
        for chat, messages, open_ in asked
    ]
