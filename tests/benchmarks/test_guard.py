"""A guard against losing the speed of a packed batch: the engine against the reference, side by side.

Both run the same requests of the same adapters in the same process, in turns, so that a slow or busy machine
slows both. Of what packing gains only a small part is asked for: the test fails if the batch falls apart into
requests, not if the machine is noisy.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.common import measure
from molex import MolexModel, Row
from molex.reference import Reference
from tests.tiny import molex_config, random_adapter, random_ids

REQUESTS = 32
ADAPTERS = 4
MARGIN = 1.5


def test_a_packed_batch_is_faster_than_its_requests_one_by_one(base_folder, spec_of):
    folder, spec = base_folder("roberta"), spec_of("roberta")
    adapters = [random_adapter(spec, seed=seed, molex=molex_config()) for seed in range(ADAPTERS)]
    rows = [Row(random_ids(8 + n % 24, seed=n), adapters[n % ADAPTERS]) for n in range(REQUESTS)]
    engine, reference = MolexModel.from_pretrained(folder), Reference(folder)
    engine.prepack()

    @torch.inference_mode()
    def packed() -> list[torch.Tensor]:
        return engine.run(rows).logits

    def one_by_one() -> list[torch.Tensor]:
        return [reference(row.token_ids, row.adapter)[0] for row in rows]

    for ours, theirs in zip(packed(), one_by_one(), strict=True):
        assert ours.tolist() == pytest.approx(theirs.tolist(), rel=1e-3, abs=1e-3)
    medians = measure({"packed": packed, "one by one": one_by_one}, rounds=5)
    assert medians["one by one"] > MARGIN * medians["packed"]
