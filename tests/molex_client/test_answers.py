"""The client's answers have the fields of the server's."""

from __future__ import annotations

import pytest

from molex_client import answers as client
from server.routes import adapter_cards, answers, classify, embeddings, models, prompts

LEFT_OUT = {"object", "owned_by"}
"""What OpenAI's shapes say of each thing, always the same."""
PAIRS = [
    (client.Classifications, classify.ClassifyResponse),
    (client.Classification, classify.Classification),
    (client.Embeddings, embeddings.EmbeddingsResponse),
    (client.Embedding, embeddings.Embedding),
    (client.Completion, answers.Completion),
    (client.CompletionChoice, answers.CompletionChoice),
    (client.CompletionLogprobs, answers.CompletionLogprobs),
    (client.ChatCompletion, answers.ChatCompletion),
    (client.ChatChoice, answers.ChatChoice),
    (client.ChatMessage, answers.ChatMessage),
    (client.ChatToken, answers.ChatToken),
    (client.Usage, answers.Usage),
    (client.Model, models.ModelCard),
    (client.Adapter, adapter_cards.AdapterCard),
    (client.AdapterVersion, adapter_cards.VersionCard),
]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda model: model.__name__)
def test_no_field_is_missing_and_none_made_up(ours, theirs):
    assert set(ours.model_fields) == set(theirs.model_fields) - LEFT_OUT


def test_usage_of_requests_that_generate_nothing_fits_too():
    assert set(prompts.PromptUsage.model_fields) <= set(client.Usage.model_fields)


def test_what_a_newer_server_adds_is_ignored():
    told = {"prompt_tokens": 1, "total_tokens": 1, "flavour": "sweet"}
    assert client.Usage.model_validate(told) == client.Usage(prompt_tokens=1, total_tokens=1)
