"""Stored responses: they go on from their state, belong to their key, and outlive the process."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from megalodon_export import Session, Snapshot
from megalodon_export.runtimes import Runtime
from megalodon_export.serving.response_store import ResponseStore
from support.serving import Client

FIELDS = {"max_output_tokens": 12, "temperature": 0, "ignore_eos": True}
ORDER = [
    *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
    *("response.output_text.delta", "response.output_text.done", "response.content_part.done"),
    *("response.output_item.done", "response.incomplete"),
]


def text_of(response: dict[str, Any]) -> str:
    return str(response["output"][0]["content"][0]["text"])


def respond(client: Client, text: str | None, previous: str | None = None, **fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = client.post(
        "/v1/responses", **{**FIELDS, "input": text, "previous_response_id": previous, **fields}
    )
    return found


def test_a_chat_by_handles_is_one_stream(client: Client, alone: Callable[..., list[int]], tokenizer: Tokenizer) -> None:
    """Three turns. Each feeds its own tokens alone, and says what a session says that was fed everything."""
    ids: list[int] = []
    previous = None
    for turn, text in enumerate(("In the beginning", "and then", "at last")):
        response = respond(client, text, previous)
        fed = tokenizer.encode(text if previous is None else f"\n{text}").ids
        usage = response["usage"]
        if previous is not None:
            assert usage["input_tokens_details"]["cached_tokens"] == len(ids) - 1
            assert usage["input_tokens"] == len(ids) + len(fed)
        ids += fed
        expected = alone(ids, 12)
        assert text_of(response) == tokenizer.decode(expected), turn
        assert (response["status"], response["store"]) == ("incomplete", True)
        assert response["incomplete_details"] == {"reason": "max_output_tokens"}
        ids += expected
        previous = response["id"]


def test_two_branches_of_one_response(client: Client) -> None:
    first = respond(client, "In the beginning")["id"]
    one, other, again = (text_of(respond(client, text, first)) for text in ("a", "b", "a"))
    assert one == again
    assert one != other


def test_going_on_without_input(client: Client, alone: Callable[..., list[int]], tokenizer: Tokenizer) -> None:
    first = respond(client, "In the beginning")
    second = respond(client, None, first["id"])
    expected = alone(tokenizer.encode("In the beginning").ids, 24)
    assert text_of(first) + text_of(second) == tokenizer.decode(expected)


def test_the_events_have_openais_order(client: Client) -> None:
    events = client.events("/v1/responses", input="In the beginning", **FIELDS)
    kinds = [event["type"] for event in events]
    assert list(dict.fromkeys(kinds)) == ORDER
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    whole = text_of(respond(client, "In the beginning"))
    deltas = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert deltas == whole == text_of(events[-1]["response"])
    assert client.get(f"/v1/responses/{events[-1]['response']['id']}")["id"] == events[-1]["response"]["id"]


def test_what_is_not_to_be_stored_is_not(client: Client) -> None:
    response = respond(client, "a", store=False)
    assert response["store"] is False
    client.get(f"/v1/responses/{response['id']}", status=404)
    client.post("/v1/responses", status=404, input="b", previous_response_id=response["id"])


def test_responses_are_listed_and_deleted(client: Client) -> None:
    response = respond(client, "to be deleted")
    name = response["id"]
    assert client.get(f"/v1/responses/{name}") == response
    (entry,) = [one for one in client.get("/v1/responses")["data"] if one["id"] == name]
    assert entry["tokens"] == len("to be deleted") + 11
    assert client.delete(f"/v1/responses/{name}")["deleted"] is True
    client.delete(f"/v1/responses/{name}", status=404)
    client.get(f"/v1/responses/{name}/state", status=404)


def test_a_state_is_downloaded_and_uploaded(client: Client, runtime: Runtime, tokenizer: Tokenizer) -> None:
    """The file is a snapshot: a session goes on from it, and a session's snapshot becomes a response."""
    name = respond(client, "In the beginning")["id"]
    answer = client.download(f"/v1/responses/{name}/state")
    session = Session(runtime, tokenizer)
    session.restore(Snapshot.from_bytes(answer))
    assert "".join(session.generate("\nmore", 12)) == text_of(respond(client, "more", name, ignore_eos=False))

    session.reset()
    "".join(session.generate("A session", 5))
    stored = json.loads(client.request("POST", "/v1/responses/state", session.snapshot().to_bytes())[1])
    assert text_of(respond(client, None, stored["id"], ignore_eos=False)) == "".join(session.generate("", 12))


@pytest.mark.parametrize("damage", [b"", b"garbage", None, "model"])
def test_a_damaged_state_is_refused(client: Client, runtime: Runtime, damage: bytes | str | None) -> None:
    session = Session(runtime)
    session.prefill([1, 2, 3])
    whole = session.snapshot()
    content = damage if isinstance(damage, bytes) else whole.to_bytes()[:-1]
    if damage == "model":
        content = Snapshot(whole.tensors, None, "another model").to_bytes()
    status, body, _ = client.request("POST", "/v1/responses/state", content)
    assert status == 400, body


@pytest.fixture(scope="module")
def two_keys(serve: Callable[..., Client]) -> Client:
    return serve(keys=["first key", "second key"])


def test_keys(two_keys: Client) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic first key"}):
        for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/v1/responses")):
            status, body, _ = two_keys.request(method, path, b"{}" if method == "POST" else None, **headers)
            assert status == 401, body
            assert json.loads(body)["error"]["code"] == "invalid_api_key"
    assert two_keys.get("/health") == {"status": "ok"}


