"""Counts that cut a share of all parameters or reach a speed, and the ceilings that are known of some shapes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from itertools import combinations

import pytest

from pat_serve.cut.axes import AXES
from pat_serve.errors import IllegalRatio, IllegalShape
from pat_serve.families.architectures import FAMILIES, LLAMA, QWEN2
from pat_serve.families.family import Family
from pat_serve.shapes.candidates import (
    TOLERANCE,
    axis_grid,
    counts_for_ratio,
    counts_for_speedup,
    exported_sizes,
    share_cut,
)
from pat_serve.shapes.roofline import decode_ceiling
from pat_serve.shapes.shape import check_shape, nearest_legal
from pat_serve.shapes.sizes import ModelSizes

LLAMA_7B = ModelSizes.of(
    json.loads((files("pat_serve.server.bench") / "shapes" / "llama2-7b.json").read_text(encoding="utf-8")), LLAMA
)
SMOLLM2 = ModelSizes(hidden=576, layers=30, heads=9, kv_heads=3, head_dim=64, ffn=1536, vocab=49152, tied=True)
QWEN_HALF = ModelSizes(hidden=896, layers=24, heads=14, kv_heads=2, head_dim=64, ffn=4864, vocab=151936, tied=True)
REGIMES = ((1, 128), (8, 1024), (32, 2048))


def ceiling(base: ModelSizes, cut: ModelSizes, batch_size: int, context: int) -> float:
    return decode_ceiling(base, cut, batch_size=batch_size, context_tokens=context, dtype_bytes=2)


@pytest.mark.parametrize(
    ("base", "counts", "unties", "share", "ceilings"),
    [
        (LLAMA_7B, {"hidden": 3072}, False, 0.25, (1.331, 1.233, 1.075)),
        (LLAMA_7B, {"layers": 28, "hidden": 3840, "ffn": 9472}, False, 0.249, (1.336, 1.284, 1.191)),
        (LLAMA_7B, {"kv_groups": 24, "ffn": 8192}, False, 0.244, (1.331, 1.332, 1.333)),
        (LLAMA_7B, {"layers": 24}, False, 0.240, (1.325, 1.327, 1.331)),
        (SMOLLM2, {"hidden": 432}, False, 0.25, (1.329, 1.172, 1.039)),
        (SMOLLM2, {"hidden": 432}, True, 0.092, (1.329, 1.172, 1.039)),
        (SMOLLM2, {"layers": 24, "ffn": 1280}, False, 0.237, (1.310, 1.285, 1.259)),
    ],
)
def test_known_shares_and_ceilings(
    base: ModelSizes, counts: Mapping[str, int], unties: bool, share: float, ceilings: tuple[float, ...]
) -> None:
    cut = exported_sizes(base, counts, unties=unties)
    assert share_cut(base, cut) == pytest.approx(share, abs=5e-4)
    assert [ceiling(base, cut, *regime) for regime in REGIMES] == pytest.approx(ceilings, abs=6e-4)


@pytest.mark.parametrize("base", [LLAMA_7B, SMOLLM2])
@pytest.mark.parametrize("ratio", [0.25, 0.4])
def test_a_mix_meets_the_share_of_all_parameters(base: ModelSizes, ratio: float) -> None:
    for axes in (("layers", "ffn"), ("layers", "ffn", "hidden"), ("layers", "ffn", "kv_groups"), tuple(AXES)):
        counts = counts_for_ratio(base, LLAMA, ratio, axes)
        assert counts is not None
        assert set(counts) == set(axes)
        cut = exported_sizes(base, counts)
        assert not LLAMA.obstacles(base, cut)
        assert share_cut(base, cut) == pytest.approx(ratio, abs=TOLERANCE), (axes, counts)


def test_a_mix_is_even_and_made_of_fast_counts() -> None:
    assert counts_for_ratio(SMOLLM2, LLAMA, 0.25, ("hidden", "layers", "ffn")) == {
        "hidden": 504, "layers": 27, "ffn": 1344,
    }  # fmt: skip
    assert counts_for_ratio(SMOLLM2, LLAMA, 0.25, ("kv_groups", "layers", "ffn")) == {
        "layers": 26, "ffn": 1280, "kv_groups": 2,
    }  # fmt: skip
    assert counts_for_ratio(LLAMA_7B, LLAMA, 0.25, ("hidden",)) == {"hidden": 3072}
    untied = counts_for_ratio(SMOLLM2, LLAMA, 0.25, ("hidden",), unties=True)
    assert untied == {"hidden": 360}, "a head of its own takes the place of channels"


def test_counts_that_are_not_fast_are_taken_where_no_fast_ones_meet_the_share() -> None:
    """A step of SmolLM2's fast widths is an eighth, and its own class takes no smaller ones."""
    for ratio in (0.05, 0.2, 0.3, 0.55):
        counts = counts_for_ratio(SMOLLM2, LLAMA, ratio, ("hidden",))
        assert counts is not None
        assert counts["hidden"] % 8 == 0
        assert share_cut(SMOLLM2, exported_sizes(SMOLLM2, counts)) == pytest.approx(ratio, abs=TOLERANCE)
    assert counts_for_ratio(LLAMA_7B, LLAMA, 0.3, ("hidden",)) == {"hidden": 2880}, "a multiple of its heads"
    counts = counts_for_ratio(SMOLLM2, LLAMA, 0.25, ("ffn", "kv_groups"))
    assert counts is not None
    assert counts["ffn"] % 16 == 0


