import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from restune_diffusion import RestuneError, Schedule, TunerWeight, schedule
from restune_diffusion.hooks.mixing import ForwardContext, Layout, mask_at, row_factors
from restune_diffusion.hooks.weight_buffers import WeightBuffers
from restune_diffusion.hooks.weights import as_weight


def one_pass(rows=1, timestep=499, size=(8, 8), layout=None):
    return ForwardContext(
        rows=rows,
        size=size,
        device=torch.device("cpu"),
        timestep=timestep,
        num_train_timesteps=1000,
        layout=layout,
    )


@pytest.mark.parametrize(
    ("text", "factors"),
    [
        ("0.0-0.3: 0, 0.3-1.0: 1", {0: 0, 0.29: 0, 0.3: 1, 1: 1}),
        ("0.5-1:2", {0.49: 0, 0.5: 2, 1: 2}),
        ("0-0.4: 0>1, 0.4-1: -0.5", {0: 0, 0.1: 0.25, 0.3: 0.75, 0.4: -0.5, 1: -0.5}),
        ("0-1: 1>0", {0: 1, 0.75: 0.25, 1: 0}),
    ],
)
def test_a_schedule_is_what_its_text_says(text, factors):
    assert {progress: pytest.approx(schedule(text).at(progress)) for progress in factors} == factors


@pytest.mark.parametrize("text", ["", "1", "0.5-0.2: 1", "0-2: 1", "0-1: x", "0.1.2-1: 1", "0-0.5: 1 0.5-1: 0"])
def test_another_text_is_no_schedule(text):
    with pytest.raises(RestuneError, match="schedule"):
        schedule(text)


def test_the_last_matching_pattern_counts_and_others_keep_one():
    weight = TunerWeight(sites={"skip.*": 0.5, "skip.2-3": 0.0, "skip.3": 2})
    assert weight.site_factors(["skip.0", "skip.2", "skip.3", "out"]) == {
        "skip.0": 0.5,
        "skip.2": 0.0,
        "skip.3": 2.0,
        "out": 1.0,
    }
    with pytest.raises(RestuneError, match=r"`skip.7-8`; its sites are skip.0, skip.1\."):
        TunerWeight(sites={"skip.7-8": 1}).site_factors(["skip.0", "skip.1"])


def test_every_form_of_weight():
    steps = schedule("0-1: 1")
    assert as_weight(2) == TunerWeight(2.0)
    assert as_weight([1, 0]) == TunerWeight((1.0, 0.0))
    assert as_weight({"skip.0": 0.5}) == TunerWeight(sites={"skip.0": 0.5})
    assert as_weight(steps) == TunerWeight(steps=steps)
    assert TunerWeight(0.3).plain() == 0.3
    assert TunerWeight(0.3, steps=steps).plain() == TunerWeight(0.3, steps=steps)
    assert TunerWeight(1.0, mask=torch.ones(2, 2)).plain() != 1.0


@pytest.mark.parametrize("weight", [math.nan, math.inf, [], [1.0, math.nan], {"skip.0": math.inf}, "0-1: 1"])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(RestuneError, match="weight"):
        as_weight(weight)


@pytest.mark.parametrize("mask", [torch.ones(2), torch.ones(2, 2, dtype=torch.uint8), torch.full((2, 2), 1.5)])
def test_a_mask_that_is_none_is_refused(mask):
    with pytest.raises(RestuneError, match="mask"):
        TunerWeight(mask=mask)


GUIDED, PLAIN = Layout(2, True, 2), Layout(2, False, 2)


@pytest.mark.parametrize(
    ("weight", "this", "expected"),
    [
        (TunerWeight(0.5), one_pass(4), (0.5,)),
        (TunerWeight((1, 0)), one_pass(4), (1, 0, 1, 0)),
        (TunerWeight((1, 1)), one_pass(4), (1,)),
        (TunerWeight((2, 3), on="cond"), one_pass(4, layout=GUIDED), (0, 0, 2, 3)),
        (TunerWeight((2, 3), on="uncond"), one_pass(4, layout=GUIDED), (2, 3, 0, 0)),
        # perturbed-attention guidance has three copies, or two without an unconditional one
        (TunerWeight((2, 3), on="cond"), one_pass(6, layout=GUIDED), (0, 0, 2, 3, 2, 3)),
        (TunerWeight((2, 3), on="cond"), one_pass(4, layout=PLAIN), (2, 3, 2, 3)),
        (TunerWeight((2, 3), on="uncond"), one_pass(2, layout=PLAIN), (0,)),
        (TunerWeight(2, on="cond"), one_pass(2, layout=Layout(1, True)), (0, 2)),
        (TunerWeight(2, steps=schedule("0.5-1: 0.25")), one_pass(3, timestep=499), (0.5,)),
        (TunerWeight(2, steps=schedule("0.5-1: 0.25")), one_pass(3, timestep=500), (0,)),
        (TunerWeight((2, 4), steps=schedule("0-1: 0.5")), one_pass(2, timestep=torch.tensor(3)), (1, 2)),
        (TunerWeight(2, steps=schedule("0.5-1: 1")), one_pass(2, timestep=torch.tensor([10, 900])), (2, 0)),
    ],
)
def test_the_factor_of_every_row_in_both_ways_of_computing_it(weight, this, expected):
    assert row_factors(weight, this) == expected
    dial = WeightBuffers(["skip.0", "skip.1"], torch.device("cpu"))
    dial.set(weight, {"skip.0": 1.0, "skip.1": 3.0})
    rows = expected if len(expected) > 1 else expected * this.rows
    assert dial.factors("skip.0", weight, this).tolist() == list(rows)
    assert dial.factors("skip.1", weight, this).tolist() == [3 * row for row in rows]


