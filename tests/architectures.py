"""Every causal language model of transformers that a tiny config can be made of, and what tokensel makes of it.

hf/test_architectures.py tests each row; `python -m tools.write_docs` makes the table of docs/models.md from this.
"""

from __future__ import annotations

import copy

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

# What makes a model tiny, under all the names that configs have for it. A config takes those that it has.
_TINY = dict(
    vocab_size=97,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "swa_num_attention_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("head_dim", "swa_head_dim", "qk_nope_head_dim", "query_pre_attn_scalar"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("linear_head_dim", "index_head_dim", "mamba_d_state", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "hidden_size_per_layer_input"), 4),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "index_n_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("initializer_range", "init_std"), 0.25),  # attention and logits far from uniform
    vocab_size_per_layer_input=97,
    v_head_dim=6,
    qk_head_dim=12,
    index_topk=64,
    sliding_window=6,
    output_router_logits=True,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_FULL_SLIDING = {"layer_types": ["full_attention", "sliding_attention"]}
_SWITCHED_WINDOW = _FULL_SLIDING | {"use_sliding_window": True, "max_window_layers": 0}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_CONV = {"layer_types": ["conv", "full_attention"]}
_MLA = {"num_key_value_heads": 4, "head_dim": 4}  # of the rotary part alone

_PLAIN = (
    "apertus arcee aria_text beam biogpt bitnet cohere2_moe ctrl diffllama dots1 ernie4_5 ernie4_5_moe exaone_moe "
    "flex_olmo gemma glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox granite_swa granitemoe granitemoe_swa "
    "granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 jais2 jetmoe kolibri1 laguna llama "
    "mellum mimo_v2_flash minimax_m2 minimax_m3_vl_text ministral3 mistral mixtral nanochat nemotron olmo olmo2 "
    "olmoe opt persimmon phi phi3 qwen3_moe seed_oss solar_open stablelm starcoder2 vaultgemma "
)
_WINDOWED = "afmoe cohere2 cwm exaone4 gemma3_text gemma4_text gemma4_unified_text gpt_oss lfm3 ministral olmo3"
# model_type -> changes of its tiny config
SUPPORTED: dict[str, dict] = {
    **dict.fromkeys(_PLAIN.split(), {}),
    **dict.fromkeys(_WINDOWED.split(), _FULL_SLIDING),
    **dict.fromkeys("minimax olmo_hybrid qwen3_5_moe_text qwen3_5_text qwen3_next".split(), _HYBRID),
    **dict.fromkeys("granite hyperclovax".split(), {"logits_scaling": 3.0}),
    **dict.fromkeys("moshi phimoe".split(), {"sliding_window": 64}),
    **dict.fromkeys("axk1 deepseek_v2 deepseek_v3 glm4_moe_lite minicpm3 youtu".split(), _MLA),
    "bailing_hybrid": {"n_group": 1, "topk_group": 1, **_HYBRID, **_MLA},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16},
    "cohere": {"logit_scale": 0.4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 16, "hidden_size": 32},
    },
    "falcon_h1": {
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "lm_head_multiplier": 0.4,
        "mamba_d_ssm": 32,
        "mamba_chunk_size": 8,
    },
    "flint": {"mlp_only_layers": []},
    "gemma2": {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0, **_FULL_SLIDING},
    "gemma3n_text": {"num_kv_shared_layers": 0, **_FULL_SLIDING},
    "granitemoehybrid": _HYBRID | {"mamba_n_heads": 4, "mamba_d_head": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "kimi_linear": _HYBRID | _MLA,
    "lfm2": _CONV,
    "lfm2_moe": _CONV | {"num_dense_layers": 1},
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"]},
    "longcat_flash": _MLA | {"zero_expert_num": 2},
    "nemotron_h": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "layers_block_type": ["mamba", "moe", "attention"],
        "n_groups": 1,
        "chunk_size": 8,
    },
    **dict.fromkeys("qwen2 qwen2_moe qwen3 smollm3".split(), _SWITCHED_WINDOW),
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "zaya": {"num_experts_per_tok": 1},
}

