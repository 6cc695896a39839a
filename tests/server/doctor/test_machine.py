"""What is said of the machine."""

from __future__ import annotations

import os
from importlib.metadata import version

import pytest
import torch

from server.doctor import machine


@pytest.fixture
def container(monkeypatch, tmp_path):
    """Sets the limits of a container that this process would be in."""
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    return lambda **files: [
        (tmp_path / name.replace("_", ".")).write_text(text) for name, text in files.items()
    ]


def test_the_libraries_are_named_with_their_versions():
    facts = {finding.topic: finding.fact for finding in machine.machine()}
    assert f"torch {torch.__version__}" in facts["packages"]
    assert f"transformers {version('transformers')}" in facts["packages"]
    assert facts["threads"].startswith(f"{torch.get_num_threads()} for products")
    assert facts["cpu"]


def test_a_library_out_of_its_range_is_a_problem(monkeypatch):
    wanted = ["torch>=2.13,<2.14", "numpy>=99", "no-such-package>=1", 'nor-this; extra == "train"']
    monkeypatch.setattr(machine, "requires", lambda name: wanted)
    problem = machine.packages().problem
    numpy = f"the package numpy is {version('numpy')}, but has to be >=99"
    assert problem == f"{numpy}; the package no-such-package is not installed"


def test_the_libraries_of_this_environment_fit():
    assert machine.packages().problem is None


def test_a_container_bounds_cpus_and_memory(container):
    container(cpu_max="150000 100000", memory_max=f"{3 << 30}", memory_current=f"{1 << 30}")
    assert machine.usable_cpus() == min(1.5, len(os.sched_getaffinity(0)))
    assert machine.total_memory() == 3 << 30
    assert machine.available_memory() == 2 << 30
    container(memory_stat=f"anon 5\ninactive_file {1 << 29}\n")
    assert machine.available_memory() == (2 << 30) + (1 << 29)


def test_a_container_without_limits_bounds_nothing(container):
    free = machine.usable_cpus()
    container(cpu_max="max 100000", memory_max="max", memory_current="5")
    assert machine.usable_cpus() == free == len(os.sched_getaffinity(0))
    assert machine.total_memory() > machine.available_memory() > 0


def test_more_threads_than_cpus_are_pointed_out(container, monkeypatch):
    container(cpu_max="200000 100000")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    [threads] = [finding for finding in machine.machine() if finding.topic == "threads"]
    cpus = min(2, len(os.sched_getaffinity(0)))
    assert f"set OMP_NUM_THREADS={cpus}" in threads.fact
    assert threads.problem is None
