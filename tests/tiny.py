"""Tiny random models of the families that the patched model is tested on, and small batches for them."""

from __future__ import annotations

import torch
import transformers

VOCABULARY = 97
_COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.25,  # attention and logits far from uniform
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
_FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Mistral": {"sliding_window": 6},
    "Gemma2": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
        "sliding_window": 6,
        "layer_types": _ALTERNATING,
    },
    "Gemma3Text": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6, "layer_types": _ALTERNATING},
    "Cohere": {"logit_scale": 0.4},
    "Granite": {"logits_scaling": 3.0},
}
FAMILIES = tuple(_FAMILIES)
_MODELS = {"Gemma3Text": "Gemma3ForCausalLM"}


def causal_lm(family: str = "Llama", dtype: torch.dtype = torch.float64, attention: str = "eager", **changes):
    """A seeded random model in eval mode; `changes` go into its config."""
    config = getattr(transformers, f"{family}Config")(
        **_COMMON | _FAMILIES[family] | changes, attn_implementation=attention
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = getattr(transformers, _MODELS.get(family, f"{family}ForCausalLM"))(config)
    return model.to(dtype).eval()


def lora(model, targets=("q_proj", "v_proj"), **changes):
    """`model` with LoRA adapters whose B is random, so that they do something."""
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM", **changes)
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return wrapped


def samples(lengths=((5, 9), (3, 14), (8, 4), (2, 11))):
    """(ids, labels) of single-turn samples with (prompt, response) tokens each, all ids above the special ones."""
    rows = []
    for prompt, response in lengths:
        ids = torch.randint(3, VOCABULARY, (prompt + response,))
        labels = ids.clone()
        labels[:prompt] = -100
        rows.append((ids, labels))
    return rows


def padded(rows, side="right"):
    """input_ids, labels, attention_mask [B, S] of samples."""
    width = max(len(ids) for ids, _ in rows)
    batch = {
        "input_ids": torch.zeros(len(rows), width, dtype=torch.int64),
        "labels": torch.full((len(rows), width), -100),
        "attention_mask": torch.zeros(len(rows), width, dtype=torch.int64),
    }
    for row, (ids, labels) in enumerate(rows):
        place = slice(0, len(ids)) if side == "right" else slice(width - len(ids), width)
        batch["input_ids"][row, place], batch["labels"][row, place] = ids, labels
        batch["attention_mask"][row, place] = 1
    return batch


def packed(rows):
    """input_ids, labels, position_ids [1, T] of samples, without padding."""
    return {
        "input_ids": torch.cat([ids for ids, _ in rows])[None],
        "labels": torch.cat([labels for _, labels in rows])[None],
        "position_ids": torch.cat([torch.arange(len(ids)) for ids, _ in rows])[None],
    }
