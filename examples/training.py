"""Trains a MoLEx and a LoRA adapter on a handful of sentences and uses both. Takes half a minute.

python examples/training.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from molex.train.arguments import Method, TrainArguments
from molex.train.recipe import Base, load_base, train_adapter

PROJECT = Path(__file__).resolve().parents[1]
BASE = PROJECT / ".models" / "e5-small"
METHODS: tuple[Method, ...] = ("molex", "lora")
EXAMPLES = {
    "weather": (
        "It will rain in the north until noon.",
        "Frost is expected in the valleys tonight.",
        "The wind turns west and picks up.",
        "Sunny spells, with a shower here and there.",
        "Fog clears slowly during the morning.",
        "Temperatures fall below zero on Thursday.",
    ),
    "sport": (
        "The keeper saved a penalty in the last minute.",
        "She won the race by two seconds.",
        "Their striker scored twice before half time.",
        "The match went to a fifth set.",
        "He broke the club record in the pole vault.",
        "The home team is still unbeaten this season.",
    ),
}
UNSEEN = ("Snow showers move in from the coast.", "The champion lost her serve three times.")


def write_data(path: Path) -> Path:
    """A table with the columns that `molex train` reads."""
    rows = [f"{text}\t{label}" for label, texts in EXAMPLES.items() for text in texts]
    path.write_text("\n".join(["text\tlabel", *rows]) + "\n", encoding="utf-8")
    return path


def main() -> None:
    """Train both on one base, then classify two sentences that neither has seen."""
    base = load_base(str(BASE))
    with TemporaryDirectory() as folder:
        data = write_data(Path(folder) / "sentences.tsv")
        for method in METHODS:
            output = Path(folder) / method
            arguments = TrainArguments(
                base=str(BASE), method=method, train=data, eval=data, output=output, epochs=4, batch_size=4
            )
            record = train_adapter(arguments, base)
            print(f"{method}: accuracy {record['metrics']['accuracy']:.2f} on its own training sentences")
            base.model.load_adapter(method, output)
        classify(base)


def classify(base: Base) -> None:
    """Both adapters on both sentences, in one batch."""
    requests = [(method, text) for method in METHODS for text in UNSEEN]
    ids = [base.tokenizer(text)["input_ids"] for _, text in requests]
    output = base.model(ids, adapters=[method for method, _ in requests])
    for (method, text), logits in zip(requests, output.logits, strict=True):
        label = base.model.adapters[method].id2label[int(logits.argmax())]
        print(f"{method}: {text} -> {label}")


if __name__ == "__main__":
    main()
