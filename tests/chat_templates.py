"""The chat templates that TRL ships: how their response tokens are found, and what TRL's own mask has beside them.

`tests/hf/test_trl_chats.py` holds this table against the code and against TRL; `tools/write_docs.py` prints it.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


class Expected(NamedTuple):
    """Of a template without marks: TRL's mask of an answer is `before` + ours + `after`.

    TRL's mask is that of its training version of the template.
    """

    before: str = ""
    after: str = "\n"
    last: str | None = None  # `after` the last answer, where another
    marks: bool = False  # the template has them, and ours is TRL's mask
    rewrites: bool = False  # earlier answers
    calls: str = "yes"  # what becomes of tool calls
    only_ours: str = ""  # what ends a tool call in ours and not in TRL's mask
    trained: bool = True  # TRL has a training version; else it refuses to mask


NO_CALLS, ROLES = "refused: the template leaves them out", "refused by the template"
THINK = "<think>\n"
TEMPLATES = {
    "cohere": Expected(after="", calls=ROLES),
    "cohere2": Expected(after="", calls=ROLES),
    "deepseek_r1_distill": Expected("<｜Assistant｜>", after="", calls=NO_CALLS),
    "deepseekv3": Expected("<｜Assistant｜>", after="", calls="arguments as text; TRL's version quotes them"),
    "diffusion_gemma": Expected(only_ours="<|tool_response>"),
    "gemma": Expected(calls=ROLES),
    "gemma3": Expected(calls=ROLES),
    **{f"gemma4{version}": Expected(trained=False) for version in ("", "_v2", "_v3", "_v4", "_v5")},
    "glm4moe": Expected(after="", last="<|user|>"),
    "gptoss": Expected("<|start|>assistant", after=""),
    "idefics3": Expected(calls=NO_CALLS),
    "lfm2": Expected(calls=NO_CALLS),
    "lfm2_2_5": Expected(after="", marks=True),
    "lfm2_2_5_v2": Expected(after="", marks=True),
    "lfm2_2_5_vl": Expected(after="", marks=True),
    "lfm2_v2": Expected(),
    "llama3": Expected(after="", calls=NO_CALLS),
    "llama3_1": Expected(trained=False),
    "llama3_2": Expected(trained=False),
    "llava_next": Expected(after="", calls=ROLES),
    "muse_glimmer": Expected("<|start|>assistant", after=""),
    "nemotron_3_5_lightning": Expected("<think>"),
    "nemotron_3_nano": Expected("<think>"),
    "nemotron_3_super": Expected("<think>"),
    "nemotron_3_ultra": Expected("<think>"),
    "phi3": Expected(last="\n<eos>", calls=NO_CALLS),
    "phi3_5": Expected(last="\n<eos>", calls=NO_CALLS),
    "qwen2_5": Expected("\n"),
    "qwen2_5_vl": Expected(calls=NO_CALLS),
    "qwen3": Expected(rewrites=True),
    "qwen3_5_nothink": Expected("<think>\n\n</think>\n\n", rewrites=True),
    "qwen3_5_think": Expected(THINK, rewrites=True),
    "qwen3_6": Expected(THINK, rewrites=True),
    "qwen3_8": Expected(THINK),
    "qwen3_instruct_2507": Expected(),
    "qwen3_vl": Expected(),
    "smolvlm": Expected(calls=NO_CALLS),
}
SYSTEM_REFUSED = {"gemma"}

ADDED = "<think> </think> <tool_call> </tool_call>".split()
SPECIAL = (
    "<eos> <bos> </s> [INST] [/INST] [gMASK] <sop> <start_of_turn> <end_of_turn> <end_of_utterance> <|turn> <turn|> "
    "<|tool_call> <tool_call|> <|tool_response> <tool_response|> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> "
    "<|USER_TOKEN|> <|CHATBOT_TOKEN|> <|SYSTEM_TOKEN|> <|START_RESPONSE|> <|END_RESPONSE|> <|user|> <|assistant|> "
    "<|system|> <|observation|> <|end|> <|call|> <|return|> <|start|> <|channel|> <|message|> <|eot|> <|eot_id|> "
    "<|eom_id|> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|im_start|> <|im_end|> <|tool_call_start|> "
    "<|tool_call_end|> <｜User｜> <｜Assistant｜> <｜end▁of▁sentence｜> <｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> "
    "<｜tool▁call▁begin｜> <｜tool▁call▁end｜> <｜tool▁sep｜> <｜tool▁outputs▁begin｜> <｜tool▁outputs▁end｜>"
).split()


def make_chat_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Bytes, and the special tokens of all templates."""
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    tokenizer.add_tokens(ADDED)
    tokenizer.chat_template = chat_template
    return tokenizer


def shipped() -> dict[str, str]:
    """Name -> text of the templates above that the installed TRL has; none without TRL."""
    spec = find_spec("trl")
    folder = Path(spec.origin).parent / "chat_templates" if spec and spec.origin else Path("none")
    files = {name: folder / f"{name}.jinja" for name in TEMPLATES}
    return {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.exists()}


def table() -> str:
    """What the templates give, in Markdown; those of one outcome share a line."""
    lines: dict[tuple[str, str, str], list[str]] = {}
    for name, expected in TEMPLATES.items():
        lines.setdefault((_found(name, expected), expected.calls, _more(expected)), []).append(name)
    head = [
        "| TRL's template | response tokens reach | tool calls | TRL's mask has more |",
        "| --- | --- | --- | --- |",
    ]
    return "\n".join(head + [f"| {', '.join(names)} | {' | '.join(outcome)} |" for outcome, names in lines.items()])


def _found(name: str, expected: Expected) -> str:
    if expected.marks:
        return "as far as its generation marks"
    if name == "glm4moe":
        return "to the next role's token; the last answer has no end"
    return "to the end-of-turn token" + "; only the last answer, or a row for each" * expected.rewrites


def _more(expected: Expected) -> str:
    if not expected.trained:
        return "(TRL masks none)"
    places = {"before": expected.before, "behind": expected.after}
    if expected.last is not None:
        places["behind the last"] = expected.last
    more = [f"{where} `{_visible(text)}`" for where, text in places.items() if text]
    return ", ".join(more) or "nothing"


def _visible(text: str) -> str:
    return re.sub(r"\n", r"\\n", text).replace("|", "\\|")
