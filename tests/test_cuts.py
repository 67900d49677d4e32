"""Axes, sizes and cuts: what is kept lies where the tensors have it, and what no config can say is refused."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from pat_serve.cut.axes import AXES, FFN_DIM, GATE_UP_DIM, HIDDEN_DIM, KV_DIM, Q_DIM, QKV_DIM, VOCAB_DIM
from pat_serve.cut.cuts import AxisCut, Cuts
from pat_serve.errors import BrokenCheckpoint, BrokenPlan, IllegalShape
from pat_serve.families.architectures import FAMILIES, GEMMA, LLAMA, QWEN2
from pat_serve.shapes.shape import check_shape, parse_shape
from pat_serve.shapes.sizes import ModelSizes

BASE = ModelSizes(hidden=12, layers=3, heads=6, kv_heads=3, head_dim=4, ffn=10, vocab=20, tied=False)


def indices(*kept: int) -> torch.Tensor:
    return torch.tensor(kept, dtype=torch.int64)


def test_a_head_of_its_own_size_and_every_default_are_read():
    config = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 32,
    }  # fmt: skip
    gemma = ModelSizes.of({**config, "num_attention_heads": 16}, GEMMA)
    assert (gemma.kv_heads, gemma.head_dim, gemma.tied) == (16, 256, True)
    llama = ModelSizes.of(config, LLAMA)
    assert (llama.kv_heads, llama.head_dim, llama.tied) == (4, 16, False)
    assert ModelSizes.of({**config, "head_dim": None, "num_key_value_heads": 2}, None).heads_per_group == 2
    with pytest.raises(BrokenCheckpoint, match="intermediate_size as a positive integer, found 0"):
        ModelSizes.of({**config, "intermediate_size": 0}, LLAMA)


def test_counts_change_sizes_and_no_head():
    cut = BASE.with_counts({"hidden": 8, "layers": 2, "ffn": 5, "kv_groups": 2})
    assert cut == ModelSizes(hidden=8, layers=2, heads=4, kv_heads=2, head_dim=4, ffn=5, vocab=20, tied=False)
    for name, axis in AXES.items():
        assert axis.length(cut) == {"hidden": 8, "layers": 2, "ffn": 5, "kv_groups": 2}[name]


def test_positions_of_plain_and_fused_dimensions():
    cuts = Cuts.of(
        BASE,
        {
            "hidden": indices(0, 3),
            "layers": indices(0, 2),
            **{f"ffn.{i}": indices(1, 2 + i) for i in range(3)},
            **{f"kv_groups.{i}": indices(0, 2) if i else indices(1, 2) for i in range(3)},
        },
    )
    assert "ffn.1" not in cuts, "a line of a layer that is dropped"
    assert cuts.layers_kept(3) == [0, 2]
    assert cuts.positions(HIDDEN_DIM, 2, BASE).tolist() == [0, 3]
    assert cuts.positions(VOCAB_DIM, None, BASE) is None
    assert cuts.positions(FFN_DIM, 2, BASE).tolist() == [1, 4]
    assert cuts.positions(GATE_UP_DIM, 2, BASE).tolist() == [1, 4, 11, 14]
    keys = cuts.positions(KV_DIM, 0, BASE).tolist()
    assert keys == [4, 5, 6, 7, 8, 9, 10, 11]
    queries = cuts.positions(Q_DIM, 0, BASE).tolist()
    assert queries == list(range(8, 24))
    fused = [*queries, *(24 + at for at in keys), *(36 + at for at in keys)]
    assert cuts.positions(QKV_DIM, 0, BASE).tolist() == fused
    assert cuts.sizes(BASE) == BASE.with_counts({"hidden": 2, "layers": 2, "ffn": 2, "kv_groups": 2})


def test_an_axis_without_a_line_is_whole():
    cuts = Cuts.of(BASE, {"ffn.0": indices(*range(10)), "ffn.1": indices(*range(10)), "ffn.2": indices(*range(10))})
    assert cuts.is_identity
    assert cuts.sizes(BASE) == BASE
    assert all(cuts.positions(dim, 1, BASE) is None for dim in (FFN_DIM, QKV_DIM, HIDDEN_DIM))
    assert cuts.line("kv_groups", 1, BASE).kept.tolist() == [0, 1, 2]


@pytest.mark.parametrize("line", ["heads.0", "ffn", "ffn.", "ffn.01", "ffn.-1", "hidden.0", "layers.1", "", "vocab"])
def test_a_line_of_no_axis_is_refused(line: str):
    with pytest.raises(BrokenPlan, match=r"lines of the axes hidden, layers, ffn.\{layer\}, kv_groups.\{layer\}"):
        Cuts({line: AxisCut(width=10, kept=indices(0))})


def every(line: str, *kept: int, layers: tuple[int, ...] = (0, 1, 2)) -> dict[str, torch.Tensor]:
    return {f"{line}.{i}": indices(*kept) for i in layers}


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"hidden": indices(*range(13))}, "1 to 12 ascending indices below 12 for hidden"),
        ({"hidden": indices()}, "1 to 12 ascending indices below 12 for hidden, found none"),
        ({"layers": indices()}, "1 to 3 ascending indices below 3 for layers"),
        ({"layers": indices(0, 3)}, "1 to 3 ascending indices below 3 for layers"),
        ({"hidden": indices(3, 1)}, "ascending indices"),
        ({"hidden": indices(1, 1)}, "ascending indices"),
        ({"hidden": indices(-1, 1)}, "ascending indices"),
        (every("ffn", 1, 2) | {"ffn.2": indices(1)}, "the same count of ffn in every layer, .* found 1 in layer 2, 2"),
        (
            every("kv_groups", 1, layers=(0, 2)),
            "kv_groups in every layer that stays, or in none, found none in layer 1",
        ),
        (every("ffn", 1, layers=(0, 1, 2, 3)), "lines of layers that stay: 0, 1, 2, found ffn.3"),
    ],
)
def test_what_no_config_can_say_is_refused(kept: Mapping[str, torch.Tensor], message: str):
    widths = {name: axis.length(BASE) for name, axis in AXES.items()}
    cuts = Cuts({line: AxisCut(width=widths[line.partition(".")[0]], kept=at) for line, at in kept.items()})
    with pytest.raises(BrokenPlan, match=message):
        cuts.sizes(BASE)


def test_a_line_of_a_dropped_layer_or_of_another_base_is_refused():
    lines = {"layers": AxisCut(width=3, kept=indices(0, 1))}
    lines |= {f"ffn.{i}": AxisCut(width=10, kept=indices(1)) for i in range(3)}
    with pytest.raises(BrokenPlan, match=r"lines of layers that stay: 0, 1, found ffn\.2"):
        Cuts(lines).sizes(BASE)
    with pytest.raises(BrokenPlan, match="hidden of width 12, the base's, found 16"):
        Cuts({"hidden": AxisCut(width=16, kept=indices(1))}).sizes(BASE)


def test_a_shape_is_read():
    counts = parse_shape(" layers=2, ffn = 8,")
    assert counts == {"layers": 2, "ffn": 8}
    assert check_shape(counts, BASE, LLAMA) == BASE.with_counts(counts)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "found none"),
        ("heads=2", "found 'heads=2'"),
        ("layers=2,layers=1", "found layers twice"),
        ("ffn=0", "ffn as a count of 1 or more, found '0'"),
        ("ffn=-8", "found '-8'"),
        ("ffn=1.5", "found '1.5'"),
        ("ffn", "found ''"),
        ("ffn=11", "ffn between 1 and the base's 10, found 11. Give ffn a count below 10"),
        ("hidden=12,layers=3", "found a shape that changes nothing. The base has hidden=12"),
        ("kv_groups=2,hidden=9", "multiple of its 4 heads, not 9.*Nearest legal shapes: kv_groups=2,hidden=8 "),
    ],
)
def test_a_shape_that_cannot_be_is_refused(text: str, found: str):
    with pytest.raises(IllegalShape, match=found):
        check_shape(parse_shape(text), BASE, QWEN2)


def test_uneven_shapes_are_no_obstacle_where_a_class_takes_them():
    cut = BASE.with_counts({"hidden": 9})
    assert not LLAMA.obstacles(BASE, cut)
    assert LLAMA.obstacles(BASE, cut, {"attention_bias": True})
    assert not any(family.obstacles(BASE, BASE) for family in FAMILIES.values())
