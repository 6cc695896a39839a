"""The installation of peers, as far as it goes without a network."""

from __future__ import annotations

import pytest

from scripts import install_peers
from scripts.install_peers import PEERS_BY_NAME, cmake_arguments, main


def test_llama_is_built_for_what_the_cpu_has():
    arguments = cmake_arguments(
        "model name\t: X\nflags\t\t: fpu avx2 avx512f avx512_bf16\nbugs\t\t:\n"
    ).split()
    assert {"-DGGML_NATIVE=OFF", "-DGGML_AVX512=ON", "-DGGML_AVX512_BF16=ON"} < set(arguments)
    assert "-DGGML_AVX512_VNNI=ON" not in arguments


def test_llama_is_built_without_flags_where_none_are_known():
    assert "=ON" not in cmake_arguments("")


def test_every_requirement_is_pinned():
    assert all("==" in requirement for peer in PEERS_BY_NAME.values() for requirement in peer.requirements)


def test_only_what_is_missing_is_installed(tmp_path, monkeypatch, capsys):
    installed: list[str] = []
    monkeypatch.setattr(install_peers, "PEERS", tmp_path)
    monkeypatch.setattr(install_peers, "install", lambda peer, folder: installed.append(peer.name))
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / ".installed").touch()
    monkeypatch.setattr("sys.argv", ["install_peers", "vllm", "llama"])
    main()
    assert installed == ["llama"]


def test_an_unknown_peer_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["install_peers", "sglang"])
    with pytest.raises(SystemExit):
        main()
    assert "unknown peer 'sglang'" in capsys.readouterr().err
