"""What the tests of recorded losses share: made documents and their stores, a tiny model, the commands' arguments."""

from __future__ import annotations

import torch

from tokensel.cli import main
from tokensel.store import HistoryWriter
from tokensel.testing import make_rows

LIMIT = 64
ROWS = make_rows(30, seed=3)


def make_documents(count=40, seed=0):
    """(ids, response, losses by name) of documents with several runs of response tokens; many losses are equal."""
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for _ in range(count):
        length = int(torch.randint(2, 25, (), generator=generator))
        response = torch.rand(length, generator=generator) < 0.6
        response[0], response[-1] = False, True
        losses = {
            name: torch.randint(0, 9, (length,), generator=generator) / 4.0 for name in ("base", "reference", "alone")
        }
        documents.append((torch.randint(0, 50, (length,), generator=generator), response, losses))
    return documents


def write(path, documents, name, **options):
    content = {"alone": "alone_nll"}.get(name, "nll")
    with HistoryWriter(path, content=content, **options) as writer:
        for ids, response, losses in documents:
            labels = torch.where(response, ids, -100)
            writer.add(ids[None], labels[None], losses[name][None])
    return str(path)


def select(output, method, recorded, method_args=None, **settings):
    text = ",".join(f"{name}={file}" for name, file in recorded.items())
    settings = {"method": method, "recorded": text, "output": output, "method_args": method_args} | settings
    return main(["select", *(p for n, v in settings.items() if v is not None for p in (f"--{n}", str(v)))])


def arguments(model_dir, data, output, **settings):
    settings = {
        "model_name_or_path": model_dir,
        "dataset_name": data,
        "max_length": LIMIT,
        "batch_size": 4,
        "output": output,
    } | settings
    return ["score", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))]
