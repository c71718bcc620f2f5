"""Token selection with a model that FSDP2 spreads over ranks, in a plain loop. Without a GPU:

    torchrun --nproc_per_node=2 examples/fsdp2.py

A tiny random Llama learns random tokens here, so that the file runs anywhere; put your model and batches in.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import tokensel
from tokensel.documents import BatchLayout

backend = "nccl" if torch.cuda.is_available() else "gloo"
dist.init_process_group(backend)
rank, ranks = dist.get_rank(), dist.get_world_size()
if backend == "nccl":
    torch.set_default_device(torch.device("cuda", rank % torch.cuda.device_count()))

torch.manual_seed(0)  # the same weights on every rank
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes))
tokensel.apply_to(model)  # before the model is sharded
for layer in model.model.layers:
    fully_shard(layer)
fully_shard([model.model.norm, model.lm_head])  # or neither, or the head alone: the loss is made where it is whole
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
method = tokensel.methods.get("attention", rho=0.6)
selection = tokensel.Selection(method)

torch.manual_seed(1 + rank)  # other rows on every rank
for step in range(20):
    ids = torch.randint(0, 512, (4, 48))
    labels = ids.clone()
    labels[:, :16] = -100  # the prompt is not learnt

    # one denominator for all ranks: how many tokens they will keep together, known before the forward
    layout = BatchLayout.from_batch({"input_ids": ids, "labels": labels})
    kept = method.count(layout.response, layout.sample).double()
    dist.all_reduce(kept)
    output = model(input_ids=ids, labels=labels, selection=replace(selection, denominator=kept))
    (output.loss * ranks).backward()  # FSDP averages gradients over ranks, the denominator is global already
    optimizer.step()
    optimizer.zero_grad()
    selection.step()

    loss = output.loss.detach()
    dist.all_reduce(loss)  # each rank's is its own part of the sum
    if rank == 0 and step % 5 == 0:
        print(f"step {step:2d}  loss {loss:.4f}  kept {int(kept)} on {ranks} ranks")
dist.destroy_process_group()
