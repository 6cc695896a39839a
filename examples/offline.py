"""The Python API: two adapters and the bare base in one batch, without a server.

python examples/offline.py
"""

from pathlib import Path

from transformers import AutoTokenizer

from molex import MolexModel

PROJECT = Path(__file__).resolve().parents[1]
BASE = PROJECT / ".models" / "e5-small"
ADAPTERS = PROJECT / "examples" / "adapters"
REQUESTS = (
    ("sst2-molex", "A warm, funny and beautifully acted film."),
    ("trec-molex", "Who painted the ceiling of the Sistine Chapel?"),
    (None, "The bare base returns hidden states."),
)


def main() -> None:
    """Load once, run one mixed batch, print what came out."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = MolexModel.from_pretrained(BASE)
    for adapter in ("sst2-molex", "trec-molex"):
        model.load_adapter(adapter, ADAPTERS / adapter)

    input_ids = [tokenizer(text)["input_ids"] for _, text in REQUESTS]
    output = model(input_ids, adapters=[name for name, _ in REQUESTS])

    for (name, text), logits, route in zip(REQUESTS, output.logits, output.routes, strict=True):
        print(text)
        if name is None:
            print(f"  bare base: hidden states {list(logits.shape)}")
            continue
        probs = logits.softmax(-1)
        label = model.adapters[name].id2label[int(probs.argmax())]
        print(f"  {name}: {label} {float(probs.max()):.3f}, layers {route}")


if __name__ == "__main__":
    main()
