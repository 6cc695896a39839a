from __future__ import annotations

import re


def test_probes_follow_the_engine(live, monkeypatch):
    assert live.http.get("/livez").text == "ok"
    assert live.http.get("/readyz").status_code == 200
    monkeypatch.setattr(live.engine, "draining", True)
    assert live.http.get("/livez").status_code == 200
    assert live.http.get("/readyz").status_code == 503
    refused = live.classify(model="mood", input="w1")
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "shutting_down"
    assert refused.headers["retry-after"] == "5"


def test_the_documentation_lists_every_endpoint(live):
    page = live.http.get("/docs")
    assert page.status_code == 200
    assert "//cdn." not in page.text
    script = re.search(r'src="([^"]+)"', page.text)
    assert script is not None
    assert live.http.get(script[1]).status_code == 200
    paths = live.http.get("/openapi.json").json()["paths"]
    posted = {"/v1/classify", "/v1/embeddings", "/v1/completions", "/v1/chat/completions"}
    assert posted | {"/metrics"} <= set(paths)
