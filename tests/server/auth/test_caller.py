from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.auth.caller import ANYONE, Caller
from server.catalogue.records import Scope
from server.errors import ErrorKind, ServiceError

ACME = Caller("acme", "0" * 16, frozenset(Scope))


def test_a_short_name_is_ones_own_before_the_shared_one():
    assert ACME.names("x") == ["acme/x", "x"]
    assert ACME.names("acme/x") == ["acme/x"]
    assert ACME.own_name("x") == ACME.own_name("acme/x") == "acme/x"


@given(st.text(max_size=20), st.text(max_size=20))
def test_no_name_leads_to_another_tenant(owner, rest):
    for name in (f"{owner}/{rest}", owner, rest):
        assert all(ACME.may_see(full_name) for full_name in ACME.names(name))


def test_a_foreign_name_is_a_missing_one():
    assert ACME.names("other/x") == []
    assert not ACME.may_see("other/x")
    with pytest.raises(ServiceError) as caught:
        ACME.own_name("other/x")
    assert caught.value.kind is ErrorKind.ADAPTER_NOT_FOUND


def test_without_keys_names_are_what_they_are():
    assert ANYONE.names("x") == ["x"]
    assert ANYONE.own_name("x") == "x"
