"""From an experiment's configuration to its report."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime

from loadtests.config import Config
from loadtests.experiment import Tell, run_experiment
from loadtests.machine import machine
from loadtests.ratios import compare_arms
from loadtests.report import Report
from loadtests.summary import summarise


def measure(config: Config, texts: Sequence[str], title: str, tell: Tell) -> Report:
    """Run an experiment on servers that are up; `tell` gets a line for each step. Raises LoadTestError."""
    started, facts = datetime.now(UTC).isoformat(timespec="seconds"), machine()
    run = asyncio.run(run_experiment(config, texts, tell))
    return Report(
        title=title,
        started=started,
        machine=facts,
        config=config,
        summaries=summarise(run),
        ratios=compare_arms(run, config.seed),
        run=run,
    )
