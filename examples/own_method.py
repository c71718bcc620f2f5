"""A selection method of one's own: registered in three lines, then used by its name like any other.

python examples/own_method.py
"""

from __future__ import annotations

import torch

from tokensel import SelectionMethod, TokenSignals, methods
from tokensel.select.rules import TopShare


@methods.register
def surprise(rho: float = 0.6) -> SelectionMethod:
    """nll - entropy: tokens that are less likely than the model itself expected, top rho of each sample."""
    return SelectionMethod("surprise", {"nll", "entropy"}, lambda s: s.nll - s.entropy, TopShare(rho))


if __name__ == "__main__":
    response = torch.tensor([[False, True, True, True, True]])
    signals = TokenSignals(
        response,
        sample=torch.zeros(1, 5, dtype=torch.int64),
        nll=torch.tensor([[0.0, 0.2, 3.0, 1.0, 2.0]]),
        entropy=torch.tensor([[0.0, 0.1, 0.5, 1.5, 0.7]]),
    )
    print("kept:", methods.get("surprise", rho=0.5)(signals).tolist())
    # in a YAML file or on the command line of a script that registers it: method: surprise, method_args: {rho: 0.5}
