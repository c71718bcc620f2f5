"""Distillation on chosen tokens (TIP, arXiv 2604.14084): where the student is unsure, or far from its teacher.

    python examples/distillation.py

Teacher and student differ in width; neither makes logits of [tokens, vocabulary], and the backward pays for the chosen
tokens alone. TIP's rows are written by the student; here they are random, so that the file runs anywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import tokensel

RHO = 0.5  # share of the tokens that is kept

torch.manual_seed(0)
sizes = {"vocab_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.1}
teacher = LlamaForCausalLM(LlamaConfig(hidden_size=96, intermediate_size=192, **sizes)).eval()
student = LlamaForCausalLM(LlamaConfig(hidden_size=48, intermediate_size=96, **sizes))
optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)


def unit_range(values: Tensor) -> Tensor:
    """Min-max over the batch; (N,) -> (N,)"""
    return (values - values.min()) / (values.max() - values.min())


for step in range(40):
    ids = torch.randint(0, sizes["vocab_size"], (4, 48))
    hidden = student.model(ids).last_hidden_state.flatten(0, 1)  # (N, D)
    with torch.no_grad():
        teacher_hidden = teacher.model(ids).last_hidden_state.flatten(0, 1)  # (N, D')
    head, every = student.lm_head.weight, torch.ones(len(hidden), dtype=torch.bool)
    divergence = tokensel.token_divergence(
        (hidden, head), (teacher_hidden, teacher.lm_head.weight), every, kind="reverse_kl"
    )  # (N,) nats

    entropy = tokensel.token_stats(hidden, head, ids.flatten(), entropy=True).entropy
    unsure = unit_range(entropy.clamp(max=entropy.quantile(0.98)))
    far = unit_range(divergence.detach())
    score = unsure + far - unsure * far  # TIP's eq. 7; random at equal rho is the comparison
    keep = score.topk(int(RHO * len(score))).indices

    divergence[keep].mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0 or step == 39:
        print(f"step {step:2d}  KL to the teacher {divergence.mean():.3f} nats, of kept {divergence[keep].mean():.3f}")
