"""A server with two tenants."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator

import httpx
import pytest
from pydantic import SecretStr

from server.catalogue.catalogue import Catalogue
from server.catalogue.database import migrate
from server.catalogue.records import Scope
from server.catalogue.url import parse_url
from tests.server.conftest import PEPPER, Live, live_server

TENANTS = ("acme", "other")


@pytest.fixture(scope="module")
def scene(settings, adapters_folder, tmp_path_factory) -> Iterator[tuple[Live, dict[str, httpx.Client]]]:
    """A server, and a client for each tenant, whose folder has the adapters `secret` and `topic`."""
    folder = tmp_path_factory.mktemp("tenants")
    for tenant in TENANTS:
        shutil.copytree(adapters_folder / "mood", folder / tenant / "secret")
        shutil.copytree(adapters_folder / "topic", folder / tenant / "topic")
    database = f"sqlite:///{folder}/catalogue.db"
    url = parse_url(database)
    migrate(url)

    async def tokens() -> list[str]:
        catalogue = Catalogue(url, PEPPER)
        made = []
        for tenant in TENANTS:
            await catalogue.set_tenant(tenant, {}, actor="test")
            made.append((await catalogue.create_key(tenant, frozenset(Scope), actor="test"))[1])
        await catalogue.close()
        return made

    changes = {"database": database, "pepper": SecretStr(PEPPER), "adapter_root": folder}
    keys = asyncio.run(tokens())
    with live_server(settings.model_copy(update=changes)) as live:
        clients = {
            tenant: httpx.Client(base_url=live.url, headers={"authorization": f"Bearer {key}"}, timeout=60)
            for tenant, key in zip(TENANTS, keys, strict=True)
        }
        yield live, clients
        for client in clients.values():
            client.close()


@pytest.fixture
def acme(scene) -> Iterator[httpx.Client]:
    """The client of a tenant that has loaded `acme/secret`."""
    client = scene[1]["acme"]
    assert client.put("/v1/adapters/secret?wait=60", json={"source": "secret"}).status_code == 201
    yield client
    client.delete("/v1/adapters/secret")


@pytest.fixture
def other(scene) -> httpx.Client:
    return scene[1]["other"]
