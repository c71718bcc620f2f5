"""The functions in a plain PyTorch loop: no trainer, no patched model, any causal language model you can call.

    python examples/raw_loop.py

A tiny random Llama learns random tokens here, so that the file runs anywhere; put your model and batches in.
"""

from __future__ import annotations

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tokensel
from tokensel.documents import IGNORE_INDEX

torch.manual_seed(0)
config = LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config)
history = copy.deepcopy(model).eval()  # the model's own past, frozen
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
method = tokensel.methods.get("rel", rho=0.6)  # or history_excess, random, ...


def batches(n: int, rows: int = 4, length: int = 48, prompt: int = 16):
    for _ in range(n):
        ids = torch.randint(0, config.vocab_size, (rows, length))
        labels = ids.clone()
        labels[:, :prompt] = IGNORE_INDEX  # the prompt is not learnt
        yield ids, labels


for step, (ids, labels) in enumerate(batches(20)):
    # 1-3: both backbones, without the head; row t predicts token t + 1
    hidden = model.model(ids).last_hidden_state[:, :-1]  # (B, S - 1, D)
    with torch.no_grad():
        hidden_before = history.model(ids).last_hidden_state[:, :-1]
    target = labels[:, 1:]

    # 4: losses of both models, without [N, V] logits
    now, before = tokensel.token_stats_pair(
        (hidden, model.lm_head.weight), (hidden_before, history.lm_head.weight), target
    )
    # 5-6: score and keep
    sample = torch.arange(len(ids))[:, None].expand_as(target)
    keep = method(tokensel.TokenSignals(target != IGNORE_INDEX, sample, nll=now.nll, history_nll=before.nll))

    # 7: loss on the kept rows; its forward needs no matrix product
    loss = tokensel.selected_cross_entropy(hidden, model.lm_head.weight, target, keep, stats=now)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0:
        print(f"step {step:2d}  loss {loss:.4f}  kept {int(keep.sum())} of {int((target != IGNORE_INDEX).sum())}")
