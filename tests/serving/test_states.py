"""Kept states: budgets hold, states move down and come back, and the tree forgets what the store has forgotten."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon_export import Session
from megalodon_export.runtimes import Runtime
from megalodon_export.serving.engine import Engine
from megalodon_export.serving.prefix_tree import PrefixTree
from megalodon_export.serving.state_store import StateStore
from megalodon_export.serving.states import StreamState
from support.serving import answers

SIZE = 400  # bytes of a state of these tests


def state(position: int) -> StreamState:
    """A state of which the tree knows only how long it is."""
    return StreamState((torch.full((SIZE // 4,), float(position)),), position, torch.zeros(0))


def store(runtime: Runtime, budget: int) -> StateStore:
    return StateStore(runtime.config, torch.device("cpu"), budget, 0)


def test_the_longest_prefix_is_found(runtime: Runtime) -> None:
    tree = PrefixTree(store(runtime, 10**6), 4)
    cursor = tree.cursor("")
    fed = [*range(10)]
    for end in (4, 8, 10):
        cursor.advance(fed[cursor_position(cursor, end) : end])
        cursor.keep(state(end))
    cursor.close()
    for tokens, expected in (
        ([*range(10)], 10),
        ([*range(12)], 10),
        ([*range(9)], 8),
        ([*range(8)], 8),
        ([0, 1, 2, 3, 9], 4),
        ([0, 1, 2], None),
        ([9], None),
    ):
        cursor = tree.cursor("")
        found = cursor.find(array("q", tokens))
        assert (found and found[1]) == expected
        assert found is None or found[0].position == expected
        cursor.close()


def cursor_position(cursor: Any, end: int) -> int:
    return {4: 0, 8: 4, 10: 8}[end]


WORDS = st.lists(st.integers(0, 1), max_size=14)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(WORDS, st.booleans()), max_size=12), st.integers(0, 6))
def test_the_tree_is_a_dictionary_of_prefixes(runtime: Runtime, moves: list[tuple[list[int], bool]], room: int) -> None:
    """Beside a plain dictionary: nothing wrong is found, and with room for all states nothing is missed."""
    kept: set[tuple[int, ...]] = set()
    tree = PrefixTree(store(runtime, room * SIZE if room < 6 else 10**9), 3)
    for words, keep in moves:
        cursor, tokens = tree.cursor(""), array("q", words)
        found = cursor.find(tokens)
        end = 0 if found is None else found[1]
        assert found is None or (found[0].position == end and tuple(words[:end]) in kept)
        if room == 6:
            assert end == max((len(one) for one in kept if one and one == tuple(words[: len(one)])), default=0)
        cursor.advance(tokens[end:])
        if keep:
            cursor.keep(state(len(words)))
            kept.add(tuple(words))
        cursor.close()
        assert tree.store.used[0] <= tree.store.budgets[0]
        assert tree.store.used[0] == SIZE * tree.store.count
        assert nodes_without_use(tree) == 0


def nodes_without_use(tree: PrefixTree) -> int:
    """Nodes that hold nothing and lead to nothing."""
    left, count = [*tree._roots.values()], 0
    while left:
        node = left.pop()
        left += node.children.values()
        count += node.is_empty
    return count


@pytest.fixture
def levels(runtime: Runtime, tmp_path: Path) -> Callable[..., StateStore]:
    def make(device: int, disk: int) -> StateStore:
        return StateStore(runtime.config, torch.device("cpu"), device, 0, tmp_path / "prefixes", disk)

    return make


def test_states_come_back_from_the_disk(
    engine: Callable[..., Engine], alone: Callable[..., list[int]], levels: Callable[..., StateStore]
) -> None:
    """Memory for about two states: the others are on disk, are found there, and give the same tokens."""
    store = levels(60_000, 10**8)
    one = engine(store=store)
    prompts = [[i, *range(100)] for i in range(6)]
    for prompt in prompts:
        answers(one, prompt, 4)
    assert store.used[2] > 0
    for prompt in prompts:
        (answer,) = answers(one, [*prompt, 5], 6)
        assert answer.cached_tokens == len(prompt)
        assert answer.ids == alone([*prompt, 5], 6)
    (answer,) = answers(one, prompts[0], 6)  # a state from the disk has no logits, so it serves no whole prompt
    assert answer.ids == alone(prompts[0], 6)


def test_lost_and_damaged_files_cost_hits_alone(
    engine: Callable[..., Engine],
    alone: Callable[..., list[int]],
    levels: Callable[..., StateStore],
    tmp_path: Path,
) -> None:
    one = engine(store=levels(60_000, 10**8))
    prompts = [[i, *range(100)] for i in range(6)]
    for prompt in prompts:
        answers(one, prompt, 1)
    files = sorted((tmp_path / "prefixes").iterdir())
    assert len(files) > 2
    for file in files[::2]:
        file.unlink()
    for file in files[1::2]:
        file.write_bytes(file.read_bytes()[:-9])
    for prompt in prompts:
        assert answers(one, [*prompt, 5], 6)[0].ids == alone([*prompt, 5], 6)


def test_a_disk_that_takes_no_more_costs_hits_alone(
    engine: Callable[..., Engine],
    alone: Callable[..., list[int]],
    levels: Callable[..., StateStore],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    store = levels(60_000, 10**8)
    one = engine(store=store)
    for i in range(6):
        assert answers(one, [i, *range(100)], 4)[0].ids == alone([i, *range(100)], 4)
    assert store.used[2] == 0


def test_the_files_of_an_earlier_process_are_removed(levels: Callable[..., StateStore], tmp_path: Path) -> None:
    levels(1, 1)
    (tmp_path / "prefixes" / "old.safetensors").write_bytes(b"x")
    levels(1, 1)
    assert not list((tmp_path / "prefixes").iterdir())


def test_a_state_is_a_snapshot(engine: Callable[..., Engine], runtime: Runtime) -> None:
    """A session goes on from the state of a stream."""
    (answer,) = answers(engine(), [*range(90)], 7, keep_state=True)
    assert answer.last.state is not None
    snapshot = answer.last.state.snapshot(runtime.config, answer.last.pending, runtime.model_id)
    session, whole = Session(runtime), Session(runtime)
    session.restore(snapshot)
    expected = list(whole.generate_ids([*range(90), *answer.ids], 9, -1))
    assert list(session.generate_ids([], 9, -1)) == expected
