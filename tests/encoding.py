"""A tokenizer whose ids can be read, and rows encoded by it."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tokensel.data import encode_rows

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<bot>", "<go>", *"abcdefgh", "\n"]
ID = {word: i for i, word in enumerate(WORDS)}
CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}<user> {{ m.content }} "
    "{% else %}<bot> {{ m.content }} </s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)


def make_tokenizer(start="<s>", end="", chat_template=CHAT, eos="</s>"):
    """Words between spaces; a newline is a word of its own."""
    core = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", behavior="removed"),
            pre_tokenizers.Split("\n", behavior="isolated"),
        ]
    )
    pieces = f"{start} $A {end}".split()
    core.post_processor = processors.TemplateProcessing(
        single=pieces, special_tokens=[(word, ID[word]) for word in ("<s>", "</s>")]
    )
    core.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token=eos,
        unk_token="<unk>",
        pad_token="<pad>",
        chat_template=chat_template,
    )


def ids(text):
    return [ID[word] for word in text.split(" ")]


def labels(text):
    """`.` stands for -100."""
    return [-100 if word == "." else ID[word] for word in text.split(" ")]


def encode(row, max_length=64, tokenizer=None):
    encoded, _ = encode_rows([row], tokenizer or make_tokenizer(), max_length)
    return encoded[0]


def write(path, *lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def chat(*messages):
    return {"messages": [{"role": r, "content": c} | ({} if w is None else {"weight": w}) for r, c, w in messages]}
