"""Adapters from a model hub or an object store, where the operator allows it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from fsspec.core import url_to_fs
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from molex.adapter_file import CONFIG_NAME, WEIGHTS_NAME, AdapterFiles
from server.errors import ErrorKind, ServiceError

PACKAGES = {"hf": "huggingface_hub", "s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}
"""The schemes that there are, and what each needs."""
TENANT = "{tenant}"
ANSWER_SECONDS = 10
"""How long a hub may be silent when it is asked for metadata; its client has the same limit for files."""
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_HUB = re.compile(rf"hf://({_PART}/{_PART})(?:@({_PART}(?:/{_PART})*))?")
_STORE = re.compile(rf"(?:s3|gs|az)://{_PART}(?:/[A-Za-z0-9._=-]*[A-Za-z0-9_=-])*")

log = logging.getLogger(__name__)


def is_remote(source: str) -> bool:
    """Whether a source is a URI of something elsewhere, and no folder here."""
    return "://" in source and not source.startswith("file://")


class Remote:
    """Fetches adapters from URIs that begin like one of `allowed`.

    `{tenant}` in one of those stands for the tenant that asks, so that no tenant reads what is another's with
    the credentials of the server.
    """

    def __init__(self, allowed: Iterable[str], max_bytes: int) -> None:
        self._allowed = tuple(allowed)
        self._max_bytes = max_bytes

    def check(self, uri: str, tenant: str) -> None:
        """Raises ServiceError where a tenant may not load from a URI."""
        if not (_HUB.fullmatch(uri) or _STORE.fullmatch(uri)):
            message = f"{uri!r} is no source: hf://ORG/REPO@REVISION or s3://BUCKET/PREFIX"
            raise ServiceError(ErrorKind.INVALID_REQUEST, message, param="source")
        if not any(_begins(uri, prefix, tenant) for prefix in self._allowed):
            message = f"this server does not load from {uri!r}: the operator allows sources with --source"
            raise ServiceError(ErrorKind.FORBIDDEN_SOURCE, message, param="source")

    def fetch(self, uri: str) -> tuple[AdapterFiles, str]:
        """The files at a URI, and a URI that goes on naming just these where there is one.

        Blocks. Raises ServiceError: 400 where nothing usable is there, 503 where the source does not answer.
        """
        try:
            hub = _HUB.fullmatch(uri)
            return self._from_hub(hub[1], hub[2]) if hub else (self._from_store(uri), uri)
        except (
            FileNotFoundError,
            EntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        ) as error:
            raise _bad(f"there is no adapter at {uri}") from error
        except ImportError as error:
            package = PACKAGES[uri.partition("://")[0]]
            raise _bad(f"{uri}: this server lacks the package {package}") from error
        except ServiceError:
            raise
        except Exception as error:
            # Clients of stores raise what they like. The log has it; callers learn nothing of the inside.
            log.warning("%s cannot be fetched", uri, exc_info=True)
            message = f"{uri} cannot be fetched for now"
            raise ServiceError(ErrorKind.SOURCE_DOWN, message, param="source", retry_after=5) from error

    def _from_hub(self, repository: str, revision: str | None) -> tuple[AdapterFiles, str]:
        api = HfApi()
        info = api.model_info(repository, revision=revision, files_metadata=True, timeout=ANSWER_SECONDS)
        sizes = {file.rfilename: file.size for file in info.siblings or ()}
        commit = f"hf://{repository}@{info.sha}"
        with TemporaryDirectory(prefix="molex-") as folder:
            contents = []
            for name in (CONFIG_NAME, WEIGHTS_NAME):
                self._check_size(name, sizes.get(name, 0), commit)
                path = api.hf_hub_download(repository, name, revision=info.sha, local_dir=folder)
                contents.append(Path(path).read_bytes())
        return AdapterFiles(*contents), commit

    def _from_store(self, uri: str) -> AdapterFiles:
        system, folder = url_to_fs(uri)
        contents = []
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            path = f"{folder.rstrip('/')}/{name}"
            size = system.info(path)["size"]
            self._check_size(name, size, uri)
            # No more than was announced, should it grow meanwhile.
            contents.append(system.cat_file(path, end=size))
        return AdapterFiles(*contents)

    def _check_size(self, name: str, size: int | None, uri: str) -> None:
        if size is None or size > self._max_bytes:
            message = f"{name} at {uri} has {size} bytes; max_adapter_bytes is {self._max_bytes}"
            raise ServiceError(ErrorKind.TOO_LARGE, message, param=name)


def _begins(uri: str, prefix: str, tenant: str) -> bool:
    """Whether a URI is what a prefix names or lies below it."""
    if TENANT in prefix and not tenant:
        return False
    prefix = prefix.replace(TENANT, tenant)
    return uri.startswith(prefix) and (prefix[-1] in "/@" or uri[len(prefix) :][:1] in ("", "/", "@"))


def _bad(message: str) -> ServiceError:
    return ServiceError(ErrorKind.BAD_ADAPTER, message, param="source")
