"""What the processes of test_distributed.py run: the same three optimizer steps, however the model is spread.

    python -m torch.distributed.run --standalone --nproc_per_node=2 tests/ranks.py JOB DIRECTORY

Models are float64 and optimizers SGD, so that equal updates are equal to rounding, far below real changes.
"""

from __future__ import annotations

import itertools
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from spread_ops import context, logprobs, vocabulary, whole
from tiny import causal_lm, packed, padded, samples
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import tokensel
from tokensel.arguments import SelectiveTrainingArguments
from tokensel.documents import BatchLayout
from tokensel.history import LiveHistory
from tokensel.step import Progress
from tokensel.store import HistoryWriter
from tokensel.trainer import SelectiveTrainer

STEPS, RANKS, LEARNING_RATE = 3, 2, 0.5
SSTOKEN = ("sstoken", {"gamma": 0.5, "rho": 0.6})


def global_batches():
    """Three batches of eight rows: a usual one, one whose second half has no response, and an uneven last one."""
    torch.manual_seed(5)
    lengths = torch.randint(2, 14, (STEPS, 8, 2)).tolist()
    usual, silent, last = (padded(samples(rows)) for rows in lengths)
    silent["labels"][4:] = -100
    last = {name: value[:6] for name, value in last.items()}  # rank 1 has two rows where rank 0 has four
    batches = [usual, silent, last]
    for batch in batches:  # recorded under some other model
        batch["history_nll"] = torch.rand(batch["labels"].shape, dtype=torch.float64) * 6
    return batches


def share(batch, rank, ranks):
    """The rows of one rank: four to each while there are any."""
    return batch if ranks == 1 else {name: value[4 * rank : 4 * rank + 4] for name, value in batch.items()}


def build(tied=False, checkpointing=False, dtype=torch.float64):
    model = causal_lm(tie_word_embeddings=tied, dtype=dtype)
    if checkpointing:
        model.gradient_checkpointing_enable()
    tokensel.apply_to(model)
    return model.train()


def train(
    model, batches, *, rank=0, ranks=1, optimizer=None, first_step=0, backward=torch.Tensor.backward, history=None
):
    """Optimizer steps with the loss's denominator over all ranks. -> (global losses, this rank's weights of tokens)"""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    method = tokensel.methods.get(SSTOKEN[0], **SSTOKEN[1])
    losses, selections = [], []
    for step, batch in enumerate(batches, first_step):
        mine = share(batch, rank, ranks)
        if history is not None:
            mine = {name: value for name, value in mine.items() if name != "history_nll"}
        layout = BatchLayout.from_batch(mine)
        kept = method.count(layout.response, layout.sample).double()
        if ranks > 1:
            dist.all_reduce(kept)
        output = model(
            **mine, selection=tokensel.Selection(method, history=history, denominator=kept, progress=Progress(step))
        )
        backward(output.loss * ranks)  # gradients are averaged over ranks, the denominator is global
        optimizer.step()
        optimizer.zero_grad()
        loss = output.loss.detach().clone()
        if ranks > 1:
            dist.all_reduce(loss)
        losses.append(float(loss))
        selections.append(output.weights)
    return losses, selections


def full_weights(model):
    """Whole parameters by name, on every rank."""
    module = model.module if isinstance(model, DistributedDataParallel) else model
    return {name: whole(p) for name, p in module.named_parameters()}


def fsdp(model, unit):
    """Layers are units of their own, and so is `unit`: none but the root, [norm, head], or the head alone."""
    for layer in model.model.layers:
        fully_shard(layer)
    if unit == "norm_head":
        fully_shard([model.model.norm, model.lm_head])
    elif unit == "head":
        fully_shard(model.lm_head)
    return fully_shard(model)


