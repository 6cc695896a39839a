"""The HTTP service around `molex`: many adapters, one base, one batch."""

import os

SPIN_COUNT = 4000
"""How often a thread looks whether the others of a pass have come, before it sleeps: some 100 µs of looking.

By default GNU's OpenMP looks for milliseconds, and a pass has hundreds of such meetings. Where another
process wants a core too, that waiting may keep it from the very thread that is waited for
(`benchmarks/bench_waiting.py`).
"""

# Read when PyTorch loads OpenMP, which has to come after this.
os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
