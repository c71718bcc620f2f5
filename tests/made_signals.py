"""Signals made by hand: two samples whose scores and ranks can be told."""

from __future__ import annotations

import torch

from tokensel import Selection, TokenSignals, methods
from tokensel.select.signals import RECORDED

# Two samples of 5 and 3 response tokens, one prompt token before each.
SAMPLE = torch.tensor([0] * 6 + [6] * 4)
RESPONSE = torch.tensor([0, 1, 1, 1, 1, 1, 0, 1, 1, 1]).bool()
NLL = torch.tensor([9, 0.1, 2.0, 0.7, 3.0, 1.2, 9, 0.4, 5.0, 0.9]).double()


def column(seed):
    return torch.rand(10, generator=torch.Generator().manual_seed(seed)).double() * 4


SIGNALS = dict(
    nll=NLL,
    entropy=column(1),
    logp_var=column(2) + 0.1,
    renyi2=column(30),
    rank=torch.tensor([0, 0, 3, 1, 40, 2, 0, 0, 700, 1]).double(),
    mass=column(3) / 4,
    uniform_mass=column(4) / 4 + 0.1,
    key=torch.arange(10) * 7919,
    vocab_size=40,
    **{name: column(5 + i) for i, name in enumerate(RECORDED)},
)
GIVEN = TokenSignals(RESPONSE, SAMPLE, **SIGNALS)


def weights(name, signals=GIVEN, **parameters):
    return methods.get(name, **parameters)(signals).double()


def recorded_of(batch):
    """Made-up recorded losses: functions of a token's id and place, so layouts agree."""
    position = (batch["position_ids"] if "position_ids" in batch else batch["attention_mask"].cumsum(-1) - 1).double()
    return {
        name: (torch.sin(batch["input_ids"] * (3.7 + i) + position * 78.233) * 2 + 4.5).float()
        for i, name in enumerate(RECORDED)
    }


def step(model, batch, method, **extra):
    return model(**batch, **recorded_of(batch), **extra, selection=Selection(method))


def flat(out, batch):
    values = out.weights
    return values[batch["attention_mask"].bool()] if "attention_mask" in batch else values[0]