# name: (how the model is built, how it is spread)
SPREADS = {
    "ddp": ({}, DistributedDataParallel),
    "ddp-tied": ({"tied": True}, DistributedDataParallel),
    "ddp-checkpointing": ({"checkpointing": True}, DistributedDataParallel),
    "fsdp2-root": ({}, lambda model: fsdp(model, "root")),
    "fsdp2-norm-head": ({}, lambda model: fsdp(model, "norm_head")),
    "fsdp2-head": ({}, lambda model: fsdp(model, "head")),
    "fsdp2-root-tied": ({"tied": True}, lambda model: fsdp(model, "root")),
    "fsdp2-head-checkpointing": ({"checkpointing": True}, lambda model: fsdp(model, "head")),
}


def tensor_parallel(model, **head):
    """Heads, MLP and vocabulary are spread over the ranks, which all see the same rows."""
    column, row = ColwiseParallel, RowwiseParallel
    layer = {f"self_attn.{name}_proj": column() for name in "qkv"} | {"self_attn.o_proj": row()}
    layer |= {"mlp.gate_proj": column(), "mlp.up_proj": column(), "mlp.down_proj": row()}
    plan = {f"model.layers.*.{name}": style for name, style in layer.items()} | {"lm_head": column(**head)}
    return parallelize_module(model, init_device_mesh("cpu", (RANKS,)), plan)


class Shrunken(LiveHistory):
    """A live history that runs the model: its hidden states, smaller."""

    signal, shares_head = "history_nll", True

    def hidden(self, patched, batch):
        with torch.no_grad():
            return 0.7 * patched.backbone(batch)


# name: how the head hands out the logits that somebody asks it for
TENSOR_PARALLEL = {
    "tp": {},
    "tp-whole-logits": {"output_layouts": Replicate()},
    "tp-dtensor-logits": {"use_local_output": False},
}


def spread(directory):
    """Every way of spreading the model; each rank leaves its selections, rank 0 the losses and weights."""
    found = {}
    for name, (options, wrap) in SPREADS.items():
        model = wrap(build(**options))
        losses, selections = train(model, global_batches(), rank=dist.get_rank(), ranks=RANKS)
        found[name] = {"losses": losses, "selections": selections, "weights": full_weights(model)}
    for name, head in TENSOR_PARALLEL.items():
        model = tensor_parallel(build(), **head)
        losses, selections = train(model, global_batches())
        found[name] = {"losses": losses, "selections": selections, "weights": full_weights(model)}
    model = tensor_parallel(causal_lm(), output_layouts=Replicate())
    tokensel.apply_to(model)  # with whole logits, afterwards will do as well
    losses, selections = train(model.train(), global_batches())
    found["tp-patched-after"] = {"losses": losses, "selections": selections, "weights": full_weights(model)}
    model = tensor_parallel(build())
    losses, selections = train(model, global_batches(), history=Shrunken())
    found["tp-live-history"] = {"losses": losses, "selections": selections, "weights": full_weights(model)}
    try:
        tokensel.apply_to(tensor_parallel(causal_lm()))
    except ValueError as error:
        found["tp-patched-after-part-of-logits"] = str(error)
    torch.save(found, directory / f"spread-{dist.get_rank()}.pt")


