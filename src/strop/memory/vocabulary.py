"""How output head and input embedding are held: in 16 bits on the card where that fits, else in less of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..config import Config, EmbeddingPlace, HeadFormat
from ..errors import PlanError
from .machine import Machine
from .shapes import ModelShape

_BOTH: tuple[HeadFormat, EmbeddingPlace] = ("int8", "int8")
_PINNED: list[tuple[HeadFormat, EmbeddingPlace]] = [("16bit", "host"), ("int8", "host")]
_ON_CARD: list[tuple[HeadFormat, EmbeddingPlace]] = [("16bit", "int8"), _BOTH, ("int8", "nf4")]
_NEVER_TIED = ("host", "nf4")


def can_pack(engine: str, config: Config, shape: ModelShape) -> bool:
    """Whether head and embedding can be held in other ways than in 16 bits: by vLLM, once; adapters are needed too."""
    return engine == "vllm" and config.model.share_weights == "require" and not shape.scaled_embedding


def check_vocabulary(config: Config, shape: ModelShape, engine: str) -> None:
    """Raise PlanError for settings of head and embedding that the engine, or a tied model, cannot have."""
    model = config.model
    asked = {"head": model.head, "embedding": model.embedding}
    packed = [f"model.{name} {value}" for name, value in asked.items() if value not in ("auto", "16bit", "card")]
    if not packed:
        return
    if engine != "vllm" or model.share_weights == "copy":
        held = "model.share_weights: require" if engine == "vllm" else "model.engine: vllm"
        other = "the trainer's own copy of the weights" if engine == "vllm" else f"the {engine} engine"
        raise PlanError(
            f"{packed[0]} is asked for, which {other} cannot have",
            hint=f"{held}; or model.head: auto and model.embedding: auto",
        )
    if shape.scaled_embedding:
        raise PlanError(
            f"{packed[0]} is asked for; this model's embedding multiplies its rows and is held in 16 bits only",
            hint="model.head: auto and model.embedding: auto",
        )
    if shape.tied_embeddings and (model.embedding in _NEVER_TIED or model.head == "16bit"):
        apart = f"model.embedding {model.embedding}" if model.embedding in _NEVER_TIED else " and ".join(packed)
        beside = "" if model.embedding in _NEVER_TIED else f" with model.head {model.head}"
        raise PlanError(
            f"the model uses one tensor for embedding and output head: {apart} cannot be had{beside}",
            hint="model.head: int8 and model.embedding: auto hold both in 8 bits",
        )


def vocabulary_ways(
    config: Config, shape: ModelShape, machine: Machine, *, engine: str, kept: Mapping[str, Any]
) -> Iterator[tuple[HeadFormat, EmbeddingPlace]]:
    """Yield the ways to hold output head and input embedding that the settings allow, the plainest first.

    A resumed run goes on with what it began with, unless that needs pinned memory and there is none any more.
    """
    head, embedding = config.model.head, config.model.embedding
    if head == "auto" and "head" in kept:
        head = kept["head"]
    if embedding == "auto" and "embedding" in kept and (kept["embedding"] != "host" or machine.pins):
        embedding = kept["embedding"]
    packs = machine.device == "cuda" and can_pack(engine, config, shape) and bool(config.lora.r)
    ways: list[tuple[HeadFormat, EmbeddingPlace]] = [("16bit", "card")]
    if packs and shape.tied_embeddings:
        ways.append(("int8", "int8"))
    elif packs:
        ways += _PINNED if machine.pins else _ON_CARD
    seen: set[tuple[HeadFormat, EmbeddingPlace]] = set()
    for plain_head, plain_embedding in ways:
        way = (plain_head if head == "auto" else head, plain_embedding if embedding == "auto" else embedding)
        if shape.tied_embeddings and "int8" in way and head != "16bit" and embedding not in _NEVER_TIED:
            way = _BOTH  # one tensor
        if way not in seen:
            seen.add(way)
            yield way
