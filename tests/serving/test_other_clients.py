"""LangChain's OpenAI classes and lm_eval's `local-completions`, unmodified, where they are installed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from megalodon_export.runtimes import Runtime
from support.serving import Client

TEXT = "In the beginning"


def test_langchain(client: Client) -> None:
    langchain = pytest.importorskip("langchain_openai")
    fields = {"base_url": f"http://127.0.0.1:{client.port}/v1", "api_key": "any", "model": "small", "seed": 1}
    chat = langchain.ChatOpenAI(**fields, max_tokens=10, temperature=0)
    answer = chat.invoke(TEXT)
    assert answer.content == "".join(piece.content for piece in chat.stream(TEXT))
    assert answer.usage_metadata["output_tokens"] == 10
    assert asyncio.run(chat.ainvoke(TEXT)).content == answer.content
    llm = langchain.OpenAI(**fields, max_tokens=10, temperature=0)
    assert llm.invoke(TEXT) == answer.content == "".join(llm.stream(TEXT))


@pytest.mark.parametrize("remote", [False, True])
def test_lm_eval(client: Client, runtime: Runtime, checkpoints: Any, remote: bool) -> None:
    """Log-likelihoods are the model's, by token ids of a local tokenizer and of the server's."""
    import torch

    pytest.importorskip("tenacity")
    completions = pytest.importorskip("lm_eval.models.openai_completions")
    instances = pytest.importorskip("lm_eval.api.instance")
    local = {"tokenizer": str(checkpoints["tiny"]), "tokenizer_backend": "huggingface"}
    model = completions.LocalCompletionsAPI(
        base_url=f"http://127.0.0.1:{client.port}/v1/completions",
        model="small",
        batch_size=2,
        **({"tokenizer_backend": "remote"} if remote else local),
    )
    pairs = [(TEXT, " was the word"), ("a", "b"), ("One two", " three four")]
    requests = [instances.Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    found = model.loglikelihood(requests)
    for (context, continuation), (value, is_greedy) in zip(pairs, found, strict=True):
        ids = torch.tensor([[*(context + continuation).encode()]])
        logits = runtime.bind(runtime.new_cache(1)).score(ids, torch.tensor([ids.shape[1]]))[0].log_softmax(-1)
        count = len(continuation)
        own = logits[-count - 1 : -1].gather(1, ids[0, -count:, None])
        assert value == pytest.approx(own.sum().item(), abs=1e-3)
        assert is_greedy == bool((logits[-count - 1 : -1].argmax(-1) == ids[0, -count:]).all())
    ((text,),) = [model.generate_until([instances.Instance("generate_until", {}, (TEXT, {"max_gen_toks": 8}), 0)])]
    assert isinstance(text, str)
