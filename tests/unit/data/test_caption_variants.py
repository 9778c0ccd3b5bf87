"""Variants of captions: what each setting gives, and with which probabilities."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import permutations
from math import comb, sqrt
from pathlib import Path
from random import Random
from typing import Any

import pytest

from restune_diffusion.data.caption_variants.tags import Tags
from restune_diffusion.data.caption_variants.variants import caption_variants
from restune_diffusion.data.caption_variants.wildcards import expand_wildcards, parse_wildcards
from restune_diffusion.data.captions import find_examples, read_examples
from restune_diffusion.data.config import DataConfig
from restune_diffusion.data.data_sheet import DataSheet
from restune_diffusion.data.example import Example
from restune_diffusion.data.refusals import Refused
from restune_diffusion.data.training_images import load_samples
from restune_diffusion.utils.errors import DataError, SettingsError
from restune_diffusion.utils.seeds import derived_seed

from ...tiny_training import draw_image

COUNT = 10_000


def settings(**given: Any) -> DataConfig:
    return DataConfig(data=Path("d"), **given)


def generated(caption: str, count: int = COUNT, **given: Any) -> list[str]:
    """One variant of the caption for each of many seeds, as if each belonged to another image."""
    config = settings(caption_variants=2, **given)
    return [
        caption_variants([caption], config, Random(derived_seed(seed, "variants"))).texts[0] for seed in range(count)
    ]


def assert_distributed(found: Sequence[Any], expected: Mapping[Any, float]) -> None:
    """Pearson's chi-square test at the level 0.001; probabilities are relative."""
    counts, total = Counter(found), sum(expected.values())
    assert counts.keys() <= expected.keys()
    shares = {value: len(found) * weight / total for value, weight in expected.items()}
    statistic = sum((counts[value] - share) ** 2 / share for value, share in shares.items())
    degrees = len(expected) - 1
    # Quantile 0.999 of the distribution (Wilson and Hilferty).
    limit = degrees * (1 - 2 / (9 * degrees) + 3.09 * sqrt(2 / (9 * degrees))) ** 3
    assert statistic < limit, (statistic, limit, counts)