def zero3(directory):
    """DeepSpeed's stage 3, where a parameter is whole only while its module's own forward or backward runs."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # its own all-reduce, which needs a compiler
    deepspeed.init_distributed("gloo")
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }
    found = {}
    for name, options in ZERO3.items():
        model = build(**options)
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        whereabouts = {"rank": dist.get_rank(), "ranks": RANKS}
        losses, selections = train(engine, global_batches(), optimizer=engine, backward=engine.backward, **whereabouts)
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            found[name] = {"losses": losses, "selections": selections, "weights": full_weights(model)}
    torch.save(found, directory / f"zero3-{dist.get_rank()}.pt")


ZERO3 = {"plain": {}, "tied": {"tied": True}, "checkpointing": {"checkpointing": True}}


def checkpoint(directory):
    """One step under FSDP2, a checkpoint of model and optimizer in shards, two more steps."""
    model = fsdp(build(), "head")
    optimizer = momentum(model)
    batches, whereabouts = global_batches(), {"rank": dist.get_rank(), "ranks": RANKS}
    train(model, batches[:1], optimizer=optimizer, **whereabouts)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(state, checkpoint_id=directory / "shards")
    losses, selections = train(model, batches[1:], optimizer=optimizer, first_step=1, **whereabouts)
    found = {"losses": losses, "selections": selections, "weights": full_weights(model)}
    torch.save(found, directory / f"checkpoint-{dist.get_rank()}.pt")


def momentum(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


# The same through transformers.Trainer and Accelerate


def trainer_rows():
    """(ids, labels) of 31 samples, so that the last batch of eight is uneven; some have no response."""
    torch.manual_seed(6)
    rows = samples(torch.randint(2, 14, (31, 2)).tolist())
    for _, labels in rows[::7]:
        labels[:] = -100
    return [{"input_ids": ids, "labels": labels} for ids, labels in rows]


def record(path, seed, ties):
    """A store of losses of no model at all; with `ties` only 0, 1 or 2."""
    generator = torch.Generator().manual_seed(seed)
    with HistoryWriter(path) as writer:
        for row in trainer_rows():
            nll = torch.rand(row["labels"].shape, generator=generator) * 3
            writer.add(row["input_ids"][None], row["labels"][None], (nll.floor() if ties else nll)[None])
    return str(path)


def recorded_settings(directory):
    """Trainer settings by scenario; makes the stores that they name unless there are any."""
    files = {name: directory / f"{name}.parquet" for name in ("history", "base", "reference")}
    for seed, (name, path) in enumerate(files.items()):
        if not path.exists():
            record(path, seed, ties=name != "history")
    both = f"base={files['base']},reference={files['reference']}"
    return {
        "sample": {"method": "sstoken", "history": "recorded", "history_store": str(files["history"])},
        "batch": {"method": "token_cleaning", "method_args": "rho=0.5,scope=batch", "recorded": both},
        "last_seen": {"method": "sstoken", "history": "last_seen", "num_train_epochs": 3},  # rows change ranks
        "average": {"method": "sstoken", "history": "ema", "history_decay": 0.5},
        "threshold": {"method": "ada_eslm", "method_args": "alpha=0.3,speed=2.0"},
        "apart": {"method": "random", "average_tokens_across_devices": False, "accelerator_config": {}},
    }


class Recording(SelectiveTrainer):
    """Keeps the weights of each row's tokens by step and token ids."""

    def record_selection(self, inputs, output):
        super().record_selection(inputs, output)
        kept = self.__dict__.setdefault("kept", {})
        for ids, mask, weights in zip(
            inputs["input_ids"], inputs["attention_mask"].bool(), output.weights, strict=True
        ):
            kept[(self.state.global_step, *ids[mask].tolist())] = weights[mask].tolist()
        sums = self.__dict__.setdefault("sums", {}).setdefault(self.state.global_step, [0.0, 0.0])
        sums[0] += float((output.weights * output.nll).sum())
        sums[1] += float(output.weights.sum())


def make_trainer(directory, **settings):
    """One whose rows of a step are not filled up with others, so that processes see the same ones."""
    fixed = {
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "optim": "sgd",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "disable_tqdm": True,
        "accelerator_config": {"even_batches": False},
        "remove_unused_columns": False,
        "per_device_eval_batch_size": 2,
    }
    arguments = SelectiveTrainingArguments(output_dir=str(directory / "out"), **fixed | settings)
    collate = lambda rows: padded([(row["input_ids"], row["labels"]) for row in rows])  # noqa: E731
    model = causal_lm(attention="sdpa")  # eager attention is float32, which would show between batches of other widths
    return Recording(model, arguments, data_collator=collate, train_dataset=trainer_rows())


