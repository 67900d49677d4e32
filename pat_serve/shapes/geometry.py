"""Legal and fast widths of the hidden dimension.

Pure arithmetic: which hidden_size a config class accepts, which ones kernels like, and the nearest of them to what the
user asked for. `fitness.py` judges an exported shape as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from pat_serve.errors import IllegalWidth

MAX_RATIO = 0.6

# Matrix tiles want multiples of 64 or more (AMX: 32 bf16 columns, tensor cores: 64). Narrow models have few widths.
_GRANULES = (256, 128, 64, 32, 16, 8)


def fast_tile(hidden_size: int, num_attention_heads: int, *, hidden_multiple_of_heads: bool) -> int | None:
    """The largest tile whose legal multiples still resolve 1/16 of the base's width; None where no tile does.

    256 for 4096 and wider, 128 for 2048, 64 for 1024, 16 for 256. An odd head count multiplies the tile (40 heads and
    256 make 1280), and so wants a smaller one.
    """
    heads = num_attention_heads if hidden_multiple_of_heads else 1
    return next((tile for tile in _GRANULES if 16 * math.lcm(tile, heads) <= hidden_size), None)


def width_step(hidden_size: int, num_attention_heads: int, *, hidden_multiple_of_heads: bool) -> int:
    """Smallest distance between two widths that are legal and fast, and still at most 1/16 of the base's width.

    Where no tile is fine enough, every legal width counts as fast.
    """
    tile = fast_tile(hidden_size, num_attention_heads, hidden_multiple_of_heads=hidden_multiple_of_heads)
    return math.lcm(tile or 1, legal_step(num_attention_heads, hidden_multiple_of_heads=hidden_multiple_of_heads))


def legal_step(num_attention_heads: int, *, hidden_multiple_of_heads: bool) -> int:
    """Smallest distance between two widths that load at all: 8 (vectorised kernels), and the head count if asked.

    8: vLLM's CPU kernels for RMSNorm and SiLU refuse a width that is no multiple of their vectors' 8 elements.
    """
    return math.lcm(8, num_attention_heads) if hidden_multiple_of_heads else 8


def check_width(
    width: int,
    hidden_size: int,
    num_attention_heads: int,
    *,
    hidden_multiple_of_heads: bool,
    parameters: Callable[[int], int] | None = None,
) -> int:
    """Check a width that the user named.

    Args:
        width: K.
        hidden_size: the base's width D.
        num_attention_heads: the base's query heads.
        hidden_multiple_of_heads: the config class wants hidden_size % num_attention_heads == 0.
        parameters: number of parameters of a model of a width, for the message.

    Raises:
        IllegalWidth: not below the base's width, more than 60 % cut, or refused by the config class or the kernels; the
            message names the nearest legal widths.
    """
    step = legal_step(num_attention_heads, hidden_multiple_of_heads=hidden_multiple_of_heads)
    lowest = _lowest(hidden_size)
    if width % step == 0 and lowest <= width < hidden_size:
        return width
    near = nearest_widths(width, step, hidden_size)
    reason = f"a multiple of {step}" + (
        f" (8 and the {num_attention_heads} heads)" if hidden_multiple_of_heads and num_attention_heads > 1 else ""
    )
    raise IllegalWidth(
        "--hidden-size",
        expected=f"{reason} between {lowest} and {hidden_size - 1}",
        found=str(width),
        fix=f"Nearest legal widths: {name_widths(near, parameters)}."
        if near
        else "Choose a wider base: this one has no narrower width that loads.",
    )


def legal_widths(step: int, hidden_size: int) -> list[int]:
    """The multiples of `step` below the base's width that a cut of at most 60 % leaves, ascending."""
    return [k for k in range(step, hidden_size, step) if k >= _lowest(hidden_size)]


def nearest_widths(width: int, step: int, hidden_size: int, count: int = 3) -> list[int]:
    """The multiples of `step` nearest to a width that a cut of at most 60 % leaves, ascending."""
    legal = legal_widths(step, hidden_size)
    return sorted(sorted(legal, key=lambda k: abs(k - width))[:count])


def widths_around(width: int, step: int, hidden_size: int) -> list[int]:
    """The next multiples of `step` below and above a width, as far as a cut of at most 60 % leaves them."""
    legal = legal_widths(step, hidden_size)
    below, above = [k for k in legal if k < width], [k for k in legal if k > width]
    return below[-1:] + above[:1]


def name_widths(widths: list[int], parameters: Callable[[int], int] | None = None) -> str:
    """ "2848 (4.69 B parameters), 2880 (4.74 B parameters)", or the widths alone."""
    return ", ".join(f"{k} ({count_parameters(parameters(k))} parameters)" if parameters else str(k) for k in widths)


def count_parameters(parameters: int) -> str:
    """ "4.74 B" or "134.52 M"."""
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M"


def _lowest(hidden_size: int) -> int:
    """The narrowest width that a cut of 60 % leaves."""
    return math.ceil((1 - MAX_RATIO) * hidden_size - 1e-9)
