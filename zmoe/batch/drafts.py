"""Drafts by prompt lookup: what followed the last tokens when they occurred before.

After "Prompt Lookup Decoding" (Saxena, 2023); accepting a draft while the sampled token
equals it changes no text.
"""

from __future__ import annotations

from zmoe.batch.rates import Rates

LONGEST, SHORTEST = 3, 2  # tokens that must agree: as many as possible
MOST = 8  # draft rows of a sequence
TRIAL = 3  # draft rows where too little is known, or to find out again
REST = 64  # proposals skipped after one that would not have paid
FADE = 0.1  # what the newest verdict on a draft weighs in the acceptance


class Drafts:
    """Proposes the next tokens of one sequence; `fixed` is their number, or None to choose it.

    `again`: where one is wrong, the step after that computes the right ones before it again.
    """

    def __init__(self, fixed: int | None = None, again: bool = False) -> None:
        self._fixed, self._again = fixed, again
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> position after its last one
        self._read = 0  # tokens whose n-grams, ending before them, are known
        self._rest = 0
        self._trial = True
        self.acceptance = 0.7  # how often a draft is right if those before it were

    def may_propose(self, tokens: list[int]) -> bool:
        """Whether to wait for the token after `tokens`, to propose what follows it; else propose()
        counts as called.
        """
        if self._fixed is not None:
            return True
        if self._rested():
            return False
        self._index(tokens)
        return self._found(tokens) is not None

    def propose(self, tokens: list[int], room: int, rows: int, rates: Rates) -> list[int]:
        """Up to `room` drafts that follow `tokens`, for a step that has `rows` without them."""
        if self._rested():
            return []
        wanted = self._fixed if self._fixed is not None else self._choose(rows, rates)
        count = min(wanted, room)
        if count <= 0:
            return []
        self._index(tokens)
        start = self._found(tokens)
        if start is None:
            return []
        period = len(tokens) - start  # of a text that goes on repeating itself
        return [tokens[start + i % period] for i in range(count)]

    def verified(self, drafted: int, accepted: int) -> None:
        """The first `accepted` of `drafted` drafts were right."""
        self._trial = False
        for right in [1.0] * accepted + [0.0] * (accepted < drafted):
            self.acceptance += FADE * (right - self.acceptance)

    def _rested(self) -> bool:
        """Whether no drafts are proposed this time, as they did not pay."""
        if not self._rest:
            return False
        self._rest -= 1
        self._trial = not self._rest
        return True

    def _found(self, tokens: list[int]) -> int | None:
        """The position after an earlier place that ends as `tokens` do."""
        for n in range(LONGEST, SHORTEST - 1, -1):
            start = self._after.get(tuple(tokens[-n:]))
            if start is not None:
                return start
        return None

    def _choose(self, rows: int, rates: Rates) -> int:
        """The number of drafts that gives most tokens per second; none of them starts a rest."""
        alone = rates.seconds(rows)
        if self._trial or not alone:
            return TRIAL
        best, best_gain, expected, chance, again = 0, 1.0, 1.0, 1.0, 0.0
        for count in range(1, MOST + 1):
            if self._again:
                again += chance * (1 - self.acceptance) * count
            chance *= self.acceptance
            expected += chance
            took = rates.seconds(rows + count + again) or alone
            # Another sequence's rows in the same step are delayed alike: `rows` tokens become more.
            gain = (rows - 1 + expected) / rows * alone / took
            if gain > best_gain:
                best, best_gain = count, gain
        if not best:
            self._rest = REST
        return best

    def _index(self, tokens: list[int]) -> None:
        """Note what every n-gram is followed by; the last tokens have nothing after them yet."""
        for end in range(max(self._read, SHORTEST), len(tokens)):
            for n in range(SHORTEST, min(LONGEST, end) + 1):
                self._after[tuple(tokens[end - n : end])] = end
        self._read = len(tokens)
