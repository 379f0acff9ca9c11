"""OpenAI's own client, unmodified: completions, chats and responses, whole and streamed, in threads and in asyncio."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from support.serving import Client

openai = pytest.importorskip("openai")
TEXT = "In the beginning"
CHAT = [{"role": "user", "content": TEXT}]
WORDS = {"structured_outputs": {"choice": ["yes, of course", "no"]}}  # a text that ends: the helpers parse no other


@pytest.fixture(scope="module")
def address(client: Client) -> dict[str, Any]:
    return {"base_url": f"http://127.0.0.1:{client.port}/v1", "api_key": "any", "max_retries": 0, "timeout": 60}


@pytest.fixture(scope="module")
def sync(address: dict[str, Any]) -> Any:
    return openai.OpenAI(**address)


def test_models(sync: Any) -> None:
    assert [model.id for model in sync.models.list()] == ["small"]
    assert sync.models.retrieve("small").owned_by == "megalodon-export"


def test_completions(sync: Any) -> None:
    fields = {"model": "small", "prompt": TEXT, "max_tokens": 10, "seed": 1, "logprobs": 2, "n": 2}
    whole = sync.completions.create(**fields)
    assert whole.usage.prompt_tokens_details.cached_tokens >= 0
    texts = ["", ""]
    for chunk in sync.completions.create(**fields, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert chunk.usage.completion_tokens == whole.usage.completion_tokens


def test_chats(sync: Any) -> None:
    fields = {"model": "small", "messages": CHAT, "max_completion_tokens": 10, "seed": 1, "top_p": 0.9}
    whole = sync.chat.completions.create(**fields, logprobs=True, top_logprobs=2)
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
    parts = [chunk.choices[0].delta.content or "" for chunk in sync.chat.completions.create(**fields, stream=True)]
    assert "".join(parts) == whole.choices[0].message.content


def test_chats_by_the_streaming_helper(sync: Any) -> None:
    fields = {"model": "small", "messages": CHAT, "seed": 1, "extra_body": WORDS}
    with sync.chat.completions.stream(**fields) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert text == final.choices[0].message.content


def test_responses(sync: Any) -> None:
    first = sync.responses.create(model="small", input=TEXT, max_output_tokens=10, temperature=0)
    second = sync.responses.create(
        model="small", input="more", max_output_tokens=10, temperature=0, previous_response_id=first.id
    )
    assert second.usage.input_tokens_details.cached_tokens > 0
    assert sync.responses.retrieve(second.id).output_text == second.output_text
    events = [*sync.responses.create(model="small", input=TEXT, max_output_tokens=10, temperature=0, stream=True)]
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == first.output_text
    assert events[-1].response.output_text == first.output_text
    sync.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        sync.responses.retrieve(first.id)


def test_responses_by_the_streaming_helper(sync: Any) -> None:
    with sync.responses.stream(model="small", input=TEXT, temperature=0, extra_body=WORDS) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text
    assert text in WORDS["structured_outputs"]["choice"]


def test_asyncio(address: dict[str, Any]) -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(**address) as client:

            async def one(seed: int) -> str:
                fields = {"model": "small", "messages": CHAT, "max_completion_tokens": 10, "seed": seed}
                stream = await client.chat.completions.create(**fields, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return [*await asyncio.gather(*(one(seed % 4) for seed in range(12)))]

    texts = asyncio.run(run())
    assert texts == texts[:4] * 3


def test_errors(sync: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        sync.completions.create(model="small", prompt=TEXT, temperature=-1)
    with pytest.raises(openai.BadRequestError, match="tools"):
        sync.chat.completions.create(model="small", messages=CHAT, tools=[{"type": "function", "function": {}}])
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        sync.completions.create(model="other", prompt=TEXT)
