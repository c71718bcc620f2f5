"""Instruction data whose noise is known token by token, a tokenizer, a small model and a trainer that counts what it
kept of the noise: all made here, seeded. Real ones are `docstring_rows` and `pretrained`.

Where noise was planted, how much of it a method keeps can be counted instead of guessed.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import DataCollatorForSeq2Seq, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tokensel.pretrained import pretrained as pretrained
from tokensel.trainer import SelectiveTrainer

NOISE_KINDS = ("none", "boilerplate", "random", "mixed", "swapped")
RANDOM_SHARE = 0.3  # of the response tokens of a row with random noise

_NAMES = "Ada Ben Chloe Dario Elif Farah Goran Hana Ivo Jun Kofi Lena Mara Nils Oya Pia Ravi Sora Tom Uma".split()
_THINGS = "apples pencils stamps marbles ribbons candles postcards buttons lemons shells coins seeds".split()
BOILERPLATE = (
    "As always, please remember to check every detail with a qualified expert before you act on it.",
    "Thank you for reaching out today; we hope that this reply has been of great value to you.",
    "For more information, kindly visit our help pages or contact the friendly support team.",
)
# Modules of every Python's standard library whose import does nothing else.
_MODULES = """abc argparse array ast asyncio base64 bdb binascii bisect builtins calendar cmath cmd code codecs codeop
collections collections.abc colorsys compileall concurrent.futures configparser contextlib contextvars copy copyreg csv
dataclasses datetime decimal difflib dis doctest email email.charset email.feedparser email.generator email.header
email.headerregistry email.message email.parser email.policy email.utils enum errno filecmp fileinput fnmatch fractions
ftplib functools gc getopt getpass gettext glob graphlib gzip hashlib heapq hmac html html.parser http.client
http.cookiejar http.cookies http.server imaplib importlib importlib.abc importlib.machinery importlib.metadata
importlib.resources importlib.util io ipaddress itertools json json.decoder json.encoder keyword linecache locale
logging logging.config logging.handlers mailbox marshal math mimetypes modulefinder multiprocessing
multiprocessing.managers multiprocessing.pool netrc numbers operator optparse os os.path pathlib pdb pickle pickletools
pkgutil platform plistlib poplib pprint profile pstats py_compile pyclbr pydoc queue quopri random re reprlib
rlcompleter runpy sched secrets select selectors shelve shlex shutil signal smtplib socket socketserver stat statistics
string stringprep struct subprocess symtable sys sysconfig tabnanny tarfile tempfile textwrap threading time timeit
tokenize trace traceback tracemalloc types typing unicodedata unittest unittest.case unittest.loader unittest.mock
unittest.result unittest.runner unittest.suite urllib.error urllib.parse urllib.request urllib.response
urllib.robotparser uuid venv warnings weakref webbrowser wsgiref.handlers wsgiref.headers wsgiref.simple_server
wsgiref.util xml.dom xml.dom.minidom xml.etree.ElementTree xml.sax xml.sax.handler xml.sax.saxutils xmlrpc.client
xmlrpc.server zipapp zipfile zipimport zlib zoneinfo""".split()
_WORDS = range(8, 91)  # of an answer


def make_rows(n: int, seed: int) -> list[dict]:
    """n rows of {"prompt", "completion"}: small worked problems whose answers follow from their prompts."""
    rng = random.Random(seed)
    tasks = (_shopping, _sorting, _sequence, _sharing, _conversion)
    return [dict(zip(("prompt", "completion"), rng.choice(tasks)(rng), strict=True)) for _ in range(n)]


def _shopping(rng: random.Random) -> tuple[str, str]:
    name, thing, a, b = rng.choice(_NAMES), rng.choice(_THINGS), rng.randint(2, 12), rng.randint(2, 9)
    return (
        f"{name} buys {a} {thing} at {b} euros each. What does {name} pay?\n",
        f"{name} buys {a} {thing}. Each one costs {b} euros. {a} times {b} is {a * b}. {name} pays {a * b} euros.",
    )


def _sorting(rng: random.Random) -> tuple[str, str]:
    numbers = rng.sample(range(1, 60), rng.randint(3, 5))
    low, high = sorted(numbers), max(numbers)
    listed = ", ".join(map(str, numbers))
    return (
        f"Sort these numbers from small to large: {listed}.\n",
        f"The smallest is {low[0]}. The largest is {high}. In order they are {', '.join(map(str, low))}.",
    )


def _sequence(rng: random.Random) -> tuple[str, str]:
    start, step = rng.randint(1, 20), rng.randint(2, 9)
    terms = [start + i * step for i in range(6)]
    return (
        f"Continue the sequence {terms[0]}, {terms[1]}, {terms[2]}.\n",
        f"From {terms[0]} to {terms[1]} it grows by {step}. The next terms are {terms[3]}, {terms[4]}, {terms[5]}.",
    )


def _sharing(rng: random.Random) -> tuple[str, str]:
    name, other, thing = *rng.sample(_NAMES, 2), rng.choice(_THINGS)
    had, gave = rng.randint(8, 30), rng.randint(1, 7)
    return (
        f"{name} has {had} {thing} and gives {gave} of them to {other}. How many {thing} are left?\n",
        f"{name} starts with {had} {thing}. {other} gets {gave} of them. {had} minus {gave} is {had - gave}. "
        f"{name} has {had - gave} {thing} left.",
    )


def _conversion(rng: random.Random) -> tuple[str, str]:
    unit, small, factor = rng.choice((("hours", "minutes", 60), ("metres", "centimetres", 100), ("weeks", "days", 7)))
    n = rng.randint(2, 12)
    return (
        f"How many {small} are {n} {unit}?\n",
        f"There are {factor} {small} in one of the {unit}. {n} times {factor} is {n * factor}. "
        f"So {n} {unit} are {n * factor} {small}.",
    )


def docstring_rows(seed: int = 0) -> list[dict]:
    """Real English that comes with every Python: {"messages": [question, answer]}, some 2,500 rows, shuffled.

    A row asks what a module, class, function or method of the standard library is or does. Its answer is the prose at
    the start of the docstring, 8 to 90 words of ASCII, none twice. Another release of Python gives other rows.

    Raises:
        ValueError: Python runs with -OO, which strips docstrings.
    """
    rows, answers = [], set()
    for name in _MODULES:
        for question, docstring in _questions(name, import_module(name)):
            answer = _first_prose(docstring)
            begins_well = answer[:1].isupper()  # not with a signature
            if begins_well and answer.isascii() and len(answer.split()) in _WORDS and answer not in answers:
                answers.add(answer)
                turns = {"user": question, "assistant": answer}
                rows.append({"messages": [{"role": role, "content": text} for role, text in turns.items()]})
    if not rows:
        raise ValueError("the standard library has no docstrings under `python -OO`; run Python without -OO")
    random.Random(seed).shuffle(rows)
    return rows


def _questions(name: str, module: ModuleType) -> Iterator[tuple[str, Any]]:
    """What can be asked of a module and what is public in it, each with its docstring."""
    yield f"What is the module `{name}` for?", module.__doc__
    members = vars(module)
    for key in sorted(getattr(module, "__all__", members)):
        value, path = members.get(key), f"{name}.{key}".removeprefix("builtins.")
        if key.startswith("_") or not hasattr(module, "__all__") and getattr(value, "__module__", name) != name:
            continue
        if inspect.isclass(value):
            yield f"What is the class `{path}`?", value.__doc__
            for inner, method in sorted(vars(value).items()):
                method = getattr(method, "__func__", method)  # of a classmethod or staticmethod
                if inspect.isroutine(method) and not inner.startswith("_") and _is_pythons(method):
                    yield f"What does `{path}.{inner}` do?", method.__doc__
        elif inspect.isroutine(value) and _is_pythons(value):
            yield f"What does `{path}` do?", value.__doc__


def _is_pythons(function: Any) -> bool:
    """Whether a function is the standard library's own, and not put there by another library, as some do."""
    return (getattr(function, "__module__", None) or "builtins").split(".")[0] in sys.stdlib_module_names


