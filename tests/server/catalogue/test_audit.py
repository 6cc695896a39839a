from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.catalogue.audit import FIRST_HASH, entry_hash, first_broken
from server.catalogue.records import AuditEntry


def chain(length: int) -> list[AuditEntry]:
    entries: list[AuditEntry] = []
    for number in range(1, length + 1):
        entry = AuditEntry(number, 100 + number, "actor", "action", f"key:{number}", "{}", "")
        previous = entries[-1].hash if entries else FIRST_HASH
        entries.append(replace(entry, hash=entry_hash(entry, previous)))
    return entries


def head(entries: list[AuditEntry]) -> tuple[int, str]:
    return (entries[-1].number, entries[-1].hash) if entries else (0, FIRST_HASH)


@given(st.integers(0, 10))
def test_a_whole_log_is_sound(length):
    entries = chain(length)
    assert first_broken(entries, head(entries)) is None


@given(st.integers(0, 5), st.sampled_from(["time", "actor", "action", "subject", "detail", "hash"]))
def test_a_changed_field_is_seen_at_its_entry(index, field):
    entries = chain(6)
    value = getattr(entries[index], field)
    changed = value + 1 if isinstance(value, int) else "0" * 63 + "f" if field == "hash" else value + "x"
    spoilt = [*entries]
    spoilt[index] = replace(entries[index], **{field: changed})
    assert str(index + 1) in (first_broken(spoilt, head(entries)) or "")


@given(st.integers(0, 5))
def test_an_entry_that_was_changed_with_its_hash_is_seen_at_the_next_one(index):
    entries = chain(6)
    previous = entries[index - 1].hash if index else FIRST_HASH
    changed = replace(entries[index], actor="somebody else")
    spoilt = [*entries]
    spoilt[index] = replace(changed, hash=entry_hash(changed, previous))
    expected = f"entry {index + 2} was changed, or one before it" if index < 5 else "the log ends at entry 6"
    assert expected in (first_broken(spoilt, head(entries)) or "")


@given(st.integers(0, 5))
def test_a_missing_entry_is_seen(index):
    entries = chain(6)
    assert first_broken(entries[:index] + entries[index + 1 :], head(entries)) is not None


def test_entries_that_changed_places_are_seen():
    entries = chain(3)
    assert first_broken([entries[1], entries[0], entries[2]], head(entries)) == "entry 1 is missing"


@pytest.mark.parametrize("left", [0, 2])
def test_a_log_that_lost_its_end_is_seen(left):
    entries = chain(3)
    assert "newest was 3" in (first_broken(entries[:left], head(entries)) or "")
