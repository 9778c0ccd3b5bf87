import random

import pytest

from research.restune_tiny.palette import COLOURS
from research.restune_tiny.parts.captions import Captions

RECORDS = [
    {"captions": ["apple", "red apple"], "tags": ["fruit", "food"], "style": "noto style"},
    {"captions": ["house"], "tags": [], "style": "blob style"},
]


@pytest.fixture(scope="module")
def captions(tokenizer):
    return Captions(RECORDS, tokenizer)


def drawn(captions, record, colour, count=4000):
    rng = random.Random(7)
    return [captions.draw(record, colour, rng) for _ in range(count)]


def share(prompts, holds):
    return sum(map(holds, prompts)) / len(prompts)


def test_one_prompt_in_ten_is_empty(captions):
    prompts = drawn(captions, RECORDS[0], "white")
    assert share(prompts, lambda prompt: not prompt) == pytest.approx(0.1, abs=0.015)


def test_prompts_name_the_icon(captions):
    prompts = [prompt for prompt in drawn(captions, RECORDS[0], "white") if prompt]
    assert all("apple" in prompt or prompt.startswith(("fruit", "food")) for prompt in prompts)
    assert share(prompts, lambda prompt: "red apple" in prompt) == pytest.approx(0.19, abs=0.04)
    assert share(prompts, lambda prompt: "an apple" in prompt) > 0.1
    assert not any("a apple" in prompt or "an red" in prompt for prompt in prompts)


def test_nine_prompts_in_ten_name_the_style(captions):
    prompts = [prompt for prompt in drawn(captions, RECORDS[1], "white") if prompt]
    assert share(prompts, lambda prompt: prompt.endswith(", blob style")) == pytest.approx(0.81, abs=0.03)
    assert share(prompts, lambda prompt: prompt.endswith(" in blob style")) == pytest.approx(0.09, abs=0.02)
    assert share(prompts, lambda prompt: "style" not in prompt) == pytest.approx(0.1, abs=0.02)


def test_colour_behind_the_icon_is_named_and_white_seldom(captions):
    prompts = [prompt for prompt in drawn(captions, RECORDS[0], "light blue") if prompt]
    assert all(" on a light blue background" in prompt for prompt in prompts)
    prompts = [prompt for prompt in drawn(captions, RECORDS[0], "white") if prompt]
    assert share(prompts, lambda prompt: " on a white background" in prompt) == pytest.approx(0.08, abs=0.015)


def test_ids_are_the_tokenizers_in_a_compact_numbering(captions, tokenizer):
    prompts = [
        "",
        *(prompt for colour in COLOURS for record in RECORDS for prompt in drawn(captions, record, colour, 40)),
    ]
    ids = captions.ids(prompts)
    assert ids.shape == (len(prompts), 77)
    assert int(ids.max()) < len(captions.used) < 100
    expected = tokenizer(prompts, padding="max_length", max_length=77).input_ids
    assert [[captions.used[index] for index in row] for row in ids.tolist()] == expected
