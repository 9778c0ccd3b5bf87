"""Mutations of a header's content: metadata, tensor entries, JSON, patterns and names."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

from .malformed import Seed, assemble, mutation, tensor_names

CONTROL = "\x1b[2J\x1b]0;owned\x07\x9b31m\x7f\x00\r\n\u202e\u2028"


def trick(rng: random.Random) -> str:
    """Draw a text that would do harm as a path, on a terminal, or in a format string."""
    return rng.choice(
        ("../../../evil", "/etc/passwd", "C:\\evil", "a\0b", "CON", "..", ".", "~/evil", "$(touch evil)", "%s%n",
         "{0.__class__}", CONTROL, "x" * 100_000, "\ud800", "é☃🦊", "", "file:///evil", "\\\\server\\share")
    )  # fmt: skip


@mutation(3, "same")
def put_tricks_into_free_metadata(rng: random.Random, seed: Seed) -> bytes:
    header, body = seed.split()
    for key in ("modelspec.title", "modelspec.date", "modelspec.license", "modelspec.thumbnail", trick(rng)):
        # Lone surrogates are no text, which the format demands.
        header["__metadata__"][key.replace("\ud800", "")] = trick(rng).replace("\ud800", "")
    return assemble(header, body)


@mutation(2, "same")
def put_tricks_into_the_training_facts(rng: random.Random, seed: Seed) -> bytes:
    header, body = seed.split()
    facts = json.loads(header["__metadata__"]["restune.training"])
    values = [
        trick(rng),
        [trick(rng)],
        {trick(rng): trick(rng)},
        None,
        True,
        1e308,
        -0.0,
        10**4000,
        [[]],
        float("nan"),
    ]
    for key in (*facts, "versions", "resolution", trick(rng)):
        facts[key] = rng.choice([*values, float("inf")])
    if isinstance(facts["config"], str):
        facts["config"] = {key: rng.choice(values) for key in ("prompt", "learning_rate", "base", "seed")}
    header["__metadata__"]["restune.training"] = json.dumps(facts)
    return assemble(header, body)


@mutation(1, "same")
def put_tricks_into_the_name_of_the_base(rng: random.Random, seed: Seed) -> bytes:
    header, body = seed.split()
    base = json.loads(header["__metadata__"]["restune.base"])
    base["name"] = trick(rng).replace("\ud800", "")
    header["__metadata__"]["restune.base"] = json.dumps(base)
    return assemble(header, body)


# The header's entries for tensors


WEIRD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1.5,
    2**31,
    2**63,
    2**64,
    "1",
    [],
    {},
    [[]],
    1e300,
    "\x1b[31m",
    float("nan"),
)


TYPES = ("BOOL", "U8", "I8", "I16", "I32", "I64", "U64", "F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2", "F8_E8M0",
         "F4", "C64", "f32", "X")  # fmt: skip


@mutation(4)
def change_a_tensor_entry(rng: random.Random, seed: Seed) -> bytes:
    header, body = seed.split()
    entry = header[rng.choice(tensor_names(header))]
    key = rng.choice(("dtype", "shape", "data_offsets"))
    if key == "dtype":
        entry[key] = rng.choice([*TYPES, *WEIRD])
    elif rng.random() < 0.3:
        entry[key] = rng.choice([*WEIRD, [rng.choice(WEIRD)], [1] * 10_000, [2**32, 2**32], [2**63, 0], [0] * 5])
    elif entry[key]:
        place = rng.randrange(len(entry[key]))
        entry[key][place] = rng.choice([*WEIRD, entry[key][place] + rng.choice((-8, -1, 1, 2, 8, 2**40))])
    return assemble(header, body)


@mutation(2)
def change_the_dtype_of_all(rng: random.Random, seed: Seed) -> bytes:
    header, body = seed.split()
    dtype = rng.choice(("BOOL", "U8", "I16", "I32", "F16", "BF16", "F32", "F64", "F8_E4M3"))
    names = tensor_names(header)
    for name in names if rng.random() < 0.5 else names[::2]:
        header[name]["dtype"] = dtype
    return assemble(header, body)


@mutation(3)
def exchange_entries(rng: random.Random, seed: Seed) -> bytes:
    # Tensors of one size may change places unnoticed; all others must not.
    header, body = seed.split()
    one, two = rng.sample(tensor_names(header), 2)
    key = rng.choice(("shape", "data_offsets", "dtype"))
    header[one][key], header[two][key] = header[two][key], header[one][key]
    return assemble(header, body)


@mutation(2, "refused")
def overlap_or_leave_a_gap(rng: random.Random, seed: Seed) -> bytes:
    header, body = seed.split()
    one, two = rng.sample(tensor_names(header), 2)
    gap = rng.choice((2, 4, 8, 4096))
    match rng.randrange(3):
        case 0:
            header[one]["data_offsets"] = header[two]["data_offsets"]
        case 1:
            header[one]["data_offsets"] = [offset + gap for offset in header[one]["data_offsets"]]
        case 2:
            header[one]["data_offsets"] = header[one]["data_offsets"][::-1]
    return assemble(header, body + b"\0" * rng.choice((0, gap)))


@mutation(2, "refused")
def rename_drop_or_add_tensors(rng: random.Random, seed: Seed) -> bytes:
    header, body = seed.split()
    name = rng.choice(tensor_names(header))
    empty = {"dtype": rng.choice(("F32", "F16", "BOOL")), "shape": [0], "data_offsets": [0, 0]}
    match rng.randrange(4):
        case 0:
            header[rng.choice((trick(rng).replace("\ud800", "?"), name.upper(), name + ".", "__proto__"))] = empty
        case 1:
            header[trick(rng).replace("\ud800", "?")] = header.pop(name)
        case 2:
            del header[name]
        case 3:
            header |= {f"skip.skip.{number}.down.weight": empty for number in range(100, 400)}
    return assemble(header, body)


@mutation(1, "refused")
def repeat_a_key(rng: random.Random, seed: Seed) -> bytes:
    header, body = seed.split()
    name = rng.choice(("__metadata__", *tensor_names(header)))
    other = {} if name == "__metadata__" else {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    return assemble(None, body, f"{json.dumps(header)[:-1]}, {json.dumps(name)}: {json.dumps(other)}}}")


@mutation(1, "refused")
def leave_no_values(rng: random.Random, seed: Seed) -> bytes:
    header, _ = seed.split()
    if rng.random() < 0.3:
        nothing = json.dumps([{"part": "skip", "sites": []}])
        return assemble({"__metadata__": {**header["__metadata__"], "restune.config": nothing}}, b"")
    tensors = {name: header[name] for name in tensor_names(header)}
    for entry in tensors.values():
        entry["shape"], entry["data_offsets"] = rng.choice(([0], [0, 2**63], [2**40, 0])), [0, 0]
    return assemble(header, b"")


# The header's description of the tuner


@mutation(3)
def replace_an_entry(rng: random.Random, seed: Seed) -> bytes:
    header, body = seed.split()
    key = rng.choice(("config", "base", "training", "format_version"))
    values = [
        "",
        " ",
        "null",
        "{}",
        "[]",
        "[[]]",
        "0",
        "1",
        "2",
        "-1",
        "٣",
        "1" * 5000,
        "NaN",
        '"x"',
        "[" * 5000,
        '{"a":' * 500,
    ]
    value = rng.choice([*values, *WEIRD, trick(rng).replace("\ud800", "?"), None])
    header["__metadata__"][f"restune.{key}"] = value
    if value is None:
        del header["__metadata__"][f"restune.{key}"]
    return assemble(header, body)


def change_json(rng: random.Random, value: Any) -> Any:
    """Change one place somewhere inside a JSON value."""
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        choice = rng.random()
        if choice < 0.1:
            del value[key]
        elif choice < 0.2 and isinstance(value, dict):
            value[rng.choice((trick(rng), "extra", "part"))] = copy.deepcopy(value[key])
        elif choice < 0.2:
            value.insert(0, copy.deepcopy(value[key]))
        else:
            value[key] = change_json(rng, value[key])
        return value
    near = [value + 1, value * 2, -value] if isinstance(value, int | float) and not isinstance(value, bool) else []
    return rng.choice([*WEIRD, trick(rng), 10**400, *near, *near])


@mutation(12)
def change_inside_an_entry(rng: random.Random, seed: Seed) -> bytes:
    header, body = seed.split()
    key = f"restune.{rng.choice(('config', 'config', 'base', 'base', 'training'))}"
    changed = change_json(rng, json.loads(header["__metadata__"][key]))
    header["__metadata__"][key] = json.dumps(changed)
    return assemble(header, body)


@mutation(3)
def change_patterns(rng: random.Random, seed: Seed) -> bytes:
    header, body = seed.split()
    (part, *rest) = json.loads(header["__metadata__"]["restune.config"])
    field = next((name for name in ("sites", "taps") if name in part), "sites")
    part.setdefault(field, ["*"])
    part[field] = rng.choice(
        (
            ["*"], ["**"], ["skip.?"], ["[!x]*"], ["[z-a]"], ["["], ["[]"], [""], [], ["skip.*"] * 3000, ["../*"],
            ["\0"], ["*a" * 5000], ["*" * 50_000], ["skip" + "*.*" * 40 + "z"], ["(a+)+$"],
            ["skip.0", "skip.0", "skip.[0]"], [f"skip.*{'?' * number}" for number in range(400)],
            ["[a-z]" * 8000], [CONTROL], [*part[field], "*"], part[field] * 2, list(reversed(part[field])),
        )
    )  # fmt: skip
    header["__metadata__"]["restune.config"] = json.dumps([part, *rest])
    return assemble(header, body)


@mutation(2)
def nest_deeply(rng: random.Random, seed: Seed) -> bytes:
    header, body = seed.split()
    depth = rng.choice((10, 40, 150, 300, 900, 3000))
    nested = rng.choice(("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth))
    if rng.random() < 0.5:
        header["__metadata__"]["restune.training"] = f'{{"config": {nested}}}'
    else:
        base = header["__metadata__"]["restune.base"]
        header["__metadata__"]["restune.base"] = base.replace('"structure":{', f'"structure":{{"deep":{nested},', 1)
    return assemble(header, body)


@mutation(2, "refused")
def ask_for_more_than_there_is(rng: random.Random, seed: Seed) -> bytes:
    header, body = seed.split()
    base = json.loads(header["__metadata__"]["restune.base"])
    parts = json.loads(header["__metadata__"]["restune.config"])
    for part in parts:
        part["ratio"] = 8
    for site in base["sites"].values():
        site["channels"] = rng.choice((2**12, 2**16, 2**16 + 1, 2**40))
    base["time_channels"] = 2**16
    header["__metadata__"]["restune.config"] = json.dumps(parts)
    header["__metadata__"]["restune.base"] = json.dumps(base)
    return assemble(header, body)


@mutation(2)
def give_sites_other_names(rng: random.Random, seed: Seed) -> bytes:
    header, body = seed.split()
    base = json.loads(header["__metadata__"]["restune.base"])
    names = (
        "skip.forward", "skip.0.down", "skip.", ".", "", "skip..0", "skip/../0", "skip.0.down.weight", "time", "gate",
        "skip.__class__", "skip.training", "skip._modules", "skip." + "a." * 500 + "a", "skip.é", "skip.0\n", CONTROL,
    )  # fmt: skip
    base["sites"][rng.choice(names)] = {"channels": 8, "stride": 1}
    header["__metadata__"]["restune.base"] = json.dumps(base)
    return assemble(header, body)


@mutation(2, "refused")
def put_nan_or_infinity_into_a_value(rng: random.Random, seed: Seed) -> bytes:
    header, body = seed.split()
    entry = header[rng.choice(tensor_names(header))]
    start, stop = entry["data_offsets"]
    number = rng.choice((float("nan"), float("inf"), -float("inf")))
    raw = {
        "F32": struct.pack("<f", number),
        "F16": struct.pack("<e", number),
        "BF16": struct.pack("<f", number)[2:],
    }[entry["dtype"]]
    place = start + len(raw) * rng.randrange((stop - start) // len(raw))
    return assemble(header, body[:place] + raw + body[place + len(raw) :])


# Big files: few, as each takes a while to write
