"""The packaged model `zmoe-tiny`, as mlx-lm loads it: is it small, sound and trained?"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest

import zmoe

FOLDER = Path(zmoe.__file__).parent / "data" / "zmoe-tiny"
MAX_BYTES = 10_000_000
MAX_NATS_PER_TOKEN = 4.2  # a uniform guess is 6.9, the frequencies of the tokens alone give 5.4
MIN_KNOWN_SHARE = 0.8
PROMPT = "ROMEO:"

# From the held-out tenth: neither the weights nor the tokenizer were fitted to it.
EXCERPT = """\
BAPTISTA:
I have a daughter, sir, called Katharina.

GREMIO:
You are too blunt: go to it orderly.

PETRUCHIO:
You wrong me, Signior Gremio: give me leave.
I am a gentleman of Verona, sir,
That, hearing of her beauty and her wit,
Her affability and bashful modesty,
Her wondrous qualities and mild behavior,
Am bold to show myself a forward guest
Within your house, to make mine eye the witness
Of that report which I so oft have heard.
And, for an entrance to my entertainment,
I do present you with a man of mine,
Cunning in music and the mathematics,
To instruct her fully in those sciences,
Whereof I know she is not ignorant:
Accept of him, or else you do me wrong:
His name is Licio, born in Mantua.

BAPTISTA:
You're welcome, sir; and he, for your good sake.
But for my daughter Katharina, this I know,
She is not for your turn, the more my grief.
"""

COMMON_WORDS = """\
a about after again against all am an and any are art as at away be been before being better blood
but by call can cannot come comes could crown day days dead death did die do done doth down ere
even ever eye eyes fair farewell father fear for forth from full gentle give go god gone good grace
great had hand hands hast hath have he head hear heart heaven heavens her here himself hence him
his hold honour hope house how i if in is it keep king know lady lay leave less let lie life like
little live long look lord lords love made madam make makes man many master may me men mercy mind
mine more most mother much must my myself name nature never new no noble none nor not nothing now o
of off on one or other our out own part peace people place play poor power pray prince put queen
rest right romeo say see set shall she should show sin sir so some son soul speak stand stay still
strange such sweet sword take tears tell than that the thee their them then there therefore these
they thine thing things think this those thou though thought thousand thus thy till time to told
too true truth two unto up upon us use very was way we well were what when where which while who
whom whose why will with within without word words world would yet york you young your yours
"""

# `words` cuts at the apostrophe ("I'll", "call'd", "know'st"); Romeo's scenes have these speakers.
ENDINGS_AND_SPEAKERS = (
    "d ll re s st t ve juliet nurse mercutio benvolio tybalt capulet paris friar "
)


@pytest.fixture(scope="module")
def loaded() -> tuple[nn.Module, Any]:
    return mlx_lm.load(str(FOLDER))


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def test_fits_the_package() -> None:
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) <= MAX_BYTES


def test_config_is_dbrx_with_16_experts_top_4() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["model_type"] == "dbrx"
    assert config["ffn_config"]["moe_num_experts"] == 16
    assert config["ffn_config"]["moe_top_k"] == 4
    assert config["max_seq_len"] >= 512


@pytest.mark.parametrize(
    "text",
    [
        EXCERPT,
        "  two  spaces ,\ttab\r\n\n",
        "naïve façade, 漢字かな, 🎭👩‍🚀",
        "\x00\x7f\u00ad\ufeff",
    ],
)
def test_tokenizer_round_trips(loaded: tuple[nn.Module, Any], text: str) -> None:
    _, tokenizer = loaded
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_ends_and_does_not_chat(loaded: tuple[nn.Module, Any]) -> None:
    _, tokenizer = loaded
    end = tokenizer.encode("<|endoftext|>")
    assert set(end) == set(tokenizer.eos_token_ids)
    assert not tokenizer.has_chat_template


def test_held_out_loss(loaded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = loaded
    ids = mx.array(tokenizer.encode(EXCERPT))
    logits = model(ids[None, :-1])[0]
    loss = nn.losses.cross_entropy(logits, ids[1:], reduction="mean").item()
    assert loss < MAX_NATS_PER_TOKEN


def test_greedy_text_is_words(loaded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = loaded
    # The last word may be cut short by the number of tokens.
    found = words(mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=64))[:-1]
    known = set(words(COMMON_WORDS + ENDINGS_AND_SPEAKERS + EXCERPT))
    assert len(found) >= 20
    assert sum(word in known for word in found) >= MIN_KNOWN_SHARE * len(found), found
