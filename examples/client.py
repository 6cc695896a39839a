"""Calls a running server (`make serve`) with httpx and with the openai client.

python examples/client.py [URL]
"""

import sys

import httpx
from openai import OpenAI

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"


def classify() -> None:
    """Several texts in one request; the answer keeps their order."""
    texts = ["A warm, funny and beautifully acted film.", "Loud, long and completely lifeless."]
    body = {"model": "sst2-molex", "input": texts, "return_routes": True}
    response = httpx.post(f"{URL}/v1/classify", json=body, timeout=60).raise_for_status()
    print(f"{response.json()['adapter_digest']} in {response.headers['x-total-time']} ms")
    for text, answer in zip(texts, response.json()["data"], strict=True):
        print(f"  {text} -> {answer['label']} {max(answer['probs']):.3f}, layers {answer['routes']}")


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
    classify()
    with OpenAI(base_url=f"{URL}/v1", api_key="none is checked") as client:
        print(", ".join(model.id for model in client.models.list()))
        complete(client)
        chat(client)


if __name__ == "__main__":
    main()
