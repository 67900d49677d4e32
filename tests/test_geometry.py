from __future__ import annotations

import pytest

from pat_serve.errors import IllegalRatio, IllegalWidth
from pat_serve.geometry import check_width, granule, snap_ratio


@pytest.mark.parametrize(("hidden", "expected"), [(8192, 256), (4096, 256), (2048, 128), (1024, 64), (256, 16)])
def test_granule(hidden: int, expected: int):
    assert granule(hidden) == expected


@pytest.mark.parametrize(
    ("ratio", "hidden", "heads", "width", "snapped"),
    [
        (0.25, 4096, 32, 3072, False),
        (0.3, 4096, 32, 2816, True),  # 2867.2; the authors' 2868 is no multiple of 32
        (0.25, 256, 8, 192, False),
        (0.25, 64, 4, 48, False),
        (0.6, 4096, 32, 1792, True),  # 1638.4; 1536 would cut more than 60 %
        (0.25, 5120, 40, 3840, False),
        (0.1, 5120, 40, 4480, True),  # lcm(64, 40) = 320; lcm(256, 40) = 1280 would leave four widths
        (0.25, 6656, 52, 4992, False),
        (0.25, 576, 9, 432, False),
        (0.25, 960, 15, 720, False),
        (0.6, 64, 4, 32, True),
    ],
)
def test_snap_ratio(ratio: float, hidden: int, heads: int, width: int, snapped: bool):
    assert snap_ratio(ratio, hidden, heads, hidden_multiple_of_heads=True) == (width, snapped)


def test_ties_go_to_the_wider():
    # 0.125 of 256 leaves 224, a legal multiple of 16; 0.15625 leaves 216, between 208 and 224.
    assert snap_ratio(0.15625, 256, 8, hidden_multiple_of_heads=True) == (224, True)


@pytest.mark.parametrize("ratio", [0.0, -0.1, 0.61, 1.0, float("nan")])
def test_ratio_out_of_range(ratio: float):
    with pytest.raises(IllegalRatio, match=r"\(0, 0\.6\]"):
        snap_ratio(ratio, 4096, 32, hidden_multiple_of_heads=True)


def test_legal_widths_pass():
    assert check_width(3072, 4096, 32, hidden_multiple_of_heads=True) == 3072
    assert check_width(2864, 4096, 32, hidden_multiple_of_heads=False) == 2864


def test_an_illegal_width_names_the_nearest():
    with pytest.raises(IllegalWidth, match="2848, 2880, 2912"):
        check_width(2868, 4096, 32, hidden_multiple_of_heads=True)


@pytest.mark.parametrize("width", [4096, 5000, 1632, 0, -64])
def test_widths_outside_the_range(width: int):
    with pytest.raises(IllegalWidth, match="between 1639 and 4095"):
        check_width(width, 4096, 32, hidden_multiple_of_heads=True)
