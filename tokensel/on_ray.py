"""Scoring on a cluster: Ray Data schedules the batches over actors that hold the model, and starts anew what is killed.

The store is the one that `record_losses` makes in one process. All nodes have to see the output's disk.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from tqdm.auto import tqdm

from tokensel.loading import first_token_of, load_scoring_models, load_tokenizer, scoring_device
from tokensel.model import apply_to
from tokensel.model_facts import ModelFacts, facts_of
from tokensel.parallel import rank_of_ranks
from tokensel.recording import losses_of, not_done, response_losses
from tokensel.settings import ScoreArguments
from tokensel.store.encoded import EncodedDocuments
from tokensel.store.shards import Shards

TASKS_PER_ACTOR = 64  # of a run, so that one that is started again has little to do again


class Scorer:
    """An actor: the model of the settings, and what it scores."""

    def __init__(self, settings: ScoreArguments, documents: EncodedDocuments | None) -> None:
        tokenizer = load_tokenizer(settings)
        self.settings, self.documents = settings, documents
        self.models = load_scoring_models(settings, tokenizer, scoring_device(settings))
        if documents is not None:
            patched, *negative = (apply_to(model.eval(), layer=None) for model in self.models.values())
            first_token = first_token_of(tokenizer) if settings.without_prompt else None
            self.losses = response_losses(patched, settings.impl, first_token, *negative)

    def __call__(self, rows: dict[str, numpy.ndarray]) -> dict[str, list]:
        """Rows of `batch`, numbers of documents -> the same with `values`, the losses of all their tokens."""
        assert self.documents is not None
        values = [losses_of(self.documents, numpy.asarray(batch), self.losses) for batch in rows["batch"]]
        return {"batch": list(rows["batch"]), "values": values}


def facts(settings: ScoreArguments) -> dict[str, ModelFacts]:
    """What has to be known of the models, from a task that loads them and lets them go."""
    import ray

    names = {"": settings.model_name_or_path, "contrast_": settings.contrast_model_name_or_path or ""}
    found: dict[str, ModelFacts] = ray.get(ray.remote(**_resources())(_facts_there).remote(_placed(settings)))
    return {kind: each._replace(limits=each.limits._replace(name=names[kind])) for kind, each in found.items()}


def _facts_there(settings: ScoreArguments) -> dict[str, ModelFacts]:
    return {kind: facts_of(model) for kind, model in Scorer(settings, None).models.items()}


def _placed(settings: ScoreArguments) -> ScoreArguments:
    """The same for a process whose working directory is another one."""
    placed = copy.copy(settings)
    for name in ("model_name_or_path", "contrast_model_name_or_path", "chat_template"):
        value = getattr(settings, name)
        if value is not None and Path(value).exists():
            setattr(placed, name, str(Path(value).resolve()))
    return placed


def scoring(settings: ScoreArguments) -> Callable[[Shards, EncodedDocuments, list[numpy.ndarray]], int]:
    """The function that puts the losses of batches into shards, as `recording.record` calls it."""
    import ray

    def score(shards: Shards, documents: EncodedDocuments, batches: list[numpy.ndarray]) -> int:
        left = not_done(shards, documents, batches)
        if not left:
            return 0
        total = int(sum(documents.lengths[batch].sum() for batch in left))
        actors = min(settings.ray_actors or 1, len(left))
        blocks = min(len(left), TASKS_PER_ACTOR * actors)
        scored = ray.data.from_items([{"batch": batch} for batch in left], override_num_blocks=blocks).map_batches(
            Scorer,
            fn_constructor_args=(_placed(settings), documents),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=actors),
            **_resources(),
        )
        with tqdm(total=total, unit="token", unit_scale=True, desc=f"score ({actors} actors)") as bar:
            try:
                for row in scored.iter_rows():
                    batch = numpy.asarray(row["batch"])
                    lengths = documents.lengths[batch].astype(numpy.int32)
                    shards.append(documents.keys[batch], lengths, numpy.asarray(row["values"], numpy.float32))
                    bar.update(int(lengths.sum()))
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None) or error
                cause = getattr(cause, "__cause__", None) or cause
                raise ValueError(f"an actor failed: {str(cause).strip().splitlines()[-1]}") from error
        shards.flush()
        return total

    return score


def start(settings: ScoreArguments) -> None:
    """Joins the cluster that RAY_ADDRESS names, or else starts Ray on this machine.

    Raises:
        ImportError: Ray is not installed.
        ValueError: settings that say otherwise where the model is.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("ray_actors needs Ray: pip install 'tokensel[ray]'") from error
    if rank_of_ranks()[1] > 1:
        raise ValueError("ray_actors is for one process, which Ray's actors work for; start it without torchrun")
    for name in ("fully_shard", "device_map"):
        if getattr(settings, name):
            raise ValueError(f"each of the ray_actors holds the whole model; leave {name} out")
    print("starting Ray, which takes a while", flush=True)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.init(ignore_reinit_error=True, log_to_driver=False, configure_logging=False)
    ray.data.DataContext.get_current().enable_progress_bars = False  # ours counts tokens


def _resources() -> dict[str, Any]:
    return {"num_gpus": 1} if torch.cuda.is_available() else {"num_cpus": 1}
