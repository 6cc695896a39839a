"""The two files that an experiment leaves, and the command that makes them."""

from __future__ import annotations

import json
import platform
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from loadtests.cli import app
from loadtests.client import Outcome, Result
from loadtests.experiment import Block, Run
from loadtests.machine import machine
from loadtests.ratios import compare_arms
from loadtests.report import Report, render_page, write_report
from loadtests.summary import summarise

HOSTILE = ["<script>alert(1)</script>", "$\\frac{", "_under & \"quoted' ]]> -->", "{{ 7 * 7 }}"]


class Page(HTMLParser):
    """The text of a page, its elements, and what its attributes refer to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.elements: set[str] = set()
        self.references: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        names = ("src", "href", "xlink:href", "srcset", "data", "action")
        self.references += [value or "" for name, value in attrs if name in names]

    def handle_data(self, data: str) -> None:
        self.text += data


def results(seconds, outcome=Outcome.OK):
    return [Result("m", n / 10, n / 10, n / 10 + seconds, outcome, 200, (n / 10 + 0.05,)) for n in range(10)]


@pytest.fixture
def report(experiment):
    """Makes a report on made-up results of the arms."""

    def make(*arms: str) -> Report:
        config = experiment({arm: ["m", "<b>"] for arm in arms}, rates=[10.0, 20.0, 30.0])
        blocks = [
            Block(n, rate, arm, 1.0, [*results(0.1 + number / 100), *results(0.3, Outcome.TIMEOUT)[:1]])
            for n in range(2)
            for rate in config.rates
            for number, arm in enumerate(arms)
        ]
        run = Run(arms, config.rates, {}, blocks)
        return Report("a & b", "now", machine(), config, summarise(run), compare_arms(run, seed=0), run)

    return make


def test_the_page_shows_every_arm_rate_and_figure(report):
    page = Page(render_page(report("lora", "molex", "base")))
    for words in ("lora", "molex", "base", "10.0", "20.0", "30.0", "timeout 2"):
        assert words in page.text
    for arm in ("molex", "base"):
        assert page.text.count(f"{arm} ÷ lora") == 2 * 3  # two metrics at three rates
    assert page.elements >= {"table", "svg"}
    assert "110.0" in page.text  # milliseconds of the second arm
    assert "1.10 [1.10, 1.10]" in page.text
    assert "mathdefault" not in page.text  # matplotlib's markup of powers


def test_the_page_shows_what_servers_told(report):
    made = report("lora", "molex")
    summaries = [replace(summary, stages={"in pass": [0.0123] * 4}) for summary in made.summaries]
    page = Page(render_page(replace(made, summaries=summaries)))
    assert page.text.count("12.3") == len(summaries) * 4


def test_hostile_names_are_text(report):
    html = render_page(report(*HOSTILE))
    page = Page(html)
    assert "script" not in page.elements
    assert "b" not in page.elements
    for name in HOSTILE:
        # In the tables, and in the legends of both charts.
        assert page.text.count(name) >= 4
    assert "a & b" in page.text


def test_the_page_needs_nothing_else(report):
    html = render_page(report("lora", "molex"))
    page = Page(html)
    assert [reference for reference in page.references if not reference.startswith("#")] == []
    assert not page.elements & {"script", "link", "iframe", "img", "object", "embed", "base"}
    assert "@import" not in html
    assert html.count("url(") == html.count("url(#")


def test_the_data_has_everything(report, tmp_path):
    made = report("lora", "molex")
    write_report(made, tmp_path / "new")
    data = json.loads((tmp_path / "new" / "results.json").read_text(encoding="utf-8"))
    assert data["machine"]["python"] == platform.python_version()
    assert data["machine"]["cpu"]
    assert data["config"]["arms"][0]["models"] == ["m", "<b>"]
    assert sum(len(block["results"]) for block in data["run"]["blocks"]) == 2 * 3 * 2 * 11
    assert data["run"]["blocks"][0]["results"][0]["outcome"] == "ok"
    summary = data["summaries"][0]
    assert summary["latency"]["total"] == [pytest.approx(0.1), pytest.approx(0.1), None, None]
    assert {ratio["over"] for ratio in data["ratios"]} == {"molex"}


def test_a_page_on_nothing_but_failures(experiment):
    config = experiment({"down": ["m"]}, rates=[10.0])
    failed = [Block(n, 10.0, "down", 1.0, results(0.1, Outcome.TRANSPORT_ERROR)) for n in range(2)]
    run = Run(["down"], [10.0], {}, failed)
    page = Page(render_page(Report("down", "now", machine(), config, summarise(run), [], run)))
    assert "transport error 20" in page.text
    assert "svg" in page.elements


@pytest.fixture
def write_config(tmp_path, url):
    """Writes a configuration of one arm on the stub."""

    def write(**changes: str) -> str:
        arm = {"name": "stub", "url": url, "dialect": "openai-completions"} | changes
        lines = ['texts = "texts.tsv"', "rates = [30.0]", "rounds = 2", "block_seconds = 0.5"]
        lines += ["warmup_seconds = 0.1", "[[arms]]", 'models = ["1ms"]', "max_tokens = 3"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in arm.items()]
        (tmp_path / "texts.tsv").write_text("text\nhello\n", encoding="utf-8")
        (tmp_path / "small.toml").write_text("\n".join(lines), encoding="utf-8")
        return str(tmp_path / "small.toml")

    return write


def invoke(config: str, output) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["run", "--config", config, "--output", str(output)])
    return done.exit_code, done.output


def test_the_command_runs_an_experiment(write_config, tmp_path):
    status, printed = invoke(write_config(), tmp_path / "out")
    assert status == 0
    assert "[2/2] stub at 30.0/s" in printed
    data = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert data["summaries"][0]["latency"].keys() == {"total", "first token", "between tokens"}
    assert "between tokens" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_the_command_refuses_another_machine(write_config, tmp_path):
    status, printed = invoke(write_config(url="http://10.0.0.1:8000"), tmp_path / "out")
    assert status == 2
    assert "small.toml: arms.0.url: 10.0.0.1 is not this machine" in printed
    assert not (tmp_path / "out").exists()


def test_the_command_names_missing_texts(write_config, tmp_path):
    config = write_config()
    (tmp_path / "texts.tsv").unlink()
    status, printed = invoke(config, tmp_path / "out")
    assert status == 2
    assert "small.toml: texts: " in printed
