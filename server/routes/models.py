"""`GET /v1/models`."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel

from server.base import Base
from server.deps import EngineDep, find_adapter, visible
from server.errors import model_not_found
from server.routes.access import Infer
from server.schemas import ModelName
from server.served import ServedAdapter

router = APIRouter(tags=["models"])


class ModelCard(BaseModel):
    """A base, or an adapter with its `parent` base."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "molex"
    root: str
    parent: str | None
    max_model_len: int
    kind: str
    task: str | None
    digest: str


class ModelList(BaseModel):
    object: str = "list"
    data: list[ModelCard]


@router.get("/v1/models")
async def list_models(engine: EngineDep, caller: Infer) -> ModelList:
    """The bases and the adapters; each name can be a request's `model`."""
    cards = [base_card(base) for base in engine.bases.values()]
    cards += [adapter_card(served, engine.bases[served.base]) for served in visible(engine, caller)]
    return ModelList(data=cards)


@router.get("/v1/models/{model:path}")
async def get_model(model: ModelName, engine: EngineDep, caller: Infer) -> ModelCard:
    """One base or adapter."""
    if model in engine.bases:
        return base_card(engine.bases[model])
    served = find_adapter(engine, caller, model)
    if served is None:
        raise model_not_found(model)
    return adapter_card(served, engine.bases[served.base])


def base_card(base: Base) -> ModelCard:
    return ModelCard(
        id=base.name,
        created=base.created,
        root=base.name,
        parent=None,
        max_model_len=base.tokenization.max_length,
        kind="base",
        task="CAUSAL_LM" if base.model.spec.generates else None,
        digest=base.model.spec.digest,
    )


def adapter_card(served: ServedAdapter, base: Base) -> ModelCard:
    return ModelCard(
        id=served.name,
        created=served.created,
        root=served.source,
        parent=base.name,
        max_model_len=base.tokenization.max_length,
        kind=served.config.kind,
        task=served.config.task_type,
        digest=served.digest,
    )
