"""Grammars that limit what is sampled: JSON schemas, and llguidance's own language."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any

import llguidance
import llguidance.hf
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from mlx_lm.tokenizer_utils import TokenizerWrapper

from zmoe.engine.sampler import Mask
from zmoe.errors import InputError, ZmoeError

MOST_CHARACTERS = 1 << 16
# JSON is written as json.dumps() does: with blanks as it likes, a model may write nothing else.
JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def json_grammar(schema: Mapping[str, Any]) -> str:
    """The grammar of the JSON texts that `schema` (JSON Schema) describes."""
    return LLMatcher.grammar_from_json_schema({"x-guidance": JSON_FORM, **schema})


class Grammars:
    """Makes the constraints of one tokenizer, each grammar compiled once for a while."""

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._tokenizer, self._compiled = tokenizer, lru_cache(maxsize=32)(self._compile)
        self._vocabulary: LLTokenizer | None = None

    def prepare(self) -> None:
        """Do what the first grammar would else wait for, which takes some seconds."""
        with suppress(InputError):  # said to whoever asks for a grammar
            self._tokens()

    def check(self, grammar: str) -> None:
        """Raise InputError, with llguidance's reason, for a grammar that cannot be compiled.

        That takes up to some seconds, without holding Python's lock.
        """
        if len(grammar) > MOST_CHARACTERS:
            raise InputError(f"it is longer than {MOST_CHARACTERS} characters")
        self._compiled(grammar)

    def bytes_of(self, token: int) -> bytes:
        """The text of a token of the vocabulary, which need not be whole characters."""
        try:
            return self._tokens().decode_bytes([token])
        except InputError:  # a tokenizer that llguidance does not know
            return str(self._tokenizer.decode([token])).encode()

    def is_special(self, token: int) -> bool:
        """Whether a token is none of the text's. Raises InputError."""
        return self._tokens().is_special_token(token)

    def start(self, grammar: str, after: tuple[int, ...] = ()) -> GrammarConstraint:
        """A constraint at its beginning, which is behind the first tokens `after`.

        Raises InputError.
        """
        return GrammarConstraint(self._compiled(grammar).deep_copy(), after)

    def _compile(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self._tokens(), grammar, log_level=0)
        first = matcher.deep_copy()  # which shares what the first mask, the slowest, makes
        if not first.is_error():
            first.compute_bitmask()
        if problem := first.get_error():
            raise InputError(_one_line(problem))
        return matcher

    def _tokens(self) -> LLTokenizer:
        """The tokenizer as llguidance sees it."""
        if self._vocabulary is None:
            try:
                self._vocabulary = llguidance.hf.from_tokenizer(
                    self._tokenizer._tokenizer, eos_token=sorted(self._tokenizer.eos_token_ids)
                )
            except ValueError as error:
                raise InputError(f"the model's tokenizer has no grammars: {error}") from error
        return self._vocabulary


class GrammarConstraint:
    """A Constraint of zmoe.engine.stream: one text's way through a grammar."""

    def __init__(self, matcher: LLMatcher, after: tuple[int, ...]) -> None:
        self._matcher, self._after = matcher, after
        self._last: deque[int] = deque(maxlen=len(after))
        self._begun = not after

    def mask(self) -> Mask | None:
        """See Constraint: a bit per token. At the end of the grammar it is the end tokens'."""
        if not self._begun:
            return None
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
        self._check()
        return mask

    def accept(self, token: int) -> None:
        """See Constraint."""
        if self._begun:
            self._matcher.consume_token(token)
        else:
            self._last.append(token)
            self._begun = tuple(self._last) == self._after

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ZmoeError(f"the grammar has failed: {self._matcher.get_error()}")


def _one_line(problem: str) -> str:
    return " ".join(problem.split())[:500]
