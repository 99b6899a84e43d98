"""Text, tokenizer and training windows of `zmoe-tiny`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_repeat import repeated_windows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Split:
    """Training text, and the last tenth of the file, which nothing is fitted to."""

    train: str
    held_out: str


def read_split(path: Path) -> Split:
    """Cut the file at the first blank line after nine tenths, so that no speech is divided."""
    text = path.read_text(encoding="utf-8")
    cut = text.index("\n\n", int(len(text) * (1 - HELD_OUT_SHARE))) + 2
    return Split(text[:cut], text[cut:])


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """A byte-level BPE: all 256 bytes are in the vocabulary, so any UTF-8 round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> Tensor:
    """Token ids of a text, (tokens,) int64."""
    return torch.tensor(tokenizer.encode(text).ids)


class WindowSampler:
    """Draws batches of random windows from the training text.

    With `bpe_dropout` the text is encoded anew for each pass, with that share of the merges left
    out at random (Provilkov et al. 2020): the model sees many spellings of the same words, which
    delays overfitting on a text this short.
    """

    def __init__(self, tokenizer: Tokenizer, text: str, bpe_dropout: float, seed: int) -> None:
        # Own copy: dropout must not leak into the tokenizer that is published.
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._text = text
        self._generator = torch.Generator().manual_seed(seed)
        self._remaining = 0
        self.bpe_dropout = bpe_dropout
        self._ids = torch.empty(0, dtype=torch.int64)

    def _renew(self) -> None:
        if self._ids.numel() == 0 or self.bpe_dropout > 0:
            self._tokenizer.model.dropout = self.bpe_dropout or None
            self._ids = encode(self._tokenizer, self._text)
        self._remaining = self._ids.numel()

    def draw_repeated(self, batch: int) -> tuple[Tensor, int]:
        """Pieces of the text repeated to fill windows, and a piece's length in tokens."""
        return repeated_windows(self._ids, batch, self._generator)

    def draw(self, batch: int, length: int) -> tuple[Tensor, Tensor]:
        """Inputs and next-token targets, each (batch, length)."""
        if self._remaining <= 0:
            self._renew()
        self._remaining -= batch * length
        starts = torch.randint(self._ids.numel() - length, (batch, 1), generator=self._generator)
        windows = self._ids[starts + torch.arange(length + 1)]
        return windows[:, :-1], windows[:, 1:]