def held_out_loss(directory, even_batches, flat=False, documents=1, **settings):
    """Of seven rows with a response, which two ranks have to fill up where their batches have to be even.

    With `flat`, a batch is one row of them end to end, which may consist of several documents each.
    """
    accelerator = {"even_batches": even_batches}
    trainer = make_trainer(directory, method="full", accelerator_config=accelerator, **settings)
    if flat:
        parts = lambda row: [(row["input_ids"], row["labels"])] * documents  # noqa: E731
        trainer.data_collator = lambda rows: packed([part for row in rows for part in parts(row)])
    return trainer.evaluate([row for row in trainer_rows() if (row["labels"] != -100).any()][:7])["eval_loss"]


def run_trainer(directory, **settings):
    """Trains for an epoch."""
    trainer = make_trainer(directory, **settings)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    totals = trainer.selection_totals()
    totals.pop("tokens_per_second")
    found = {"losses": losses, "kept": trainer.kept, "weights": full_weights(trainer.model), "totals": totals}
    return found | {"state": trainer._selection.state_dict()["tensors"], "sums": trainer.sums}


def trainers(directory):
    found = {}
    for name, settings in recorded_settings(directory).items():
        accumulation = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        found[name] = run_trainer(directory, ddp_backend="gloo", **accumulation, **settings)
    cases = itertools.product((False, True), repeat=2)
    found["held out"] = [held_out_loss(directory, even, flat, ddp_backend="gloo") for even, flat in cases]
    one = {"ddp_backend": "gloo", "per_device_eval_batch_size": 1}
    found["held out"].append(held_out_loss(directory, True, True, documents=2, **one))
    try:
        held_out_loss(directory, True, True, documents=2, ddp_backend="gloo")
    except ValueError as error:
        found["packed rows"] = str(error)
    made = make_trainer(directory, method="full", ddp_backend="gloo").record_history(directory / "recorded.parquet")
    found["recorded"] = made["response_tokens"]
    torch.save(found, directory / f"trainers-{dist.get_rank()}.pt")


# What goes wrong


def refusals(directory):
    """The errors of trainers whose ranks do not fit together; every rank has to raise, or the others would hang."""
    rank = dist.get_rank()
    sample = recorded_settings(directory)["sample"]
    other = directory / f"other-{rank}.parquet"
    record(other, seed=rank, ties=False)
    random = {"method": "random", "method_args": "rho=0.5", "per_device_train_batch_size": 4, "max_steps": 1}
    cases = {
        "rho": random | {"method_args": f"rho=0.{5 + rank}"},
        "method": random | {"method": ("random", "min_k_pp")[rank]},
        "history": ({"method": "min_k_pp"}, sample | {"method": "min_k_pp"})[rank],
        "losses": sample | {"history_store": str(other)},
        "batches": random | {"per_device_train_batch_size": 5, "max_steps": -1},
        "none": random,
    }
    found = {}
    for name, settings in cases.items():
        try:
            run_trainer(directory, ddp_backend="gloo", **settings)
        except ValueError as error:
            found[name] = str(error)
    torch.save(found, directory / f"refusals-{rank}.pt")


def death(directory):
    """Rank 1 dies between two steps, while rank 0 waits for its part of the next: the last job of all."""
    model = DistributedDataParallel(build())
    batch = global_batches()[0]
    train(model, [batch], rank=dist.get_rank(), ranks=RANKS)
    if dist.get_rank() == 1:
        (directory / "death").touch()
        raise RuntimeError("rank 1 is no more")
    train(model, [batch], rank=dist.get_rank(), ranks=RANKS)


JOBS = {
    job.__name__: job for job in (spread, zero3, checkpoint, trainers, vocabulary, logprobs, context, refusals, death)
}

if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for job in sys.argv[1].split(","):
        JOBS[job](Path(sys.argv[2]))
    dist.destroy_process_group()
