"""Prefixes that prompts share, in memory and through a file."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, load_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from safetensors.numpy import load_file

from tests.families import build
from zmoe.cluster import life, mlx_prompt_cache
from zmoe.cluster.cluster import Cluster
from zmoe.cluster.messages import LoadPrefix
from zmoe.cluster.node import Node
from zmoe.cluster.spec import ClusterSpec
from zmoe.config import EngineConfig, Timing
from zmoe.engine.prompt import open_tokenizer
from zmoe.errors import InputError, ZmoeError

PROMPT = [5 + 7 * at % 83 for at in range(150)]
TEXT: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True}


def generate(cluster: Cluster, prompt: list[int]) -> tuple[list[int], int]:
    """The text's tokens, and how many of the prompt were cached."""
    generation = cluster.generate(prompt, **TEXT)
    return [token.id for token in generation], generation.timings.cached_tokens


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster("zmoe-tiny", spec=ClusterSpec(engine=EngineConfig(compute="native"))) as alone:
        yield alone


@pytest.fixture(scope="module")
def saved(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("cache") / "prompt.safetensors"
    generate(cluster, PROMPT)
    assert cluster.save_prompt_cache(file, PROMPT) == 128
    assert list(file.parent.iterdir()) == [file]
    return file


@pytest.fixture(scope="module")
def on_mlx() -> Iterator[Cluster]:
    with Cluster("zmoe-tiny", spec=ClusterSpec(engine=EngineConfig(compute="mlx"))) as alone:
        yield alone


@pytest.fixture(scope="module")
def saved_by_mlx(on_mlx: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written after the first token, while another sequence runs beside."""
    file = tmp_path_factory.mktemp("cache") / "prompt.safetensors"
    beside, running = (on_mlx.submit(ids, **TEXT) for ids in ([7, 8, 9], PROMPT))
    next(running)
    assert on_mlx.save_prompt_cache(file, PROMPT) == 150
    assert list(file.parent.iterdir()) == [file]
    assert len(list(beside)) == 12 and len(list(running)) == 11
    return file


@pytest.mark.parametrize("schedule", ["decentralized", "centralized"])
@pytest.mark.parametrize("compute", ["native", "mlx"])
def test_two_nodes_share_what_prompts_have_in_common(schedule: str, compute: str) -> None:
    engine = EngineConfig(schedule=schedule, compute=compute)
    with Cluster("zmoe-tiny", spec=ClusterSpec(2, engine=engine)) as pair:
        second = [*PROMPT[:140], 9, 8, 7]
        alone, cached = generate(pair, second)
        assert cached == 0
    with Cluster("zmoe-tiny", spec=ClusterSpec(2, engine=engine)) as pair:
        generate(pair, PROMPT)
        assert generate(pair, second) == (alone, 128 if compute == "native" else 140)


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_recurrent_model_goes_on_from_a_snapshot(
    nodes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its state is kept at the end of the last block before the last token of a prompt, and of the
    last one of a text; a prompt begins with all before that or with nothing.
    """
    tiny = open_tokenizer(Path(Cluster("zmoe-tiny").info.path))
    monkeypatch.setattr(life, "open_tokenizer", lambda _: tiny)
    folder, longer = build("qwen3_next", tmp_path), [*PROMPT[:-1], 9, 8, 7]
    with Cluster(folder, nodes) as hybrid:
        alone, cached = generate(hybrid, longer)
        assert cached == 0
    with Cluster(folder, nodes) as hybrid:
        text = [token.id for token in hybrid.generate(PROMPT, max_tokens=50, ignore_eos=True)]
        assert generate(hybrid, longer) == (alone, 128)
        assert generate(hybrid, [*PROMPT[:100], 9, 8, 7])[1] == 0
        assert generate(hybrid, [*PROMPT, *text, 9])[1] == 192


def test_a_recurrent_model_shares_a_system_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = open_tokenizer(Path(Cluster("zmoe-tiny").info.path))
    tiny._tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    )
    tiny = TokenizerWrapper(tiny._tokenizer)
    encode = TokenizerWrapper.apply_chat_template
    monkeypatch.setattr(  # the model's vocabulary is smaller
        TokenizerWrapper, "apply_chat_template", lambda *a, **k: [i % 96 for i in encode(*a, **k)]
    )
    monkeypatch.setattr(life, "open_tokenizer", lambda _: tiny)
    system = "You are the king of England, who speaks to his people, as kings do. " * 5
    with Cluster(build("qwen3_next", tmp_path), 2) as hybrid:
        cached = []
        for prompt in ("Speak.", "Be silent, and go."):
            generation = hybrid.generate(prompt, system_prompt=system, **TEXT)
            list(generation)
            cached.append(generation.timings.cached_tokens)
    assert cached[0] == 0 and cached[1] >= 64


@pytest.mark.parametrize("schedule", ["decentralized", "centralized"])
def test_a_prompt_goes_on_from_a_file_on_all_nodes(
    schedule: str, cluster: Cluster, saved: Path
) -> None:
    second = [*PROMPT[:140], 9, 8, 7]
    alone, _ = generate(cluster, second)
    spec = ClusterSpec(2, engine=EngineConfig(schedule=schedule, compute="native"))
    with Cluster("zmoe-tiny", spec=spec) as pair:
        assert pair.load_prompt_cache(saved) == 128
        assert generate(pair, second) == (alone, 128)
        assert pair.load_prompt_cache(saved) == 128  # twice does no harm


@pytest.mark.parametrize("schedule", ["decentralized", "centralized"])
def test_a_prompt_goes_on_from_a_file_of_mlx_caches(
    schedule: str, on_mlx: Cluster, saved_by_mlx: Path
) -> None:
    second = [*PROMPT[:140], 9, 8, 7]
    alone, _ = generate(on_mlx, second)
    spec = ClusterSpec(2, engine=EngineConfig(schedule=schedule, compute="mlx"))
    with Cluster("zmoe-tiny", spec=spec) as pair:
        assert pair.load_prompt_cache(saved_by_mlx) == 150
        assert generate(pair, second) == (alone, 140)
        assert generate(pair, PROMPT)[1] == 149
        assert pair.load_prompt_cache(saved_by_mlx) == 150  # twice does no harm


def test_a_recurrent_model_goes_on_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds full blocks and the state after them; prompts begin with all that or nothing."""
    tiny = open_tokenizer(Path(Cluster("zmoe-tiny").info.path))
    monkeypatch.setattr(life, "open_tokenizer", lambda _: tiny)
    folder, file, longer = build("qwen3_next", tmp_path), tmp_path / "file", [*PROMPT[:-1], 9, 8]
    with Cluster(folder) as hybrid:
        alone, _ = generate(hybrid, longer)
        running = hybrid.generate(PROMPT, **TEXT)
        next(running)
        assert hybrid.save_prompt_cache(file, PROMPT) == 128
    with Cluster(folder, 2) as pair:
        for _ in range(2):  # twice does no harm
            assert pair.load_prompt_cache(file) == 128
        assert generate(pair, [*PROMPT[:100], 9])[1] == 0
        assert generate(pair, longer) == (alone, 128)


def test_a_window_of_mlx_goes_through_a_file(tmp_path: Path) -> None:
    file, longer = tmp_path / "file", [*PROMPT[:-1], 9, 8]
    spec = ClusterSpec(engine=EngineConfig(compute="mlx", max_kv_size=64, prefill_chunk=149))
    with Cluster("zmoe-tiny", spec=spec) as first:
        alone, _ = generate(first, longer)
    with Cluster("zmoe-tiny", spec=spec) as first:
        generate(first, PROMPT)
        assert first.save_prompt_cache(file, PROMPT) == 149
    with Cluster("zmoe-tiny", spec=spec) as other:
        assert other.load_prompt_cache(file) == 149
        assert generate(other, longer) == (alone, 149)


def test_mlx_lm_reads_what_it_has_written(saved_by_mlx: Path) -> None:
    caches, metadata = load_prompt_cache(str(saved_by_mlx), return_metadata=True)
    assert [type(cache) for cache in caches] == [KVCache] * 4
    assert {cache.offset for cache in caches} == {150}
    assert metadata["tokens"].split() == list(map(str, PROMPT))


def test_keys_and_values_in_8_bits_go_through_a_file(tmp_path: Path) -> None:
    file, second = tmp_path / "file", [*PROMPT[:140], 9, 8, 7]
    spec = ClusterSpec(engine=EngineConfig(compute="native", kv_bits=8))
    with Cluster("zmoe-tiny", spec=spec) as first:
        alone, _ = generate(first, second)
        first.save_prompt_cache(file, second)
    with Cluster("zmoe-tiny", spec=spec) as other:
        assert other.load_prompt_cache(file) == 128
        assert generate(other, second) == (alone, 128)


def test_the_file_is_what_other_tools_read(cluster: Cluster, saved: Path) -> None:
    with saved.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    assert header["__metadata__"]["fingerprint"] == cluster.info.fingerprint
    assert header["layers.0.keys"]["shape"][0] == 2
    if header["layers.0.keys"]["dtype"] != "BF16":  # which numpy does not have
        assert (load_file(saved)["tokens"] == PROMPT[:128]).all()


def test_a_prompt_of_less_than_a_block_writes_nothing(cluster: Cluster, tmp_path: Path) -> None:
    generate(cluster, PROMPT[:60])
    assert cluster.save_prompt_cache(tmp_path / "none", PROMPT[:60]) == 0
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there(cluster: Cluster, saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "nowhere" / "file"
    with pytest.raises(InputError, match=f"prompt cache {file} cannot be written: No such file"):
        cluster.save_prompt_cache(file, PROMPT)


# ---- files that are refused ---------------------------------------------------------

Change = Callable[[dict[str, Any], bytearray], None]  # of header and data


def changed(saved: Path, to: Path, change: Change) -> Path:
    content = saved.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])
    change(header, data)
    text = json.dumps(header).encode()
    to.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return to


def says(name: str, value: str) -> Change:
    return lambda header, data: header["__metadata__"].update({name: value})


def set_token(header: dict[str, Any], data: bytearray) -> None:
    at = header["tokens"]["data_offsets"][0]
    data[at : at + 4] = struct.pack("<I", 1 << 30)


def flip(header: dict[str, Any], data: bytearray) -> None:
    data[-1] ^= 1


def flip_header(header: dict[str, Any], data: bytearray) -> None:
    header["__metadata__"]["1.0"] = "ConcatenateKVCache"


def cut(header: dict[str, Any], data: bytearray) -> None:
    del data[-5:]


def reshape(header: dict[str, Any], data: bytearray) -> None:
    shape = header["layers.0.keys"]["shape"]
    header["layers.0.keys"]["shape"] = [shape[0] * 2, *shape[1:-1], shape[-1] // 2]


def fewer_tokens(header: dict[str, Any], data: bytearray) -> None:
    header["tokens"] = {"dtype": "U32", "shape": [64], "data_offsets": [0, 256]}


def odd_tokens(header: dict[str, Any], data: bytearray) -> None:
    header["tokens"] = {"dtype": "U32", "shape": [2, 64], "data_offsets": [0, 512]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (says("fingerprint", "f" * 32), "is of another run: its fingerprint is f{32}, here"),
        (says("dtype", "float16"), "is of another run: its dtype is float16, here"),
        (says("activations", "int8"), "its activations is int8, here exact"),
        (says("kv_bits", "8"), "its kv_bits is 8, here none"),
        (says("block", "16"), "its block is 16, here 64"),
        (says("format", "mlx"), "is no prompt cache that this zmoe reads"),
        (lambda header, data: header.pop("__metadata__"), "is no prompt cache"),
        (lambda header, data: header.pop("tokens"), "is no prompt cache"),
        (lambda header, data: header.pop("layers.1.values"), "tensor layers.1.values is absent"),
        (says("digest", "0" * 32), "is damaged: its contents are not those that were written"),
        (says("digest", "\n" * 32), "is damaged: it has no digest"),
        (set_token, "is damaged: it has tokens outside of 0 to 1023"),
        (flip, "is damaged: its contents"),
        (cut, "is truncated: tensor"),
        (reshape, "is not of this model: its tensor layers.0.keys is"),
        (fewer_tokens, "is not of this model: its tensor"),
        (odd_tokens, "is damaged: it has tokens of U32"),
    ],
)
def test_files_that_are_refused(saved: Path, tmp_path: Path, change: Change, words: str) -> None:
    file = changed(saved, tmp_path / "other", change)
    spec = ClusterSpec(engine=EngineConfig(compute="native"))
    with (
        Cluster("zmoe-tiny", spec=spec) as alone,
        pytest.raises(InputError, match=words) as caught,
    ):
        alone.load_prompt_cache(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\0" * 40, np.random.default_rng(1).bytes(5000)])
def test_files_that_are_none(content: bytes, cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "none").write_bytes(content)
    with pytest.raises(InputError, match="none is"):
        cluster.load_prompt_cache(tmp_path / "none")
    with pytest.raises(InputError, match="nowhere cannot be read: No such file"):
        cluster.load_prompt_cache(tmp_path / "nowhere")


def test_a_file_that_only_the_leader_has(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = changed(saved, tmp_path / "other", says("digest", "0" * 32))
    for there, words in ((tmp_path / "none", "No such file"), (other, "another one than the l")):
        with Cluster("zmoe-tiny", 2) as pair:
            assert pair._leader is not None
            send = pair._leader.bus.broadcast

            def elsewhere(there: Path, send: Any, message: Any, ranks: Any = None) -> None:
                is_load = isinstance(message, LoadPrefix)
                send(replace(message, path=str(there)) if is_load else message, ranks)

            monkeypatch.setattr(pair._leader.bus, "broadcast", partial(elsewhere, there, send))
            with pytest.raises(InputError, match=f"node 1: .*{there}.*{words}"):
                pair.load_prompt_cache(saved)
            with pytest.raises(ZmoeError, match="has ended"):
                pair.generate(PROMPT)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (says("0.fingerprint", "f" * 32), "is of another run: its fingerprint is f{32}, here"),
        (says("0.mlx_lm", "0.1"), "is of another run: its mlx_lm is 0.1, here"),
        (says("0.max_kv_size", "64"), "is of another run: its max_kv_size is 64, here none"),
        (says("0.format", "mlx"), "is no prompt cache that this zmoe reads"),
        (says("0.tokens", "1 2 x"), "is damaged: it has tokens outside of 0 to 1023"),
        (says("0.tokens", "1024"), "is damaged: it has tokens outside of 0 to 1023"),
        (says("0.tokens", "9" * 5000), "is damaged: it has tokens outside of 0 to 1023"),
        (says("0.tokens", " "), "is damaged: it has tokens outside of 0 to 1023"),
        (says("0.digest", "0" * 31), "is damaged: it has no digest"),
        (says("0.digest", "0" * 32), "is damaged: its contents are not those that were written"),
        (flip, "is damaged: its contents"),
        (flip_header, "is damaged: its contents"),
        (cut, "is truncated: tensor"),
    ],
)
def test_files_of_mlx_caches_that_are_refused(
    saved_by_mlx: Path, tmp_path: Path, change: Change, words: str
) -> None:
    file = changed(saved_by_mlx, tmp_path / "other", change)
    spec = ClusterSpec(engine=EngineConfig(compute="mlx"))
    with (
        Cluster("zmoe-tiny", spec=spec) as alone,
        pytest.raises(InputError, match=words) as caught,
    ):
        alone.load_prompt_cache(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_with_a_digest_that_mlx_lm_cannot_read(
    saved_by_mlx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = changed(saved_by_mlx, tmp_path / "other", says("1.0", "NoSuchCache"))
    monkeypatch.setattr(mlx_prompt_cache, "_digest", lambda path, stated: stated.decode())
    spec = ClusterSpec(engine=EngineConfig(compute="mlx"))
    words = f"{file} is damaged: mlx-lm does not read it"
    with Cluster("zmoe-tiny", spec=spec) as alone, pytest.raises(InputError, match=words):
        alone.load_prompt_cache(file)


def test_a_node_of_experts_only(saved: Path) -> None:
    node = Node(Cluster("zmoe-tiny").info, EngineConfig(), Timing(), rank=1, nodes=2)
    with pytest.raises(InputError, match="no prompt cache: node 1 has experts only"):
        node.load_prefix(saved, [0], "0" * 32)


def test_caches_of_another_kind(
    cluster: Cluster, on_mlx: Cluster, saved: Path, saved_by_mlx: Path
) -> None:
    with pytest.raises(InputError, match=f"{saved} is of caches of the C kernels, and dbrx has th"):
        on_mlx.load_prompt_cache(saved)
    with pytest.raises(InputError, match=f"{saved_by_mlx} is of caches of MLX, and dbrx has those"):
        cluster.load_prompt_cache(saved_by_mlx)
    for each in (cluster, on_mlx):  # which goes on
        assert len(generate(each, PROMPT)[0]) == 12


def test_where_there_is_nothing_to_share(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = open_tokenizer(Path(Cluster("zmoe-tiny").info.path))
    monkeypatch.setattr(life, "open_tokenizer", lambda _: tiny)
    window = ClusterSpec(engine=EngineConfig(max_kv_size=64, compute="native"))
    for made, words in (
        (Cluster("zmoe-tiny", spec=window), "^max_kv_size is 64: a window drops"),
        (Cluster(build("deepseek_v41", tmp_path)), "deepseek_v41 has caches of its own, which"),
    ):
        with made as other:
            with pytest.raises(InputError, match=words):
                other.save_prompt_cache(tmp_path / "none", PROMPT)
            with pytest.raises(InputError, match=words):
                other.load_prompt_cache(saved)
    assert not (tmp_path / "none").exists()
