"""Configurations are read strictly; an error names file and key."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from loadtests.config import Arm, Config, read_config
from loadtests.errors import ConfigError
from loadtests.texts import read_texts

FOLDER = Path(__file__).resolve().parents[2] / "loadtests"
GOOD = """
texts = "texts.txt"
rates = [10, 20.5]

[[arms]]
name = "one"
url = "http://127.0.0.1:8000"
dialect = "molex-classify"
models = ["mood"]
"""


@pytest.fixture
def read(tmp_path):
    """Reads a configuration that is given as text."""

    def read_text(text: str, *, allow_remote: bool = False) -> Config:
        path = tmp_path / "some.toml"
        path.write_text(text, encoding="utf-8")
        return read_config(path, allow_remote=allow_remote)

    return read_text


def test_a_good_file(read):
    config = read(GOOD)
    assert config.rates == [10, 20.5]
    assert config.arms[0].models == ["mood"]


@pytest.mark.parametrize(
    ("change", "key", "words"),
    [
        (("rates", "rate"), "rate", "not permitted"),
        (('name = "one"', 'name = "one"\nport = 1'), "arms.0.port", "not permitted"),
        (("[10, 20.5]", "[10, -1]"), "rates.1", "greater than 0"),
        (("[10, 20.5]", '["10"]'), "rates.0", "valid number"),
        (("[10, 20.5]", "[nan]"), "rates.0", "finite number"),
        (("[10, 20.5]", "[]"), "rates", "at least 1"),
        (("[10, 20.5]", "[10, 10.0]"), "some.toml", "a value twice"),
        (("rates", "shares = [0.5]\nrates"), "some.toml", "either rates or shares"),
        (("rates = [10, 20.5]", ""), "some.toml", "either rates or shares"),
        (("rates", 'popularity = "zipf"\nrates'), "popularity", "zipf:EXPONENT"),
        (("rates", "rounds = 1\nrates"), "rounds", "greater than or equal to 2"),
        (("rates", "seed = 1.5\nrates"), "seed", "valid integer"),
        (("molex-classify", "grpc"), "arms.0.dialect", "infinity-embeddings"),
        (("molex-classify", "openai-completions"), "arms.0", "needs max_tokens"),
        (('name = "one"', 'name = "one"\nmax_tokens = 8'), "arms.0", "needs max_tokens"),
        (('["mood"]', "[]"), "arms.0.models", "at least 1"),
        (("http://127.0.0.1:8000", "127.0.0.1:8000"), "arms.0.url", "no HTTP URL"),
        (("http://127.0.0.1:8000", "http://"), "arms.0.url", "no HTTP URL"),
        (("127.0.0.1:8000", "127.0.0.1:80000"), "arms.0.url", "no HTTP URL"),
        (("127.0.0.1:8000", "127.0.0.1:port"), "arms.0.url", "no URL"),
        (("[[arms]]", "[[arms]"), "some.toml", "line 5"),
        (("[[arms]]", "[arms]"), "arms", "valid list"),
        (('"texts.txt"', "1"), "texts", "valid string"),
    ],
)
def test_an_error_names_file_and_key(change, key, words, read):
    with pytest.raises(ConfigError) as caught:
        read(GOOD.replace(*change))
    assert any("some.toml: " in line and f"{key}: " in line for line in str(caught.value).splitlines())
    assert words in str(caught.value)


def test_two_arms_of_one_name_are_refused(read):
    with pytest.raises(ConfigError, match="same name"):
        read(GOOD + GOOD[GOOD.index("[[arms]]") :])


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml"):
        read_config(tmp_path / "none.toml", allow_remote=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "[::1]", "localhost"])
def test_this_machine_is_allowed(host, read):
    url = f"http://{host}:8000"
    assert read(GOOD.replace("http://127.0.0.1:8000", url)).arms[0].url == url


@pytest.mark.parametrize(
    "host", ["10.0.0.1", "192.168.0.1", "0.0.0.0", "example.org", "localhost.example.org", "[::2]", "127.1"]
)
def test_other_machines_are_refused_without_the_flag(host, read):
    text = GOOD.replace("127.0.0.1", host)
    with pytest.raises(ConfigError, match=r"arms\.0\.url: .* is not this machine; --allow-remote"):
        read(text)
    assert read(text, allow_remote=True).arms[0].url == f"http://{host}:8000"


@given(st.text())
def test_an_accepted_url_is_of_this_machine(rest):
    arm = {"name": "one", "dialect": "molex-classify", "models": ["mood"]}
    try:
        accepted = Arm.model_validate(arm | {"url": f"http://{rest}"})
    except ValidationError:
        return
    host = httpx.URL(accepted.url).host
    assert host == "localhost" or ip_address(host).is_loopback


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_no_text_crashes_the_reader(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("any") / "any.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"any\.toml: "):
        read_config(path, allow_remote=False)


def test_the_example_and_its_texts_are_good():
    config = read_config(FOLDER / "demo_encoder.toml", allow_remote=False)
    assert [arm.name for arm in config.arms] == ["lora", "molex"]
    assert len(set(read_texts(FOLDER / config.texts))) >= 40


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("lines.txt", "one\n\n  \ntwo \n", ["one", "two "]),
        ("table.tsv", 'label\ttext\n1\tsay "x"\n0\ttwo\n', ['say "x"', "two"]),
    ],
)
def test_texts(name, content, texts, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_texts(tmp_path / name) == texts


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("lines.txt", "\n \n", "no texts"),
        ("table.tsv", "label\n1\n", "no column 'text'"),
        ("table.tsv", "text\n", "no texts"),
        ("table.tsv", "", "no column 'text'"),
    ],
)
def test_texts_that_are_not_there(name, content, words, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        read_texts(tmp_path / name)