_ROPE_3D = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
_VISION = dict(hidden_size=16, intermediate_size=16, num_heads=2, depth=1, out_hidden_size=32)
_PATCHES = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
# model_type of a language model behind a vision tower -> (that of the language model, its changes, the tower's sizes)
WRAPPERS: dict[str, tuple[str, dict, dict]] = {
    **dict.fromkeys(("llava", "llava_next", "idefics3", "smolvlm"), ("llama", {}, _PATCHES)),
    "aya_vision": ("cohere2", _FULL_SLIDING, _PATCHES),
    "gemma3": ("gemma3_text", _FULL_SLIDING, _PATCHES),
    "gemma4": ("gemma4_text", _FULL_SLIDING, _PATCHES),
    "internvl": ("qwen2", {}, _PATCHES),
    "llama4": ("llama4_text", {"layer_types": ["chunked_attention", "full_attention"]}, _PATCHES),
    "mistral3": ("mistral", {}, _PATCHES),
    "qwen2_vl": ("qwen2_vl_text", _ROPE_3D, {"embed_dim": 16, "num_heads": 2, "depth": 1}),
    "qwen2_5_vl": ("qwen2_5_vl_text", _ROPE_3D, _VISION),
    "qwen3_vl": ("qwen3_vl_text", _ROPE_3D, _VISION),
    "qwen3_vl_moe": ("qwen3_vl_moe_text", _ROPE_3D | {"sliding_window": None}, _VISION),
    "qwen3_5": ("qwen3_5_text", _HYBRID, _VISION),
    "qwen3_5_moe": ("qwen3_5_moe_text", _HYBRID, _VISION),
}

# why attention cannot be measured -> (the error, model_type -> changes of its tiny config)
NO_ATTENTION: dict[str, tuple[str, dict[str, dict]]] = {
    "compute attention by themselves, not through transformers' attention interface": (
        "transformers' attention interface",
        dict.fromkeys(("falcon", "bloom", "mpt", "gptj", "codegen", "openai-gpt", "gpt_neox_japanese"), {})
        | {"gpt_neo": {"attention_types": [[["global", "local"], 1]]}},
    ),
    "have no attention": (
        "no attention module",
        dict.fromkeys(("mamba", "falcon_mamba", "rwkv", "xlstm"), {}) | {"mamba2": {"num_heads": 8}},
    ),
    "attend to keys that an index chooses": (
        "its layers are (indexed|heavily_compressed)_attention",
        dict.fromkeys(("deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4", "dots3_note_text"), _MLA)
        | {"deepseek_v4": {"output_router_logits": False}},
    ),
    "add a bias to their scores": (
        "cannot be reproduced from its q and k|hands position_bias to its attention",
        {"doge": {"sliding_window": 64, "output_router_logits": False}, "inkling_text": {}},
    ),
    "have cross-attention, or stacks that number their layers alike": (
        "are both of layer",
        dict.fromkeys(("bart", "marian", "pegasus", "whisper", "hrm_text"), {}),
    ),
    "share one attention module between layers": (
        "no attention module|are both of layer -1",
        dict.fromkeys(
            ("zamba", "zamba2"),
            {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 4},
        ),
    ),
}
# why a model cannot be patched at all -> the same
REFUSED: dict[str, tuple[str, dict[str, dict]]] = {
    "transform hidden states before their head": (
        "own logits differ from head|it transforms them in between",
        dict.fromkeys(("bert", "roberta", "electra", "ernie", "modernbert-decoder"), {"is_decoder": True}),
    ),
    "have no model without a head inside": ("no model without its head", {"llama4": {}}),
}


def supported() -> list[str]:
    refused = [name for _, rows in REFUSED.values() for name in rows]
    return sorted(name for name in [*SUPPORTED, *WRAPPERS] if name not in refused)


def tiny_config(model_type: str, changes: dict):
    cls = getattr(transformers, CONFIG_MAPPING_NAMES[model_type])
    fields = cls().to_dict()
    # a config may change the lists that it is given (Gemma 4 its layer_types), and rows here share them
    return cls(**{name: value for name, value in _TINY.items() if name in fields} | copy.deepcopy(changes))


def tiny_model(model_type: str, attention: str = "eager", dtype: torch.dtype = torch.float64):
    """A seeded random model in eval mode."""
    make = transformers.AutoModelForCausalLM
    if model_type in WRAPPERS:
        text, changes, vision = WRAPPERS[model_type]
        parts = {"text_config": tiny_config(text, changes).to_dict(), "vision_config": vision}
        config, make = tiny_config(model_type, parts), transformers.AutoModelForImageTextToText
    else:
        changes = SUPPORTED | {
            name: row for _, rows in [*NO_ATTENTION.values(), *REFUSED.values()] for name, row in rows.items()
        }
        config = tiny_config(model_type, changes[model_type])
    config._experts_implementation = "eager"  # the grouped product takes no float64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = make.from_config(config, attn_implementation=attention)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms, biases, sinks and the like begin as ones or zeros
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()