def captioned(folder: Path, captions: Mapping[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, caption in captions.items():
        draw_image("red").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption)
    return folder


def read(folder: Path, seed: int = 0, tokens: Sequence[str] = (), **given: Any) -> dict[str, Example]:
    refused: list[Refused] = []
    examples = read_examples(DataConfig(data=folder, **given), refused, seed, tokens)
    assert not [each for each in refused if each.fault]
    return {example.path.stem: example for example in examples}


def test_every_order_of_the_tags_is_equally_probable() -> None:
    found = generated("a, b, c, d", shuffle_tags=True)
    assert_distributed(found, {", ".join(order): 1 for order in permutations("abcd")})


def test_kept_tags_stay_in_front_and_every_other_tag_is_at_every_place_equally_often() -> None:
    found = [text.split(", ") for text in generated("x, y, a, b, c", shuffle_tags=True, keep_tags=2)]
    assert {tuple(tags[:2]) for tags in found} == {("x", "y")}
    for place in range(3):
        assert_distributed([tags[2 + place] for tags in found], dict.fromkeys("abc", 1))


def test_the_number_of_dropped_tags_is_binomial() -> None:
    found = [text.split(", ") for text in generated("x, a, b, c, d, e", tag_dropout=0.3, keep_tags=1)]
    assert all(tags == sorted(tags, key="xabcde".index) and tags[0] == "x" for tags in found), "in their order"
    dropped = {number: comb(5, number) * 0.3**number * 0.7 ** (5 - number) for number in range(6)}
    assert_distributed([6 - len(tags) for tags in found], dropped)
    assert_distributed([tag for tags in found for tag in tags[1:]], dict.fromkeys("abcde", 1))


def test_shuffled_and_dropped_tags_are_independent() -> None:
    found = generated("a, b", shuffle_tags=True, tag_dropout=0.25)
    assert_distributed(found, {"a, b": 9 / 32, "b, a": 9 / 32, "a": 3 / 16, "b": 3 / 16, "": 1 / 16})


def test_every_option_of_a_wildcard_is_equally_probable_and_two_are_independent() -> None:
    found = generated("{red|blue|green} disc, {big|small}", wildcards=True)
    expected = {f"{color} disc, {size}": 1 for color in ("red", "blue", "green") for size in ("big", "small")}
    assert_distributed(found, expected)


def test_the_variants_of_an_image_have_every_option_equally_often() -> None:
    for seed in range(20):
        found = caption_variants(["{a|b} {c|d|}"], settings(wildcards=True, caption_variants=6), Random(seed)).texts
        assert Counter(text[0] for text in found) == {"a": 3, "b": 3}
        assert Counter(text[2:] for text in found) == {"c": 2, "d": 2, "": 2}
        few = caption_variants(["{a|b|c|d}"], settings(wildcards=True, caption_variants=3), Random(seed)).texts
        assert len(set(few)) == 3


@pytest.mark.parametrize(
    ("caption", "parts"),
    [
        ("a disc", [("a disc",)]),
        ("{a|b} c", [("",), ("a", "b"), (" c",)]),
        ("{a}", [("",), ("a",), ("",)]),
        ("{{a|b}}", [("{a|b}",)]),
        ("{a|{{b}}}", [("",), ("a", "{b}"), ("",)]),
        ("x | {} {a|}", [("x | {} ",), ("a", ""), ("",)]),
        ("{a|{b|c}}", None),
        ("{a|{b|c} }", None),
        ("{a", None),
        ("a}", None),
        ("}a{", None),
        ("{a|b}}", None),
    ],
)
def test_wildcards_are_those_of_kohya(caption: str, parts: list[tuple[str, ...]] | None) -> None:
    assert parse_wildcards(caption) == parts


def test_a_caption_whose_braces_do_not_pair_up_is_text() -> None:
    found = caption_variants(["{a|b", "{c|d}"], settings(wildcards=True, caption_variants=4), Random(0))
    assert Counter(found.texts) == {"{a|b": 2, "c": 1, "d": 1}
    assert (found.unpaired, found.written) == (True, 2)
    assert expand_wildcards([("{",)], 1, Random(0)) == ["{"]


@pytest.mark.parametrize(
    ("caption", "given", "tags"),
    [
        ("a,, b ,c", {}, Tags((), ("a", "b", "c"))),
        ("a, b, c", {"keep_tags": 2}, Tags(("a", "b"), ("c",))),
        ("a, b", {"keep_tags": 5}, Tags(("a", "b"), ())),
        ("a, b ||| c, d ||| e", {"keep_tags_separator": "|||", "keep_tags": 1}, Tags(("a", "b"), ("c", "d"), ("e",))),
        ("a ||| b", {"keep_tags_separator": "|||"}, Tags(("a",), ("b",))),
        ("a, b", {"keep_tags_separator": "|||", "keep_tags": 1}, Tags(("a",), ("b",))),
        ("a, a Sks cat, b", {}, Tags(("a Sks cat",), ("a", "b"))),
        ("a, sks, b, <zorp> c", {"keep_tags": 1}, Tags(("sks", "<zorp> c", "a"), ("b",))),
        ("asks, b", {}, Tags((), ("asks", "b"))),
        ("", {}, Tags((), ())),
    ],
)
def test_tags_that_are_kept(caption: str, given: dict[str, Any], tags: Tags) -> None:
    assert Tags.of(caption, settings(shuffle_tags=True, **given), ["sks", "<zorp>"]) == tags


def test_lines_of_a_file_and_items_of_a_list_are_captions_if_asked(tmp_path: Path) -> None:
    captioned(tmp_path, {"a": "first\r\n\n second \n", "b": "alone"})
    assert [example.caption for example in find_examples(tmp_path)] == ["first\n\n second", "alone"]
    assert all(example.variants is None for example in read(tmp_path).values())
    found = read(tmp_path, captions="all")
    assert found["a"].texts == ("first", "second")
    assert (found["b"].texts, found["b"].caption) == (("alone",), "alone")
    rows = [
        {"file_name": "a.png", "text": [" one ", "", "two\nthree", None]},
        {"file_name": "b.png", "text": []},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [example.caption for example in find_examples(tmp_path, "prompt")] == ["one", "prompt"]
    found = read(tmp_path, captions="all", prompt="for {all}", trigger_word="sks")
    assert found["a"].texts == ("sks, one", "sks, two", "sks, three")
    assert found["b"].texts == ("sks, for {all}",)


def test_lists_of_which_only_the_first_item_is_read_are_reported(tmp_path: Path) -> None:
    captioned(tmp_path, {"a": "x"})
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": ["one", "two"]}')
    refused: list[Refused] = []
    (example,) = read_examples(DataConfig(data=tmp_path), refused)
    assert example.caption == "one"
    assert [each.reason for each in refused if "--captions all" in each.reason] == [
        "has 1 image with a list of captions, of which the first is read; set --captions all to use each of them"
    ]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": ["one", "t\\u0000o"]}')
    with pytest.raises(DataError, match=r"a\.png has a caption with NUL characters"):
        read_examples(DataConfig(data=tmp_path, captions="all"), [])


def test_a_list_in_a_saved_dataset_gives_all_its_captions(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"image": [draw_image("red"), draw_image("blue")], "text": [["one", "two"], ["", "three"]]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    for given, expected in (
        ({}, [("one",), ("three",)]),
        ({"prompt": "p"}, [("one",), ("p",)]),
        ({"captions": "all"}, [("one", "two"), ("three",)]),
    ):
        examples = read_examples(DataConfig(data=tmp_path / "saved", **given), [])
        assert [example.texts for example in examples] == expected


def test_every_caption_has_equally_many_variants(tmp_path: Path) -> None:
    captioned(tmp_path, {"a": "a, b, c\nd, e, f\n{x|y}", "b": "\n".join(f"{n}, x" for n in range(12))})
    found = read(tmp_path, captions="all", shuffle_tags=True, wildcards=True)
    variants = found["a"].variants
    assert variants is not None
    assert variants.written == 3
    assert Counter("abcdefxy".index(min({*text} - {*", "})) // 3 for text in variants.texts) == {0: 3, 1: 3, 2: 3}
    assert found["b"].variants is not None
    assert len(found["b"].variants.texts) == 12


def test_the_variants_follow_from_the_seed_and_the_image_alone(tmp_path: Path) -> None:
    captions = {"a": "a, b, c, d, e", "b": "a, b, c, d, e"}
    given: dict[str, Any] = {"shuffle_tags": True, "tag_dropout": 0.2}
    first = read(captioned(tmp_path / "one", captions), **given)
    again = read(captioned(tmp_path / "two", {"0": "x, y", **captions}), **given)
    assert first["a"].variants == again["a"].variants
    assert first["b"].variants == again["b"].variants
    assert first["a"].variants != first["b"].variants
    assert first["a"].variants != read(tmp_path / "one", seed=1, **given)["a"].variants
    # Recorded: another result would change runs that are resumed.
    assert first["a"].variants is not None
    assert first["a"].variants.texts[:2] == ("e, d, c, a", "a, b, e, c")


def test_the_trigger_word_and_placeholder_tokens_stay_in_front(tmp_path: Path) -> None:
    captioned(tmp_path, {"a": "cat, red, big", "b": "red, a sks cat, big", "c": "red, <zorp>, big"})
    given: dict[str, Any] = {"shuffle_tags": True, "tag_dropout": 0.9, "caption_variants": 40}
    found = read(tmp_path, tokens=["<zorp>"], trigger_word="sks", **given)
    assert {text.split(", ")[0] for text in found["a"].texts} == {"sks"}
    assert {text.split(", ")[0] for text in found["b"].texts} == {"a sks cat"}
    assert {tuple(text.split(", ")[:2]) for text in found["c"].texts} == {("sks", "<zorp>")}
    template = read(tmp_path, trigger_word="sks", caption_template="art of {trigger}: {caption}", **given)
    assert all(text.startswith("art of sks: ") for text in template["a"].texts)
    assert {"art of sks: ", "art of sks: cat"} <= {*template["a"].texts}


def test_the_data_sheet_lists_the_variants(tmp_path: Path) -> None:
    captioned(tmp_path, {"a": "{x|y} z", "b": "one\ntwo", "c": "{q|", "d": "v " * 90 + "{a|b}"})
    config = DataConfig(data=tmp_path, captions="all", wildcards=True, caption_variants=4)
    sheet = DataSheet(tmp_path, [])
    for _ in sheet.watched(load_samples(read_examples(config, []), 16)):
        pass
    sheet.hint(config, 16)
    assert sheet.variants_line() == "3 images with 2 distinct variants of 1 to 2 captions, 6 texts together"
    assert sheet.hints == [
        "The caption of c.png has braces that do not pair up, so the wildcards in them are read as text. Write {{ and "
        "}} for braces that are text; wildcards are not nested."
    ]
    files = sheet.as_json()["files"]
    assert [sorted(each["variants"])[:2] for each in files[:3]] == [["x z", "y z"], ["one", "two"], ["{q|"]]
    assert [each["written"] for each in files] == [1, 2, 1, 1]

    class Words:
        model_max_length = 77

        def __call__(self, text: str, verbose: bool) -> Any:
            return type("Ids", (), {"input_ids": text.split()})

    sheet.count_tokens([Words()])
    assert {text[-1]: tokens for text, tokens in sheet.beyond_limit.items()} == {"a": 91, "b": 91}


def test_captions_that_need_a_setting_give_a_hint(tmp_path: Path) -> None:
    captioned(tmp_path, {"a": "one\ntwo", "b": "x", "c": "{x|y}", "d": "{x} {}", "e": "a\n\nb"})
    config = DataConfig(data=tmp_path)
    sheet = DataSheet(tmp_path, [])
    for _ in sheet.watched(load_samples(read_examples(config, []), 16)):
        pass
    sheet.hint(config, 16)
    assert sheet.hints == [
        "2 captions, that of a.png first, have several lines, which are read as one caption. Set --captions all to "
        "use each line as a caption.",
        "The caption of c.png has wildcards, which are read as text. Set --wildcards to replace them.",
    ]
    assert sheet.variants_line() is None
    assert "variants" not in sheet.as_json()["files"][0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep_tags": 1}, "keep_tags is given, but tags are neither shuffled nor dropped; set shuffle_tags"),
        ({"keep_tags_separator": "|||", "wildcards": True}, "keep_tags_separator is given, but tags are neither"),
        (
            {"caption_variants": 4, "captions": "all"},
            "caption_variants is for shuffle_tags, tag_dropout and wildcards",
        ),
        ({"tag_dropout": 1}, "tag_dropout: 1 is not valid; use a number from 0 and below 1"),
        ({"tag_dropout": -0.1}, "tag_dropout: -0.1 is not valid"),
        ({"shuffle_tags": True, "keep_tags": -1}, "keep_tags: -1 is not valid; use a whole number"),
        ({"captions": "lines"}, "captions: lines is not valid; use one or all"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        settings(**given)