def test_a_dial_follows_any_schedule_in_place():
    dial, generator = WeightBuffers(["out"], torch.device("cpu")), torch.Generator().manual_seed(0)
    before = dict(vars(dial))
    progress = torch.rand(200, generator=generator)
    for text in ("0-1: 1>0", "0.1-0.2: 3, 0.2-0.5: 1>-1", "0-0.5: 0, 0.5-1: 1"):
        weight = as_weight(schedule(text))
        dial.set(weight, {"out": 1.0})
        this = one_pass(200, timestep=(1 - progress) * 1000 - 1)
        expected = [weight.steps.at(step) for step in this.progress.tolist()]
        torch.testing.assert_close(dial.factors("out", weight, this), torch.tensor(expected))
    assert all(vars(dial)[key] is value for key, value in before.items())


PIECES = st.lists(
    st.tuples(
        st.lists(st.integers(0, 10), min_size=2, max_size=2, unique=True).map(sorted),
        st.integers(-3, 3),
        st.integers(-3, 3),
    ).map(lambda piece: (piece[0][0] / 10, piece[0][1] / 10, float(piece[1]), float(piece[2]))),
    max_size=4,
)


@given(PIECES, st.lists(st.integers(0, 999), min_size=2, max_size=2), st.sampled_from(["both", "cond", "uncond"]))
@example([(0.0, 0.6, 1.0, 1.0), (0.4, 1.0, 2.0, 2.0)], [499, 500], "both")
def test_both_ways_of_computing_a_factor_agree_on_any_schedule(pieces, timesteps, on):
    weight = TunerWeight((0.5, -2.0), steps=Schedule(tuple(pieces)), on=on)
    this = one_pass(4, timestep=torch.tensor(timesteps * 2), layout=GUIDED)
    dial = WeightBuffers(["out"], torch.device("cpu"))
    dial.set(weight, {"out": 1.0})
    found = row_factors(weight, this)
    eager = torch.tensor(found if len(found) > 1 else found * 4)
    torch.testing.assert_close(dial.factors("out", weight, this), eager, rtol=1e-5, atol=1e-5)


def test_of_pieces_that_overlap_the_first_decides():
    steps = Schedule(((0.4, 0.6, 1.0, 3.0), (0.0, 1.0, 5.0, 5.0), (0.5, 1.0, 7.0, 7.0)))
    assert [steps.at(progress) for progress in (0.2, 0.5, 0.8, 1.0)] == [5.0, pytest.approx(2.0), 5.0, 5.0]
    assert [(begin, end, first) for begin, end, _, _, first, _ in steps.disjoint()] == [
        (0.4, 0.6, 1.0),
        (0.0, 0.4, 5.0),
        (0.6, 1.0, 5.0),
    ]


def test_a_weight_for_other_images_is_refused():
    with pytest.raises(RestuneError, match="for 3 images, but the batch has 4 rows"):
        row_factors(TunerWeight((1, 2, 3)), one_pass(4))
    with pytest.raises(RestuneError, match="for 4 images"):
        row_factors(TunerWeight((1, 2, 3, 4)), one_pass(4, layout=GUIDED))
    with pytest.raises(RestuneError, match=r"TunerManager\.layout"):
        row_factors(TunerWeight(1, on="cond"), one_pass(4))


def test_a_mask_meets_maps_and_tokens_at_their_resolution():
    mask = torch.zeros(16, 16)
    mask[:, 8:] = 1
    weight, this = TunerWeight(mask=mask), one_pass(2)
    at_map = mask_at(weight, mask, 2, torch.zeros(2, 4, 4, 4), this)
    assert at_map.shape == (1, 1, 4, 4)
    assert at_map[0, 0].tolist() == [[0, 0, 1, 1]] * 4
    at_tokens = mask_at(weight, mask, 2, torch.zeros(2, 16, 4), this)
    assert at_tokens.shape == (1, 16, 1)
    assert at_tokens.flatten().tolist() == [0, 0, 1, 1] * 4
    with pytest.raises(RestuneError, match=r"feature with a \d+x\d+ grid of tokens"):
        mask_at(weight, mask, 2, torch.zeros(2, 7, 4), this)


def test_masks_by_image_are_repeated_for_each_copy():
    masks = torch.stack([torch.zeros(2, 2), torch.ones(2, 2)])
    this = one_pass(4, layout=GUIDED)
    found = mask_at(TunerWeight(mask=masks), masks, 1, torch.zeros(4, 1, 8, 8), this)
    assert found.mean((1, 2, 3)).tolist() == [0, 1, 0, 1]


def test_a_schedule_checks_its_pieces():
    with pytest.raises(RestuneError, match="0 <= start < end <= 1"):
        Schedule(((0.5, 0.5, 1.0, 1.0),))
