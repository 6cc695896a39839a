"""Who sent a request."""

from __future__ import annotations

from dataclasses import dataclass, field

from server.catalogue.records import Quota, Scope
from server.errors import adapter_not_found


@dataclass(frozen=True)
class Caller:
    """The tenant of a request and what its key allows.

    The tenant comes from the key and from nothing else. Adapters of a tenant are named `TENANT/NAME`;
    names without a tenant are those that the operator shares.
    """

    tenant: str | None
    """None where no keys are needed."""
    key_id: str | None
    scopes: frozenset[Scope]
    quota: Quota = field(default_factory=Quota)

    @property
    def actor(self) -> str:
        """Who acts, as the audit log has it."""
        return self.key_id or "server"

    def names(self, name: str) -> list[str]:
        """The full names of the adapters that `name` may mean to this caller, the first one first."""
        if self.tenant is None:
            return [name]
        owner, separator, _ = name.partition("/")
        if separator:
            return [name] if owner == self.tenant else []
        return [f"{self.tenant}/{name}", name]

    def own_name(self, name: str) -> str:
        """The full name of an adapter of the caller's own.

        Raises ServiceError (404), the same as for a missing adapter, where it names another tenant.
        """
        names = self.names(name)
        if not names:
            raise adapter_not_found(name)
        return names[0]

    def may_see(self, full_name: str) -> bool:
        owner, separator, _ = full_name.partition("/")
        return not separator or owner == self.tenant


ANYONE = Caller(None, None, frozenset(Scope))
"""Every caller of a server without a catalogue."""