def _first_prose(docstring: Any) -> str:
    """The paragraphs that a docstring begins with, up to the first list, example or table, as one line."""
    prose: list[str] = []
    for paragraph in inspect.cleandoc(docstring).split("\n\n") if isinstance(docstring, str) else ():
        lines, words = paragraph.splitlines(), paragraph.split()
        unlike_prose = any(line.startswith((" ", ">>>", "-", "*", "=", ".. ", ":")) for line in lines)
        if unlike_prose or paragraph.rstrip().endswith(":") or len(prose) + len(words) >= _WORDS.stop:
            break
        prose += words
    return " ".join(prose)


def make_tokenizer(rows: list[dict], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `rows`, with <pad>, <s> (put in front) and </s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # the boilerplate too, so that a planted sentence is as many tokens as any other
    texts = [row["prompt"] + row["completion"] for row in rows] + list(BOILERPLATE)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int = 128,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    seed: int,
) -> LlamaForCausalLM:
    """A random Llama for `tokenizer`, float32, with at most 512 positions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=hidden_size,
                intermediate_size=hidden_size * 8 // 3,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=kv_heads,
                max_position_embeddings=512,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )


def plant_noise(
    rows: list[dict], tokenizer: PreTrainedTokenizerFast, *, kind: str, share: float, seed: int
) -> list[dict]:
    """Encodes rows and plants noise in their responses.

    Args:
        rows: as `make_rows` makes them, or chats, as `docstring_rows` makes them: the response is their last answer.
        kind: "boilerplate" puts one of three fixed sentences between two sentences of the response, "random" replaces
            30 % of the response tokens by uniformly drawn ones (never special), "mixed" does both, "swapped" gives the
            row another row's whole response, "none" does nothing.
        share: of the rows that get each kind, in [0, 1].
        seed: of every draw.
    Returns:
        Rows of `input_ids`, `labels` (-100 on the prompt) and `noise` (1 on planted tokens), lists of one length.
    Raises:
        ValueError: an unknown kind, a share outside [0, 1], a row without its texts, a single row to swap, or a chat
            whose template does not write its last answer behind the generation prompt as it is given; names the row.
    """
    if kind not in NOISE_KINDS:
        raise ValueError(f"kind must be one of {', '.join(NOISE_KINDS)}; got {kind!r}")
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1]; got {share}")
    if kind == "swapped" and share and len(rows) == 1:
        raise ValueError("rows[0]: there is no other row whose response it could get; give at least two rows")
    for number, row in enumerate(rows):
        _check_texts(number, row)
    rng = random.Random(seed)
    specials = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    words = sorted({*range(len(tokenizer))} - specials - {*tokenizer.all_special_ids})
    planted, parts = [], [_parts(number, row, tokenizer) for number, row in enumerate(rows)]
    for number, (prompt, completion, end) in enumerate(parts):
        pieces = [(completion, 0)]
        if kind in ("boilerplate", "mixed") and rng.random() < share:
            sentences = completion.split(". ")
            cut = len(". ".join(sentences[: rng.randint(1, max(1, len(sentences) - 1))])) + 1
            sentence = " " + rng.choice(BOILERPLATE)
            pieces = [(completion[:cut], 0), (sentence, 1), (completion[cut:], 0)]
        if kind == "swapped" and rng.random() < share:
            other = (number + rng.randrange(1, len(rows))) % len(rows)
            pieces = [(parts[other][1], 1)]
        response, noise = [], []
        for text, is_noise in pieces:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            response += ids
            noise += [is_noise] * len(ids)
        if kind in ("random", "mixed") and rng.random() < share:
            for place in rng.sample(range(len(response)), round(RANDOM_SHARE * len(response))):
                response[place], noise[place] = rng.choice(words), 1
        planted.append(
            {
                "input_ids": prompt + response + end,
                "labels": [-100] * len(prompt) + response + end[:1] + [-100] * len(end[1:]),
                "noise": [0] * len(prompt) + noise + [0] * len(end),
            }
        )
    return planted


def _check_texts(number: int, row: dict) -> None:
    """Refuses a row whose prompt, completion or turns are no texts."""
    texts = {f"the {name}": row.get(name) for name in ("prompt", "completion")}
    if "messages" in row:
        turns = row["messages"]
        if not isinstance(turns, list) or not turns:
            raise ValueError(f"rows[{number}]: messages must be a list of at least one turn; got {turns!r}")
        texts = {
            f"the {name} of messages[{i}]": turn.get(name) if isinstance(turn, dict) else None
            for i, turn in enumerate(turns)
            for name in ("role", "content")
        }
    for what, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"rows[{number}]: {what} must be a string; got {text!r}")


def _parts(number: int, row: dict, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], str, list[int]]:
    """Token ids of the prompt, the response's text, and the token ids that end it, the first of which is trained."""
    if "messages" not in row:
        return tokenizer(row["prompt"])["input_ids"], row["completion"], [tokenizer.eos_token_id]
    *before, answer = row["messages"]
    prompt = str(tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True))
    text, opened = str(tokenizer.apply_chat_template(row["messages"], tokenize=False)), prompt + answer["content"]
    if answer["role"] != "assistant" or not text.startswith(opened):
        raise ValueError(
            f"rows[{number}]: a chat must end with an assistant's answer that the chat template writes behind its "
            f"generation prompt as it is; got {text!r}"
        )
    start, end = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, text[len(opened) :]))
    return start, answer["content"], end