def test_responses_belong_to_their_key(two_keys: Client) -> None:
    mine, other = Client(two_keys.port, "first key"), Client(two_keys.port, "second key")
    name = respond(mine, "a secret")["id"]
    for path in (f"/v1/responses/{name}", f"/v1/responses/{name}/state"):
        other.get(path, status=404)
    other.delete(f"/v1/responses/{name}", status=404)
    other.post("/v1/responses", status=404, input="b", previous_response_id=name)
    assert name not in [one["id"] for one in other.get("/v1/responses")["data"]]
    assert name in [one["id"] for one in mine.get("/v1/responses")["data"]]
    prompt = "another secret that is as long as a chunk of this model, so that a state is kept at its end"
    cached = [
        one.post("/v1/completions", prompt=prompt, max_tokens=1)["usage"]["prompt_tokens_details"]["cached_tokens"]
        for one in (mine, other, mine)
    ]
    assert cached == [0, 0, len(prompt)]


def test_cors(client: Client) -> None:
    asked = {"Origin": "https://page.example", "Access_Control_Request_Method": "POST"}
    _, _, headers = client.request("OPTIONS", "/v1/completions", **asked)
    assert headers["Access-Control-Allow-Origin"] == "https://page.example"
    _, _, headers = client.request("OPTIONS", "/v1/completions", **{**asked, "Origin": "https://other.example"})
    assert headers["Access-Control-Allow-Origin"] is None


def snapshot(runtime: Runtime, token: int = 1) -> Snapshot:
    session = Session(runtime)
    session.prefill([token] * 5)
    return session.snapshot()


def name_of(number: int) -> str:
    return f"resp_{number:048x}"


def test_responses_outlive_the_store(runtime: Runtime, tmp_path: Path) -> None:
    first = ResponseStore(tmp_path)
    record = first.save(name_of(1), "me", {"id": name_of(1)}, snapshot(runtime))
    second = ResponseStore(tmp_path)
    assert second.get(name_of(1), "me") == record
    assert second.get(name_of(1), "you") is None
    content = second.content(record)
    assert content is not None
    assert Snapshot.from_bytes(content).pending is None


def test_what_is_not_whole_is_removed_at_the_start(runtime: Runtime, tmp_path: Path) -> None:
    """Each of these is what a process leaves that is killed while it stores or deletes, or what a disk damages."""
    store = ResponseStore(tmp_path)
    for number in range(5):
        store.save(name_of(number), "me", {}, snapshot(runtime))
    (tmp_path / f"{name_of(0)}.json").unlink()
    (tmp_path / f"{name_of(1)}.safetensors").unlink()
    (tmp_path / f"{name_of(2)}.json").write_text("{")
    (tmp_path / f".{name_of(9)}.json.0123456789abcdef").write_text("{}")
    os.replace(tmp_path / f"{name_of(3)}.json", tmp_path / f"{name_of(8)}.json")
    (tmp_path / "notes.txt").write_text("not ours")
    again = ResponseStore(tmp_path)
    assert [record.id for record in again.list("me")] == [name_of(4)]
    left = {name_of(4) + ".json", name_of(4) + ".safetensors", "notes.txt"}
    assert {path.name for path in tmp_path.iterdir()} == left


@pytest.mark.parametrize("in_folder", [True, False])
def test_old_responses_make_room(runtime: Runtime, tmp_path: Path, in_folder: bool) -> None:
    size = len(snapshot(runtime).to_bytes())
    for limit in ({"count": 3}, {"size": 3 * size + 1}):
        store = ResponseStore(tmp_path if in_folder else None, **limit)
        for number in range(6):
            store.save(name_of(number), "me", {}, snapshot(runtime))
        assert [record.id for record in store.list("me")] == [name_of(number) for number in (5, 4, 3)]
        assert len(list(tmp_path.iterdir())) == (6 if in_folder else 0)
        assert store.used == 3 * size


def test_nobody_crowds_out_another(runtime: Runtime) -> None:
    store = ResponseStore(count=4)
    store.save(name_of(100), "you", {}, snapshot(runtime))
    for number in range(9):
        store.save(name_of(number), "me", {}, snapshot(runtime))
    assert [record.id for record in store.list("you")] == [name_of(100)]
    assert [record.id for record in store.list("me")] == [name_of(number) for number in (8, 7, 6)]


def test_responses_expire(runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ResponseStore(tmp_path, seconds=100)
    store.save(name_of(1), "me", {}, snapshot(runtime))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 101)
    assert store.get(name_of(1), "me") is None
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_and_leaves_nothing(
    runtime: Runtime, serve: Callable[..., Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = serve(responses=ResponseStore(tmp_path))

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megalodon_export.serving.response_store.write_whole", full)
    response = respond(client, "In the beginning")
    assert response["store"] is False
    assert text_of(response)
    client.get(f"/v1/responses/{response['id']}", status=404)
    status, body, _ = client.request("POST", "/v1/responses/state", snapshot(runtime).to_bytes())
    assert status == 507, body
    assert not list(tmp_path.iterdir())


def test_a_turn_costs_its_own_tokens(client: Client) -> None:
    """A turn after 6,000 tokens feeds as many tokens as one after 20."""
    costs = []
    for text in ("x" * 20, "y" * 6_000):
        first = respond(client, text)["id"]
        before = client.metrics()
        respond(client, "and then?", first)
        after = client.metrics()
        name = 'megalodon:fed_tokens_total{model_name="small"}'
        costs.append(after[name] - before[name])
    assert costs == [len("\nand then?") + 1] * 2


def test_a_long_prompt_seen_before_is_not_fed(client: Client) -> None:
    fields = {"prompt": "z" * 6_000, "max_tokens": 2, "temperature": 0}
    first = client.complete(**fields)
    before = client.metrics()
    again = client.complete(**fields)
    after = client.metrics()
    assert again["choices"] == first["choices"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 6_000
    name = 'megalodon:fed_tokens_total{model_name="small"}'
    assert after[name] == before[name]
