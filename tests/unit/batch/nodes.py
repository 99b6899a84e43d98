"""A node that follows plans, with a text's hash in place of keys and values.

What it holds for a position is a hash of the text up to there, so a sequence that reads
another text's block is found out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from zmoe.batch.plan import BLOCK, PREVIOUS, Plan, Span, blocks_of

VOCABULARY = 11


def hashes(tokens: Sequence[int]) -> list[int]:
    """What a node holds for each position of a text."""
    out, value = [], 0
    for token in tokens:
        value = hash((value, token))
        out.append(value)
    return out


def sample(value: int, token: int) -> int:
    """The token that follows: often one more than the last one, so that texts repeat themselves."""
    return value % VOCABULARY if value % 16 == 0 else (token + 1) % VOCABULARY


def alone(prompt: Sequence[int], count: int) -> list[int]:
    """The `count` tokens that follow a prompt."""
    tokens, value = list(prompt), hashes(prompt)[-1]
    for _ in range(count):
        tokens.append(sample(value, tokens[-1]))
        value = hash((value, tokens[-1]))
    return tokens[len(prompt) :]


class Node:
    """Follows plans; `texts` are what each sequence ought to have read, kept by the test."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.sampled: dict[int, int] = {}

    def run(self, plan: Plan, texts: dict[int, list[int]]) -> list[list[int]]:
        """The tokens that each span gives: those drafts that are right, and one more."""
        self.before(plan)
        out, first = [], 0
        for span in plan.spans:
            row = list(plan.tokens[first : first + span.rows])
            first += span.rows
            if row[0] == PREVIOUS:
                row[0] = self.sampled[span.sequence]
            text = texts[span.sequence]
            assert self.read(span) == hashes(text[: span.position])
            out.append(self.compute(span, row))
            if span.logits:
                self.sampled[span.sequence] = out[-1][-1]
            del text[span.position :]
            text += row[: span.rows - span.logits + len(out[-1])] if span.logits else row
        assert first == len(plan.tokens)
        return out

    def compute(self, span: Span, row: list[int]) -> list[int]:
        values = hashes_after(self.read(span), row)
        self.write(span, values)
        tokens: list[int] = []
        for index in range(span.rows - span.logits, span.rows):
            tokens.append(sample(values[index], row[index]))
            if index + 1 < span.rows and row[index + 1] != tokens[-1]:
                break
        return tokens

    def before(self, plan: Plan) -> None:
        raise NotImplementedError

    def read(self, span: Span) -> list[int]:
        raise NotImplementedError

    def write(self, span: Span, values: list[int]) -> None:
        raise NotImplementedError


def hashes_after(before: list[int], tokens: list[int]) -> list[int]:
    """What a node adds for `tokens` after `before`."""
    out, value = [], before[-1] if before else 0
    for token in tokens:
        value = hash((value, token))
        out.append(value)
    return out


class PagedNode(Node):
    """A node of the C path: blocks, and a table of them per sequence."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.tables: dict[int, list[int]] = {}
        self.blocks = [[0] * BLOCK for _ in range(count)]

    def before(self, plan: Plan) -> None:
        for number in plan.free:
            del self.tables[number]
        assert not plan.forks
        blocks = list(plan.blocks)
        for span in plan.spans:
            table = self.tables.setdefault(span.sequence, [])
            lacking = max(0, blocks_of(span.end) - len(table))
            table += blocks[:lacking]
            del blocks[:lacking]
            assert blocks_of(span.end) <= len(table) == len(set(table))
        assert not blocks

    def read(self, span: Span) -> list[int]:
        held = [v for block in self.tables[span.sequence] for v in self.blocks[block]]
        return held[: span.position]

    def write(self, span: Span, values: list[int]) -> None:
        table = self.tables[span.sequence]
        for position, value in enumerate(values, span.position):
            self.blocks[table[position // BLOCK]][position % BLOCK] = value


class StatefulNode(PagedNode):
    """A node some of whose layers are recurrent: of each sequence it keeps a state, too, which is
    the hash of its text.
    """

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.states: dict[int, tuple[int, int]] = {}  # how many positions, and the last hash
        self.began: dict[int, tuple[int, int]] = {}  # those with which the last step began

    def before(self, plan: Plan) -> None:
        for number in plan.free:
            del self.states[number]
            self.began.pop(number, None)
            self.tables.pop(number, None)
        for fork in plan.forks:
            assert fork.new not in self.states
            self.states[fork.new] = self.state(fork.old, fork.length)
        for span in plan.spans:
            self.began[span.sequence] = self.state(span.sequence, span.position)
        super().before(replace(plan, free=(), forks=()))

    def state(self, sequence: int, position: int) -> tuple[int, int]:
        held = [each[sequence] for each in (self.states, self.began) if sequence in each]
        return next(state for state in [*held, (0, 0)] if state[0] == position)

    def read(self, span: Span) -> list[int]:
        held = super().read(span)
        assert span.position == 0 or held[-1] == self.began[span.sequence][1]
        return held

    def write(self, span: Span, values: list[int]) -> None:
        super().write(span, values)
        self.states[span.sequence] = (span.end, values[-1])


class MlxNode(Node):
    """A node with MLX's caches, one per sequence; `exact` ones cannot be cut."""

    def __init__(self, count: int, exact: bool) -> None:
        super().__init__(count)
        self.exact = exact
        self.caches: dict[int, list[int]] = {}

    def before(self, plan: Plan) -> None:
        assert not plan.blocks
        for number in plan.free:
            del self.caches[number]
        for fork in plan.forks:
            assert fork.new not in self.caches
            assert fork.length == len(self.caches[fork.old]) or not self.exact
            self.caches[fork.new] = self.caches[fork.old][: fork.length]
            assert len(self.caches[fork.new]) == fork.length
        for span in plan.spans:
            assert span.logits < 2 or (len(plan.spans) == 1 and not self.exact)
            cache = self.caches.setdefault(span.sequence, [])
            assert span.position == len(cache) or (span.position < len(cache) and not self.exact)
            del cache[span.position :]
        running = {span.sequence: blocks_of(span.end) for span in plan.spans}
        # A snapshot may hold a few rows more than its text, those of drafts that were wrong.
        kept = sum(len(v) // BLOCK for k, v in self.caches.items() if k not in running)
        assert len(running) * max(running.values()) + kept <= self.count

    def read(self, span: Span) -> list[int]:
        return self.caches[span.sequence][: span.position]

    def write(self, span: Span, values: list[int]) -> None:
        self.caches[span.sequence] += values