def test_a_share_out_of_reach_gives_the_nearest() -> None:
    counts = counts_for_ratio(SMOLLM2, LLAMA, 0.25, ("kv_groups",))
    assert counts == {"kv_groups": 2}, "of three groups one goes: a cut of an axis is 60 % at most"
    assert share_cut(SMOLLM2, exported_sizes(SMOLLM2, counts)) == pytest.approx(0.066, abs=5e-4)
    thin = ModelSizes(hidden=64, layers=2, heads=4, kv_heads=1, head_dim=16, ffn=8, vocab=32, tied=True)
    assert counts_for_ratio(thin, LLAMA, 0.25, ("kv_groups",)) is None
    for ratio in (0.0, 0.61, -0.1, float("nan")):
        with pytest.raises(IllegalRatio, match="share of all parameters"):
            counts_for_ratio(SMOLLM2, LLAMA, ratio, ("layers",))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_only_shapes_that_a_class_takes_are_found(family: Family) -> None:
    for base, size in ((base, size) for base in (SMOLLM2, QWEN_HALF) for size in (1, 2, 3, 4)):
        for axes in combinations(AXES, size):
            counts = counts_for_ratio(base, family, 0.2, axes)
            assert counts is None or not family.obstacles(base, exported_sizes(base, counts)), (axes, counts)


def test_further_wishes_are_met() -> None:
    counts = counts_for_ratio(LLAMA_7B, LLAMA, 0.25, ("kv_groups", "ffn"), takes=lambda sizes: sizes.heads % 16 == 0)
    assert counts is not None
    assert counts["kv_groups"] == 16
    assert counts_for_ratio(LLAMA_7B, LLAMA, 0.25, ("layers",), takes=lambda _: False) is None


@pytest.mark.parametrize("axes", [("hidden",), ("layers", "ffn"), ("kv_groups", "ffn"), ("hidden", "layers", "ffn")])
def test_the_smallest_cut_that_is_fast_enough(axes: tuple[str, ...]) -> None:
    def speedup(sizes: ModelSizes) -> float:
        return ceiling(SMOLLM2, sizes, 1, 128)

    counts = counts_for_speedup(SMOLLM2, LLAMA, 1.2, axes, speedup)
    assert counts is not None
    kept = exported_sizes(SMOLLM2, counts).parameters
    assert speedup(exported_sizes(SMOLLM2, counts)) >= 1.2
    # By brute force: no larger model of the grid is fast enough.
    grids = [axis_grid(axis, SMOLLM2, LLAMA) for axis in axes]
    shapes: list[dict[str, int]] = [{}]
    for axis, grid in zip(axes, grids, strict=True):
        shapes = [{**shape, axis: count} for shape in shapes for count in grid]
    sizes = [exported_sizes(SMOLLM2, shape) for shape in shapes]
    assert kept == max(one.parameters for one in sizes if speedup(one) >= 1.2)


def test_finer_counts_reach_a_speed_where_no_fast_one_will_do() -> None:
    """1232 channels are no multiple of 64, and no count that is one is a multiple of 176 near that speed."""

    def speedup(sizes: ModelSizes) -> float:
        return ceiling(SMOLLM2, sizes, 1, 128)

    counts = counts_for_speedup(SMOLLM2, LLAMA, 1.13, ("ffn",), speedup, takes=lambda sizes: sizes.ffn % 176 == 0)
    assert counts == {"ffn": 1232}


def test_a_speed_out_of_reach_has_no_counts() -> None:
    assert counts_for_speedup(SMOLLM2, LLAMA, 3.0, ("ffn",), lambda sizes: ceiling(SMOLLM2, sizes, 1, 128)) is None


def test_the_nearest_legal_shapes_are_legal_and_adjacent() -> None:
    shapes = nearest_legal({"kv_groups": 1, "hidden": 800}, QWEN_HALF, QWEN2)
    assert shapes == [
        {"kv_groups": 1, "hidden": 784},
        {"kv_groups": 1, "hidden": 840},
    ]
    assert nearest_legal({"hidden": 500}, SMOLLM2, QWEN2)[:2] == [{"hidden": 432}, {"hidden": 504}]
    assert nearest_legal({"ffn": 1281}, SMOLLM2, LLAMA) == [{"ffn": 1280}, {"ffn": 1288}]
    both = nearest_legal({"ffn": 1534, "hidden": 501}, SMOLLM2, LLAMA)
    assert both == [
        {"ffn": 1528, "hidden": 496}, {"ffn": 1528, "hidden": 504}, {"ffn": 1536, "hidden": 496},
        {"ffn": 1536, "hidden": 504},
    ]  # fmt: skip


@pytest.mark.parametrize("counts", [{"hidden": 500}, {"ffn": 1281}, {"layers": 24, "ffn": 1284}])
def test_sizes_that_kernels_refuse_are_refused_with_the_nearest(counts: dict[str, int]) -> None:
    with pytest.raises(IllegalShape, match=r"as a multiple of 8, not .* Nearest legal shapes: .*parameters"):
        check_shape(counts, SMOLLM2, LLAMA)
