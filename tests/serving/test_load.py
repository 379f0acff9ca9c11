"""`bench-serve` against a server: its figures are those of the requests that it sent."""

from __future__ import annotations

import json

import pytest

from megalodon_export.cli import run
from support.serving import Client


def test_the_load_is_what_was_asked_for(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    before = client.metrics()
    sizes = ["--clients", "3", "--requests", "9", "--prompt-tokens", "100", "--shared-tokens", "64", "--seed", "5"]
    url = f"http://127.0.0.1:{client.port}"
    assert run(["bench-serve", url, *sizes, "--max-tokens", "7", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["requests"], report["tokens"], report["prompt_tokens"]) == (9, 63, 900)
    assert 0.4 < report["hit_rate"] <= 0.64, "all prompts but the first ones find the part that they share"
    after = client.metrics()
    for name, more in (("vllm:prompt_tokens_total", 900), ("vllm:generation_tokens_total", 63)):
        name += '{model_name="small"}'
        assert after[name] - before[name] == more
    for name in ("time_to_first_token", "inter_token_latency", "request_latency"):
        assert 0 < report[name]["median"] <= report[name]["p99"]
    assert run(["bench-serve", url, "--requests", "2", "--max-tokens", "3"]) == 0
    printed = capsys.readouterr().out
    assert "2 requests of 8 clients" in printed
    assert "time to first token" in printed


@pytest.mark.parametrize(
    ("url", "message"),
    [("localhost:8000", "is no address of a server"), ("http://127.0.0.1:9", "refused"), ("ftp://x", "no address")],
)
def test_what_cannot_be_measured(url: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench-serve", url]) == 1
    assert message in capsys.readouterr().err
