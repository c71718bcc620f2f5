"""The study of pretrained models, on a tiny one that is made here: its rows, frozen layers, worlds and trainings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tokensel
from benchmarks.quality import real, real_answers, real_worlds
from benchmarks.quality.real_rows import KINDS, make_parts
from benchmarks.quality.real_worlds import FrozenBelow, Recipe, freeze_below, restore_below
from tokensel.testing import BOILERPLATE


def noisy(row):
    return [place for place, noise in enumerate(row["noise"]) if noise]


# The rows


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_rows_stay_out_and_every_seed_has_its_own(sources, kind):
    first, again, other = (make_parts(kind, seed, sources) for seed in (0, 0, 1))
    ids = [[row["input_ids"] for row in part] for part in (first.train, first.reference, first.held_out)]
    for part in ids[:2]:
        assert part and not [row for row in part if row in ids[2]]
    assert not [row for row in ids[0] if row in ids[1]]
    assert first == again and first.held_out == other.held_out and first.train != other.train
    assert len(first.train) == KINDS[kind].rows
    for row in first.train:
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["noise"])
        assert all(row["labels"][place] == row["input_ids"][place] for place in noisy(row))


@pytest.mark.parametrize(
    ("kind", "of_rows", "share"), [("random", 0.5, 0.3), ("scattered", 1, 0.15), ("docs", 0.5, 0.3), ("own", 0.5, 0.3)]
)
def test_replaced_tokens_are_marked_and_nothing_else_changes(sources, kind, of_rows, share):
    parts = make_parts(kind, 3, sources)
    clean = {tuple(without(row, row)): row for row in sources.rows(KINDS[kind].source)}
    special, hit = set(sources.tokenizer.all_special_ids), 0
    for row in parts.train:
        length = len(row["labels"])
        before = next(
            other for other in clean.values()
            if len(other["labels"]) == length and without(other, row) == without(row, row)
        )  # fmt: skip
        answer = [place for place, label in enumerate(before["labels"]) if label != -100][:-1]
        places = noisy(row)
        assert set(places) <= set(answer) and len(places) in (0, round(share * len(answer)))
        assert not special & {row["input_ids"][place] for place in places}
        hit += any(row["input_ids"][place] != before["input_ids"][place] for place in places)
    assert abs(hit / len(parts.train) - of_rows) < 0.25 and (of_rows < 1 or hit == len(parts.train))
    assert not any(noisy(row) for row in make_parts("clean", 3, sources).train)


def without(row, marks):
    return [token for token, noise in zip(row["input_ids"], marks.get("noise", [0] * 999), strict=False) if not noise]


def test_boilerplate_is_one_sentence_beside_the_lines_of_an_answer(sources):
    rows, clean = (make_parts(kind, 0, sources).train for kind in ("boilerplate", "clean"))
    known = {tuple(row["input_ids"]) for row in sources.rows("problems")}
    said = [sources.tokenizer.decode([row["input_ids"][place] for place in noisy(row)]) for row in rows]
    assert {text.strip() for text in said} == {"", *BOILERPLATE} and not any(noisy(row) for row in clean)
    assert 0.5 < sum(map(bool, said)) / len(rows) < 0.9
    assert all(tuple(without(row, row)) in known for row in rows)


def test_wrong_answers_are_noise_as_a_whole_and_half_of_the_rows(sources):
    rows = make_parts("written", 0, sources).train
    for row in rows:
        answer = sources.tokenizer.decode([label for label in row["labels"] if label != -100])
        marked = [place for place, label in enumerate(row["labels"]) if label != -100] if "wrong" in answer else []
        assert noisy(row) == marked
    assert sum(bool(noisy(row)) for row in rows) == len(rows) // 2


def test_of_a_poor_chat_one_answer_is_noise_and_the_other_is_its_problems(sources):
    rows = make_parts("chats", 0, sources).train
    answers = {row["question"]: row["answer"] for row in sources.rows("problems")}
    poor = 0
    for row in rows:
        text = sources.tokenizer.decode(row["input_ids"]).replace("</s>\n", "")
        turns = [turn.partition("\n")[2] for turn in text.split("<s>")[1:]]
        good = [answers[question] == answer for question, answer in zip(turns[::2], turns[1::2], strict=True)]
        marked = sources.tokenizer.decode([row["input_ids"][place] for place in noisy(row)])
        if noisy(row):
            assert marked.removesuffix("</s>") in (turns[1], turns[3]) and sum(good) >= 1
            place = turns.index(marked.removesuffix("</s>"))
            assert answers[turns[place - 1]] != turns[place]
        else:
            assert all(good)
        poor += bool(noisy(row))
    assert 0.4 < poor / len(rows) < 0.8


# The frozen layers


@pytest.fixture
def batch(made):
    """Ragged rows, padded on the right; one ends in the pad token itself."""
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    rows = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17, tokenizer.pad_token_id]]
    ids = torch.full((3, 6), tokenizer.pad_token_id)
    mask = torch.zeros(3, 6, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def load(made):
    return AutoModelForCausalLM.from_pretrained(made / "model", dtype=torch.float32)


def test_frozen_layers_and_what_is_kept_of_them_give_the_whole_models_logits(made, batch, tmp_path):
    whole, model = load(made), load(made)
    below = freeze_below(model, 2, batch["input_ids"][1, -1].item())
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = whole(**batch).logits[mask]
        torch.testing.assert_close(model(**batch).logits[mask], expected, rtol=1e-5, atol=1e-6)
        below._lower = ()  # nothing is computed anew
        torch.testing.assert_close(model(**batch).logits[mask], expected, rtol=1e-5, atol=1e-6)
    assert len(model.model.layers) == 1
    below.save(tmp_path / "states.safetensors")
    again = load(made)
    kept = freeze_below(again, 2, below.pad)
    kept.load(tmp_path / "states.safetensors")
    kept._lower = ()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits[mask], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adapters", [False, True])
def test_training_above_frozen_layers_is_training_the_same_layers_of_the_whole_model(made, batch, adapters):
    from peft import LoraConfig, get_peft_model

    losses, models = [], []
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for frozen in (False, True):
        model = load(made)
        if frozen:
            freeze_below(model, 2, batch["input_ids"][1, -1].item())
        else:
            model.model.embed_tokens.requires_grad_(False)
            model.model.layers[:2].requires_grad_(False)
        if adapters:
            torch.manual_seed(1)
            upper = 0 if frozen else 2
            target = rf".*layers\.{upper}\..*_proj"
            model = get_peft_model(model, LoraConfig(r=2, target_modules=target))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        tokensel.apply_to(model)
        losses.append([])
        for _ in range(4):
            loss = model(**batch, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
        models.append(restore_below(model))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0] - 0.01
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        one, other = (model.eval()(**batch).logits[mask] for model in models)
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert len(models[1].model.layers) == 3 and not isinstance(models[1].model.embed_tokens, FrozenBelow)


# A world and its trainings


@pytest.fixture
def world(made, sources, tmp_path):
    parts = make_parts("random", 0, sources)
    return real_worlds.build_world(tmp_path / "world", parts, sources.rows("docs")[:4], made / "model", 2, 0)


def test_oracle_leaves_out_the_noise_alone_and_full_nothing(world):
    for recipe, clean_kept, noise_kept in ((Recipe("full", {}, drop_noise=True), 1, 0), (Recipe("full", {}), 1, 1)):
        run = real_worlds.measure(world, recipe, 4)
        assert (run["clean_kept"], run["noise_kept"]) == (clean_kept, noise_kept)
        assert [tokens for tokens, _ in run["curve"]] == sorted(tokens for tokens, _ in run["curve"])
        assert len(run["curve"]) == 3 and run["nll"] == run["curve"][-1][1]
    tokens = sum(label != -100 for row in world.rows("train") for label in row["labels"])
    assert run["curve"][-1][0] == tokens and run["elsewhere"] > 0


def test_a_clean_reference_is_trained_once_and_when_it_is_asked_for(world, monkeypatch):
    def nobody(*arguments, **settings):
        raise AssertionError("trained again")

    assert "reference_nll" not in world.rows("train")[0] and not (world.folder / "reference_nll.json").exists()
    real_worlds.measure(world, Recipe("rho1", {}), 4)
    trained, rows = real_worlds.train, world.rows("train")
    monkeypatch.setattr(real_worlds, "train", nobody)
    known = real_worlds.with_reference(world, rows)
    assert all(len(row["reference_nll"]) == len(row["labels"]) for row in known)
    monkeypatch.setattr(real_worlds, "train", trained)
    (world.folder / "reference_nll.json").unlink()
    clean = [{"noise": [0] * len(row["labels"])} | row for row in world.rows("reference")]
    reference, _ = trained(world, real_worlds.REFERENCE, 4, rows=clean)
    assert [row["reference_nll"] for row in known] == real_worlds.row_losses(reference, rows, world.tokenizer)


def test_a_method_of_the_whole_dataset_ranks_all_rows_together(world):
    rows = real_worlds.with_reference(world, world.rows("train"))
    weighted = real_worlds.chosen_over_all(
        [row | {"question": "how many?"} for row in rows], tokensel.methods.get("token_cleaning")
    )
    scores = {
        (i, place): row["base_nll"][place] - row["reference_nll"][place]
        for i, row in enumerate(rows)
        for place, label in enumerate(row["labels"])
        if label != -100
    }
    kept = {(i, p) for i, row in enumerate(weighted) for p, weight in enumerate(row["token_weights"]) if weight}
    best = sorted(scores, key=scores.get, reverse=True)[: len(kept)]
    assert kept == set(best) and len(kept) == pytest.approx(0.6 * len(scores), abs=1)
    shares = [sum(row["token_weights"]) / sum(label != -100 for label in row["labels"]) for row in weighted]
    assert max(shares) - min(shares) > 0.1
    assert real_worlds.measure(world, Recipe("token_cleaning", {}), 4)["kept"] == pytest.approx(0.6, abs=0.01)


def test_a_world_is_whole_or_not_there(made, sources, tmp_path, monkeypatch):
    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    arguments = (make_parts("random", 0, sources), [], made / "model", 2, 0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(real_worlds, "row_losses", interrupted)
        real_worlds.build_world(tmp_path / "w", *arguments)
    assert not list(tmp_path.iterdir())
    assert real_worlds.build_world(tmp_path / "w", *arguments).rows("train")
    study = copy_of_study(made, tmp_path)
    models = (made / name for name in ("model", "other", "model"))
    folders = {real.world_arguments(study, "random", 0, sources, model)[0] for model in models}
    sources.rows("problems").pop()
    folders.add(real.world_arguments(study, "random", 0, sources, made / "model")[0])
    monkeypatch.setattr(real, "REFERENCE", replace(real_worlds.REFERENCE, rate=1e-3))
    assert len(folders | {real.world_arguments(study, "random", 0, sources, made / "model")[0]}) == 4


def copy_of_study(made, tmp_path):
    return real.RealStudy(
        "smollm2", made / "problems.jsonl", made / "solutions.jsonl", tmp_path, 1, 1, ("random",), ("full",)
    )


# Answers


def test_the_number_of_an_answer_is_behind_its_mark_or_the_last():
    number = real_answers.final_number
    assert number("3 and 4\n#### 1,234 apples of 5") == 1234 and number("#### 5\n#### -6.50") == -6.5
    assert number("so 3, then 4.") == 4 and number("none") is None and number("7 ####") is None


def test_answers_are_what_the_whole_trained_model_says_token_by_token(made, world):
    patched, _ = real_worlds.train(world, Recipe("full", {}, rate=5e-4), 4)
    model = restore_below(patched.model)
    for name, weight in model.named_parameters():
        if "proj" in name:
            weight.data *= 5  # what it says depends on what it reads
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))  # and is not that again
    rows, tokenizer = world.rows("held_out")[:3], world.tokenizer
    said = real_answers.answers(model, rows, world.tokenizer, 12)
    assert len(set(said)) == 3
    for row, text in zip(rows, said, strict=True):
        ids = real_answers.prompt(row)
        assert tokenizer.decode(ids).endswith("<s>assistant\n") and row["question"].strip() in tokenizer.decode(ids)
        start = len(ids)
        while len(ids) < start + 12 and ids[-1] != tokenizer.eos_token_id or len(ids) == start:
            with torch.no_grad():
                ids = [*ids, model(torch.tensor([ids])).logits[0, -1].argmax().item()]
        assert tokenizer.decode(ids[start:], skip_special_tokens=True) == text
    assert not hasattr(model, "_tokensel_patched")


def test_right_answers_are_counted_on_the_base_and_after_training(world, monkeypatch):
    monkeypatch.setattr(real_answers, "answers", lambda model, rows, _: ["#### 7.0", "#### 8"] * (len(rows) // 2))
    for recipe in (None, Recipe("full", {})):
        assert real_answers.right_answers(world, recipe, 4) == {"right": 4, "of": 8}
