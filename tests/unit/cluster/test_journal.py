"""A journal: what is written is read, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from zmoe.checkpoint.hub import resolve_model
from zmoe.cluster.journal import Journal, read_journal
from zmoe.config import EngineConfig, Sampling
from zmoe.engine.generate import Token
from zmoe.errors import InputError
from zmoe.loading import Skeleton, describe

INFO = describe(Skeleton(resolve_model("zmoe-tiny")))
ENGINE = EngineConfig()
SAMPLING = Sampling(max_tokens=9, temp=0.5, seed=2**64 - 1, logit_bias={3: -1.5}, logprobs=2)


def written(path: Path, *tokens: Token) -> Path:
    with Journal.begin(path, INFO, ENGINE, [1, 2], SAMPLING) as journal:
        assert list(journal.write(tokens)) == list(tokens)
    return path


def test_it_reads_what_it_writes_and_goes_on(tmp_path: Path) -> None:
    path = written(tmp_path / "j", Token(5, "a"), Token(6, "b"))
    whole = path.read_bytes()
    for left in (b"", b'{"tok'):
        path.write_bytes(whole + left)
        found = read_journal(path, INFO, ENGINE)
        assert (found.prompt, found.sampling, found.tokens) == ([1, 2], SAMPLING, [5, 6])
    with Journal.go_on(path, found) as journal:
        list(journal.write([Token(7, "c")]))
    assert read_journal(path, INFO, ENGINE).tokens == [5, 6, 7]
    with pytest.raises(InputError, match="exists"):
        Journal.begin(path, INFO, ENGINE, [1], SAMPLING)


def test_a_text_that_has_ended_does_not_go_on(tmp_path: Path) -> None:
    for name, last in (("stop", Token(0, "", "stop")), ("length", Token(1, "x", "length"))):
        path = written(tmp_path / name, Token(5, "a"), last)
        with pytest.raises(InputError, match="has ended"):
            read_journal(path, INFO, ENGINE)


Change = Callable[[list[bytes]], list[bytes]]
CHANGES: list[tuple[Change, str]] = [
    (lambda lines: [lines[0], lines[1].replace(b"5", b"6"), lines[2]], "damaged in line 2"),
    (lambda lines: [lines[0], lines[2]], "damaged in line 2"),
    (lambda lines: [lines[0], lines[2], lines[1]], "damaged in line 2"),
    (lambda lines: lines[1:], "damaged in line 1"),
    (lambda lines: [], "damaged in line 1"),
    (lambda lines: [lines[0], b"[]"], "damaged in line 2"),
    (lambda lines: [lines[0], b"[" * 10000], "damaged in line 2"),
    (lambda lines: [lines[0], b"\xff"], "damaged in line 2"),
]


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_a_file_that_was_altered_is_refused(tmp_path: Path, change: Change, words: str) -> None:
    path = written(tmp_path / "j", Token(5, "a"), Token(6, "b"))
    lines = change(path.read_bytes().splitlines())
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    with pytest.raises(InputError, match=words):
        read_journal(path, INFO, ENGINE)


def test_a_journal_of_another_run_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "j", Token(5, "a"))
    other = replace(INFO, fingerprint="f" * 32)
    for info, engine, words in (
        (other, ENGINE, "its fingerprint is"),
        (INFO, EngineConfig(activations="int8"), "its activations is exact, here int8"),
        (INFO, EngineConfig(max_kv_size=64), "its max_kv_size is none, here 64"),
    ):
        with pytest.raises(InputError, match=words):
            read_journal(path, info, engine)


@pytest.mark.parametrize(
    ("header", "token"),
    [
        ({"prompt": [INFO.vocabulary]}, 5),
        ({"prompt": "ab"}, 5),
        ({"prompt": 5}, 5),
        ({"prompt": None}, 5),
        ({"sampling": None}, 5),
        ({"sampling": {"seed": 1}}, 5),
        ({"sampling": {"seed": 1, "logit_bias": None, "temp": -1}}, 5),
        ({"sampling": {"seed": None, "logit_bias": None}}, 5),
        ({}, True),
        ({}, -1),
        ({}, None),
    ],
)
def test_lines_whose_digests_are_right_are_checked_too(
    tmp_path: Path, header: dict[str, object], token: object
) -> None:
    path = written(tmp_path / "j")
    first = json.loads(path.read_bytes())
    del first["digest"]
    with (tmp_path / "forged").open("wb") as file:
        journal = Journal(tmp_path / "forged", file)
        journal._write({**first, **header})
        journal._write({"token": token})
    with pytest.raises(InputError, match="would not write such lines"):
        read_journal(tmp_path / "forged", INFO, ENGINE)
