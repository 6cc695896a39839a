"""`POST /v1/embeddings`."""

from __future__ import annotations

import base64

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from server.deps import EngineDep, encoder
from server.routes.access import Infer
from server.routes.prompts import PromptUsage, run_prompts
from server.schemas import EmbeddingsRequest
from server.sequence import Sequence

router = APIRouter(tags=["embeddings"])


class Embedding(BaseModel):
    """The vector of one input: its numbers, or the base64 of its bytes as little-endian float32."""

    object: str = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsResponse(BaseModel):
    """OpenAI's answer."""

    object: str = "list"
    data: list[Embedding]
    model: str
    usage: PromptUsage


@router.post("/v1/embeddings")
async def create_embeddings(
    body: EmbeddingsRequest, request: Request, response: Response, engine: EngineDep, caller: Infer
) -> EmbeddingsResponse:
    """Embed one or more texts with a bare encoder.

    An embedding is the mean of the last hidden states of the text's tokens, special ones included, scaled to
    length 1: the pooling of e5 and the default of sentence-transformers. Prefixes such as e5's `query: ` are
    the caller's.
    """
    target = encoder(engine, caller, body.model)
    sequences = await run_prompts(engine, target, body.inputs, request, response, priority=body.priority)
    encoded = body.encoding_format == "base64"
    return EmbeddingsResponse(
        data=[_embedding(sequence, encoded=encoded) for sequence in sequences],
        model=target.name,
        usage=PromptUsage.of(sequences),
    )


def _embedding(sequence: Sequence, *, encoded: bool) -> Embedding:
    vector = normalized(sequence.embedding)
    return Embedding(index=sequence.index, embedding=_base64(vector) if encoded else vector)


def normalized(vector: list[float]) -> list[float]:
    """The vector scaled to length 1."""
    numbers = np.array(vector, np.float32)
    scaled: list[float] = (numbers / max(float(np.linalg.norm(numbers)), 1e-12)).tolist()
    return scaled


def _base64(vector: list[float]) -> str:
    return base64.b64encode(np.array(vector, "<f4").tobytes()).decode()