class PlantedNoiseTrainer(SelectiveTrainer):
    """Counts over the whole training: planted tokens, those of them that were kept, and all that were dropped."""

    planted = noise_kept = dropped = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self._noise = inputs.pop("noise").bool()
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def record_selection(self, inputs, output) -> None:
        super().record_selection(inputs, output)
        noise = self._noise & output.response
        self.planted += int(noise.sum())
        self.noise_kept += int((noise & (output.weights > 0)).sum())
        self.dropped += int((output.response & (output.weights <= 0)).sum())


@torch.no_grad()
def held_out_nll(trainer: SelectiveTrainer, rows) -> float:
    """Mean negative log-likelihood of the response tokens of clean rows, nats."""
    collate = DataCollatorForSeq2Seq(trainer.processing_class, return_tensors="pt")
    patched, total, count = trainer.model._tokensel_patched, 0.0, 0
    trainer.model.eval()
    for first in range(0, len(rows), 32):
        batch = collate([rows[i] for i in range(first, min(first + 32, len(rows)))]).to(trainer.args.device)
        labels = batch.pop("labels")
        nll = patched.token_nll({k: batch[k] for k in ("input_ids", "attention_mask")}, labels)
        total, count = total + float(nll.sum()), count + int((labels[:, 1:] != -100).sum())
    return total / count
