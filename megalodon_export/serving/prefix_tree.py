"""States by the tokens that lead to them, so that a prompt goes on from the longest prefix that was fed before.

A node stands for a prefix whose length is a multiple of `interval`, where states are small. Between nodes there are
exact states, at the ends of prompts and answers: the tail of such a state is its tokens after the last node.

With an interval of 4, after the prompt "abcdefghij" has been fed:

    root -- "abcd" --> node -- "efgh" --> node        tail "ij"
                       state              state       exact state after the whole prompt

Every owner has a root. What one owner sent is never found for another one.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from .state_store import Kept, StateStore
from .states import StreamState


class Node:
    """A prefix. `users` are cursors at this node, which keep it in the tree while it holds nothing."""

    __slots__ = ("children", "kept", "key", "parent", "tails", "users")

    def __init__(self, parent: Node | None, key: bytes) -> None:
        self.parent, self.key = parent, key
        self.children: dict[bytes, Node] = {}
        self.kept: Kept | None = None
        self.tails: dict[int, dict[bytes, Kept]] = {}  # by length in tokens, then by the tokens themselves
        self.users = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing needs the node."""
        return not (self.children or self.kept or self.tails or self.users)


class PrefixTree:
    """Finds and keeps states by tokens. One thread uses it."""

    def __init__(self, store: StateStore, interval: int) -> None:
        self.store, self.interval = store, interval
        self._roots: dict[str, Node] = {}

    def cursor(self, owner: str) -> Cursor:
        """A cursor before the first token."""
        root = self._roots.setdefault(owner, Node(None, owner.encode()))
        return Cursor(self, root)

    def remove(self, node: Node) -> None:
        """Take a node, and those above it, out of the tree if nothing needs them."""
        while node.is_empty:
            if node.parent is None:
                self._roots.pop(node.key.decode(), None)
                return
            del node.parent.children[node.key]
            node = node.parent


class Cursor:
    """Follows one stream through the tree: the node at or before its position, and its tokens since then.

    `close` it when the stream is over.
    """

    def __init__(self, tree: PrefixTree, node: Node) -> None:
        self._tree, self._node, self._tail = tree, node, array("q")
        node.users += 1

    def fork(self) -> Cursor:
        """Another cursor at the same place."""
        other = Cursor(self._tree, self._node)
        other._tail = self._tail[:]
        return other

    def close(self) -> None:
        """Let go of the tree."""
        self._node.users -= 1
        self._tree.remove(self._node)

    def advance(self, tokens: Sequence[int]) -> None:
        """The stream has been fed tokens."""
        self._tail.extend(tokens)
        size = self._tree.interval
        while len(self._tail) >= size:
            self._step(self._tail[:size].tobytes())
            self._tail = self._tail[size:]

    def keep(self, state: StreamState) -> None:
        """Keep the stream's state, which is where the cursor is. It replaces an older one of the same tokens."""
        if old := self._kept():
            if old.state is not None and (state.logits is None or old.state.logits is not None):
                return
            self._tree.store.forget(old)
        node, key = self._node, self._tail.tobytes()
        node.users += 1  # the store may drop other states meanwhile, and with them their nodes
        kept = self._tree.store.put(state, lambda: self._drop(node, key))
        node.users -= 1
        if kept is None or kept.is_dropped:
            return
        if key:
            node.tails.setdefault(len(self._tail), {})[key] = kept
        else:
            node.kept = kept

    def find(self, tokens: array[int], start: int = 0) -> tuple[StreamState, int] | None:
        """Go on to the kept state after the most of `tokens[start:]`: the state, and where in `tokens` it is.

        None, with the cursor where it was, if there is no state ahead of it. A state after all tokens is found only
        if it has its logits.
        """
        while best := self._search(tokens, start):
            kept, end = best
            state = self._tree.store.load(kept)
            if state is not None and (end < len(tokens) or state.logits is not None):
                self.advance(tokens[start:end])
                return state, end
            if state is not None:  # it came back from the disk, without its logits
                self._tree.store.forget(kept)
        return None

    def _search(self, tokens: array[int], start: int) -> tuple[Kept, int] | None:
        """What is kept after the most tokens, and where in `tokens` that is."""
        node, base, best = self._node, start - len(self._tail), None
        while True:
            if base > start and node.kept is not None:
                best = node.kept, base
            for length in sorted(node.tails, reverse=True):
                end = base + length
                if start < end <= len(tokens) and (kept := node.tails[length].get(self._key(tokens, start, base, end))):
                    best = kept, end
                    break
            end = base + self._tree.interval
            child = node.children.get(self._key(tokens, start, base, end)) if end <= len(tokens) else None
            if child is None:
                return best
            node, base = child, end

    def _key(self, tokens: array[int], start: int, base: int, end: int) -> bytes:
        """Tokens from a node at `base` on; those before `start` are in the tail."""
        if base >= start:
            return tokens[base:end].tobytes()
        return self._tail[: end - base].tobytes() + tokens[start:end].tobytes()

    def _kept(self) -> Kept | None:
        if not self._tail:
            return self._node.kept
        return self._node.tails.get(len(self._tail), {}).get(self._tail.tobytes())

    def _step(self, key: bytes) -> None:
        child = self._node.children.get(key)
        if child is None:
            child = self._node.children[key] = Node(self._node, key)
        child.users += 1
        left, self._node = self._node, child
        left.users -= 1

    def _drop(self, node: Node, key: bytes) -> None:
        if key:
            length = len(key) // array("q").itemsize
            of_length = node.tails.get(length, {})
            of_length.pop(key, None)
            if not of_length:
                node.tails.pop(length, None)
        else:
            node.kept = None
        self._tree.remove(node)
