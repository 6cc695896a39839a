from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.detokenizer import MAX_HELD_TOKENS, REPLACEMENT, Detokenizer, StopStrings, TextStream


def decode(token_ids) -> str:
    """One token per byte, as the worst of byte-level tokenizers."""
    return bytes(token_ids).decode("utf-8", errors="replace")


def decode_words(token_ids) -> str:
    """A tokenizer that drops the space in front of a text."""
    return " ".join(f"w{token}" for token in token_ids)


def pieces(text: str, *stop: str, prompt: str = "x") -> list[str]:
    stream = TextStream(decode, prompt.encode(), stop)
    out = []
    for token in text.encode():
        out.append(stream.push(token))
        if stream.stopped:
            return out
    return [*out, stream.end()]


readable = st.text(st.characters(codec="utf-8", exclude_characters=REPLACEMENT), max_size=40)


@given(readable, readable)
def test_pieces_are_whole_characters_that_join_to_the_text(text, prompt):
    out = pieces(text, prompt=prompt)
    assert "".join(out) == text
    assert not any(REPLACEMENT in piece for piece in out)


def test_a_character_waits_for_its_last_byte():
    assert pieces("a😀b") == ["a", "", "", "", "😀", "b", ""]


def test_half_a_character_at_the_end_is_left_out():
    stream = TextStream(decode, b"x", ())
    assert stream.push("é".encode()[0]) == ""
    assert stream.end() == ""


def test_bytes_that_are_no_character_are_not_held_for_ever():
    detokenizer = Detokenizer(decode, b"x")
    out = [detokenizer.push(0xFF) for _ in range(MAX_HELD_TOKENS)]
    assert "".join(out) == REPLACEMENT * MAX_HELD_TOKENS


def test_the_space_between_prompt_and_text_is_kept():
    stream = TextStream(decode_words, [1, 2], ())
    assert [stream.push(3), stream.push(4)] == [" w3", " w4"]


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string_and_no_part_of_it_goes_out(text, stop):
    out = "".join(pieces(text, *stop))
    # The first one to be complete, as a reader of the stream would see it.
    ends = [text.find(s) + len(s) for s in stop if s in text]
    expected = text
    if ends:
        seen = text[: min(ends)]
        expected = seen[: min(seen.find(s) for s in stop if s in seen)]
    assert out == expected


def test_what_might_become_a_stop_string_is_held_until_it_cannot():
    assert pieces("aabx", "abc") == ["", "a", "", "abx", ""]
    assert pieces("ab", "abc") == ["", "", "ab"]


def test_nothing_follows_a_stop_string():
    stop = StopStrings(["END"])
    assert stop.push("oneENDtwo") == "one"
    assert stop.stopped
    assert stop.flush() == ""
