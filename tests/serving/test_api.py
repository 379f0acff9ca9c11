"""The routes over HTTP, as any client calls them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from support.serving import Client

TEXT = "In the beginning"


def test_a_completion(client: Client, expected: Any) -> None:
    answer = client.complete(prompt=TEXT, max_tokens=20, temperature=0, ignore_eos=True)
    (choice,) = answer["choices"]
    assert choice == {"index": 0, "text": expected(TEXT, 20), "logprobs": None, "finish_reason": "length"}
    assert answer["object"] == "text_completion"
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (16, 20, 36)


def test_cached_tokens_are_reported(client: Client) -> None:
    prompt = "a prompt of its own " * 10
    found = [client.complete(prompt=prompt, max_tokens=1)["usage"]["prompt_tokens_details"] for _ in range(2)]
    assert [one["cached_tokens"] for one in found] == [0, len(prompt)]


def test_seeds_repeat(client: Client, expected: Any) -> None:
    fields = {"temperature": 0.9, "seed": 7, "top_k": 40, "ignore_eos": True}
    found = {client.complete(prompt=TEXT, max_tokens=30, **fields)["choices"][0]["text"] for _ in range(3)}
    assert found == {expected(TEXT, 30, temperature=0.9, seed=7, top_k=40)}


def test_negative_seeds_count_modulo_64_bits(client: Client) -> None:
    one, other = (client.complete(prompt=TEXT, max_tokens=30, seed=seed)["choices"] for seed in (-1, 2**63 - 1))
    assert one != other
    assert one == client.complete(prompt=TEXT, max_tokens=30, seed=-1)["choices"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("usage", [None, {"include_usage": True}, {"continuous_usage_stats": True}])
def test_a_stream_is_the_whole_answer(client: Client, path: str, usage: dict[str, Any] | None) -> None:
    prompt = {"prompt": TEXT} if path == "/v1/completions" else {"messages": [{"role": "user", "content": TEXT}]}
    fields = {**prompt, "max_tokens": 25, "seed": 1, "n": 2}
    whole = client.post(path, **fields)
    chunks = client.events(path, **fields, stream_options=usage)
    assert chunks.pop() == "[DONE]"
    if usage:
        last = chunks.pop()
        assert last["choices"] == []
        for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert last["usage"][name] == whole["usage"][name]
        assert all((chunk["usage"] is not None) == ("continuous_usage_stats" in usage) for chunk in chunks)
    texts, reasons = ["", ""], [None, None]
    for chunk in chunks:
        assert chunk["id"] == chunks[0]["id"]
        (choice,) = chunk["choices"]
        delta = choice["text"] if "text" in choice else choice["delta"].get("content", "")
        assert delta or choice["finish_reason"], "no chunk is empty: clients time the first one"
        texts[choice["index"]] += delta
        reasons[choice["index"]] = choice["finish_reason"]
    assert texts == [c["text"] if "text" in c else c["message"]["content"] for c in whole["choices"]]
    assert reasons == [choice["finish_reason"] for choice in whole["choices"]]


def test_prompts_of_every_kind(client: Client) -> None:
    fields = {"max_tokens": 6, "temperature": 0}
    one, other = [*b"one"], [*b"another"]
    texts = [choice["text"] for p in ("one", "another") for choice in client.complete(prompt=p, **fields)["choices"]]
    for prompts in (["one", "another"], [one, other]):
        answer = client.complete(prompt=prompts, **fields)
        assert [choice["text"] for choice in answer["choices"]] == texts
        assert answer["usage"]["prompt_tokens"] == 10
    assert client.complete(prompt=one, **fields)["choices"][0]["text"] == texts[0]


def test_an_empty_prompt_begins_with_the_start_token(client: Client) -> None:
    assert client.complete(prompt="", max_tokens=1)["usage"]["prompt_tokens"] == 1


def test_logprobs_and_echo_as_lm_eval_reads_them(client: Client) -> None:
    """The request of `local-completions`: token ids, echo, one token, whose entry the client drops."""
    prompts = [[*b"In the"], [*b"beginning"]]
    answer = client.complete(prompt=prompts, max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1234)
    for choice, prompt in zip(answer["choices"], prompts, strict=True):
        found = choice["logprobs"]
        assert found["tokens"][: len(prompt)] == [chr(one) for one in prompt]
        assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["top_logprobs"]) == len(prompt) + 1
        assert found["token_logprobs"][0] is None
        assert found["text_offset"][: len(prompt)] == [*range(len(prompt))]
        for own, top in list(zip(found["token_logprobs"], found["top_logprobs"], strict=True))[1:]:
            assert own <= max(top.values()) <= 0
        last = found["token_logprobs"][-1]
        assert last == max(found["top_logprobs"][-1].values()), "the greedy token is the most probable one"
        assert choice["text"].startswith(bytes(prompt).decode())


def test_scores_do_not_depend_on_what_is_kept(client: Client) -> None:
    fields = {"prompt": TEXT * 12, "max_tokens": 1, "logprobs": 0, "echo": True, "temperature": 0}
    found = [client.complete(**fields)["choices"][0]["logprobs"]["token_logprobs"] for _ in range(2)]
    assert found[0] == found[1]


def test_a_prompt_is_scored_without_generating(client: Client) -> None:
    (choice,) = client.complete(prompt=TEXT, max_tokens=0, logprobs=0, echo=True)["choices"]
    assert choice["text"] == TEXT
    assert len(choice["logprobs"]["tokens"]) == len(TEXT)


def test_a_chat(client: Client) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Be brief.\n"}, {"type": "text", "text": "Hello"}]}]
    fields = {"max_completion_tokens": 12, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    answer = client.post("/v1/chat/completions", messages=messages, **fields)
    assert answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    content = choice["logprobs"]["content"]
    assert b"".join(bytes(one["bytes"]) for one in content).decode(errors="replace") == choice["message"]["content"]
    assert all(len(one["top_logprobs"]) == 2 for one in content)
    again = client.post("/v1/chat/completions", messages=parts, **fields)
    assert again["choices"][0]["message"] == choice["message"]
    plain = client.complete(prompt="Be brief.\nHello", max_tokens=12, temperature=0)
    assert plain["choices"][0]["text"] == choice["message"]["content"]


def test_stop_strings_and_bias(client: Client) -> None:
    forced = {"logit_bias": {"65": 100, "66": 90}, "temperature": 0, "max_tokens": 20}
    (choice,) = client.complete(prompt=TEXT, **forced, presence_penalty=2, stop=["AAAA"])["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    (choice,) = client.complete(prompt=TEXT, **forced, stop="zz")["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("A" * 20, "length")


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"best_of": 1, "suffix": None, "user": "me", "logit_bias": None, "stop": None, "n": None}),
        ("/v1/completions", {"top_k": -1, "min_p": 0, "repetition_penalty": 1, "stream_options": None, "echo": False}),
        ("/v1/chat/completions", {"tools": [], "store": False, "response_format": {"type": "text"}, "top_p": None}),
        ("/v1/chat/completions", {"tool_choice": "auto", "parallel_tool_calls": True, "functions": None}),
        ("/v1/responses", {"metadata": {"a": "b"}, "tools": [], "truncation": "disabled", "instructions": "Be."}),
        ("/v1/responses", {"text": {"format": {"type": "text"}}, "max_output_tokens": 2, "background": False}),
    ],
)
def test_null_and_neutral_values_ask_for_nothing(client: Client, path: str, fields: dict[str, Any]) -> None:
    field, value = {
        "/v1/completions": ("prompt", TEXT),
        "/v1/chat/completions": ("messages", [{"role": "user", "content": TEXT}]),
        "/v1/responses": ("input", TEXT),
    }[path]
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    client.post(path, **{field: value, limit: 2, "model": "small", **fields})


def test_models_and_tokenizer(client: Client) -> None:
    (model,) = client.get("/v1/models")["data"]
    assert client.get("/v1/models/small") == model
    assert model["id"] == "small"
    info = client.get("/tokenizer_info")
    assert info["eos_token"] == "<|endoftext|>"
    found = client.post("/tokenize", prompt="a<|endoftext|>é", add_special_tokens=False)
    assert (found["tokens"], found["count"]) == ([97, 256, 195, 169], 4)
    assert client.post("/detokenize", tokens=found["tokens"]) == {"prompt": "a<|endoftext|>é"}
    chat = client.post("/tokenize", messages=[{"role": "user", "content": "hi"}], return_token_strs=True)
    assert chat["token_strs"] == ["h", "i"]


def test_health_and_metrics(client: Client) -> None:
    assert client.get("/health") == {"status": "ok"}
    client.complete(prompt=TEXT, max_tokens=3, ignore_eos=True)
    before = client.metrics()
    client.complete(prompt=TEXT, max_tokens=3, ignore_eos=True)
    after = client.metrics()
    label = '{model_name="small"}'
    for name, more in (
        ("vllm:prompt_tokens_total", len(TEXT)),
        ("vllm:generation_tokens_total", 3),
        ("vllm:prefix_cache_queries_total", len(TEXT)),
        ("vllm:prefix_cache_hits_total", len(TEXT)),
        ("vllm:time_to_first_token_seconds_count", 1),
        ("vllm:inter_token_latency_seconds_count", 2),
        ("vllm:e2e_request_latency_seconds_count", 1),
        ("vllm:request_queue_time_seconds_count", 1),
        ("vllm:request_prefill_time_seconds_count", 1),
        ("vllm:request_decode_time_seconds_count", 1),
    ):
        assert after[name + label] - before[name + label] == more, name
    reason = 'vllm:request_success_total{finished_reason="length",model_name="small"}'
    assert after[reason] - before[reason] == 1
    for gauge in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
        assert after[gauge + label] == 0
    assert 0 < after["vllm:kv_cache_usage_perc" + label] <= 1


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_output_follows_a_schema(client: Client) -> None:
    """A model of random weights writes nothing but what the schema allows."""
    jsonschema = pytest.importorskip("jsonschema")
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    message = {"messages": [{"role": "user", "content": "Who?"}], "n": 8, "seed": 1, "max_tokens": 200}
    answer = client.post("/v1/chat/completions", **message, response_format=wanted)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert len(set(texts)) > 1
    for text, choice in zip(texts, answer["choices"], strict=True):
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(text), SCHEMA)
    response = client.post("/v1/responses", input="Who?", text={"format": {"type": "json_schema", "schema": SCHEMA}})
    jsonschema.validate(json.loads(response["output"][0]["content"][0]["text"]), SCHEMA)


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        ({"regex": "[0-9]{3}-[a-f]{2}"}, "[0-9]{3}-[a-f]{2}"),
        ({"choice": ["yes", "no (really)"]}, r"yes|no \(really\)"),
        ({"grammar": 'start: "a" /b{2}/ "c"'}, "abbc"),
    ],
)
def test_output_follows_an_expression(client: Client, outputs: dict[str, Any], pattern: str) -> None:
    answer = client.complete(prompt=TEXT, n=4, max_tokens=40, structured_outputs=outputs)
    for choice in answer["choices"]:
        assert re.fullmatch(pattern, choice["text"])
        assert choice["finish_reason"] == "stop"


def test_token_ids_are_returned(client: Client, alone: Any) -> None:
    """A text can be taken up again at any token, even where its bytes are no text."""
    fields = {"max_tokens": 20, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    (choice,) = client.complete(prompt=TEXT, **fields)["choices"]
    assert choice["prompt_token_ids"] == [*TEXT.encode()]
    assert choice["token_ids"] == alone([*TEXT.encode()], 20)
    streamed = client.events("/v1/completions", prompt=TEXT, **fields)[:-1]
    assert [one for chunk in streamed for one in chunk["choices"][0]["token_ids"]] == choice["token_ids"]
    again = client.complete(prompt=choice["prompt_token_ids"] + choice["token_ids"][:9], **{**fields, "max_tokens": 11})
    assert again["choices"][0]["token_ids"] == choice["token_ids"][9:]


def test_the_page_needs_nothing_from_outside(client: Client) -> None:
    status, page, headers = client.request("GET", "/")
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert not re.search(r"""(src|href)\s*=|https?://|@import|url\(""", page)
    for used in re.findall(r'\$\("(\w+)"\)', page):
        assert f'id="{used}"' in page


def test_the_openapi_document_has_the_fields(client: Client) -> None:
    document = client.get("/openapi.json")
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize"):
        reference = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        schema = document["components"]["schemas"][reference.rsplit("/", 1)[1]]
        assert schema["additionalProperties"] is False
        assert schema["properties"].keys() & {"prompt", "messages", "input", "tokens"}
