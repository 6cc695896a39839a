"""Calls a running server (`make serve`) with molex_client and with the openai client.

python examples/client.py [URL]
"""

import sys

from openai import OpenAI

from molex_client import Client

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"


def classify(client: Client) -> None:
    """Several texts in one request; the answer keeps their order."""
    texts = ["A warm, funny and beautifully acted film.", "Loud, long and completely lifeless."]
    answers = client.classify("sst2-molex", texts, return_routes=True)
    print(answers.adapter_digest)
    for text, answer in zip(texts, answers.data, strict=True):
        print(f"  {text} -> {answer.label} {max(answer.probs):.3f}, layers {answer.routes}")


def complete(client: OpenAI) -> None:
    """An adapter is named where OpenAI names a model."""
    prompt = "name : Blue Spice | Type : coffee shop | area : riverside"
    answer = client.completions.create(model="e2e-molex", prompt=prompt, max_tokens=40, temperature=0)
    print(answer.choices[0].text.strip())


def chat(client: OpenAI) -> None:
    """The bare base, streamed."""
    stream = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "Name three fruits."}],
        max_tokens=40,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


def main() -> None:
    with Client(URL) as client:
        classify(client)
    with OpenAI(base_url=f"{URL}/v1", api_key="none is checked") as openai:
        print(", ".join(model.id for model in openai.models.list()))
        complete(openai)
        chat(openai)


if __name__ == "__main__":
    main()
