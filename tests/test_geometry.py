from __future__ import annotations

import dataclasses
import re
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.errors import IllegalWidth, UsageError
from pat_serve.export.exporter import export_run
from pat_serve.export.rewrite.shape_check import parse_degrees
from pat_serve.shapes.fitness import (
    CPU_HEAD_DIMS,
    cautions,
    group_sizes,
    slow_width,
    tensor_parallel_degrees,
    tensor_parallel_obstacles,
)
from pat_serve.shapes.geometry import check_width, fast_tile, legal_step, legal_widths
from pat_serve.shapes.parameters import parameters_at
from pat_serve.shapes.sizes import ModelSizes
from tests.tiny_models import save_tiny_llama, tiny_llama


@pytest.mark.parametrize(
    ("hidden", "heads", "expected"),
    [(8192, 64, 256), (4096, 32, 256), (2048, 16, 128), (1024, 16, 64), (256, 8, 16), (5120, 40, 64), (576, 9, None)],
)
def test_fast_tile(hidden: int, heads: int, expected: int | None):
    assert fast_tile(hidden, heads, hidden_multiple_of_heads=True) == expected


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


LLAMA2_7B = ModelSizes(hidden=4096, layers=32, heads=32, kv_heads=32, head_dim=128, ffn=11008, vocab=32000, tied=False)
LLAMA3_8B = dataclasses.replace(LLAMA2_7B, kv_heads=8, ffn=14336, vocab=128256)
QWEN2_HALF_B = dataclasses.replace(LLAMA2_7B, hidden=896, heads=14, kv_heads=2, head_dim=64, ffn=4864, vocab=151936)


def wide(width: int) -> ModelSizes:
    """Llama-2-7B cut to a width."""
    return dataclasses.replace(LLAMA2_7B, hidden=width)


def test_an_illegal_width_names_the_parameters_of_the_nearest():
    with pytest.raises(IllegalWidth, match=r"2848 \(4.69 B parameters\), 2880 \(4.74 B parameters\), 2912"):
        check_width(2868, 4096, 32, hidden_multiple_of_heads=True, parameters=lambda width: wide(width).parameters)


@given(
    heads=st.integers(1, 128), size=st.sampled_from([16, 32, 64, 80, 96, 128]), multiple=st.booleans(), data=st.data()
)
def test_every_width_that_is_called_faster_is(heads: int, size: int, multiple: bool, data: st.DataObject):
    hidden = heads * size
    step = legal_step(heads, hidden_multiple_of_heads=multiple)
    legal = legal_widths(step, hidden)
    assume(legal)
    width = data.draw(st.sampled_from(legal))
    exported = dataclasses.replace(LLAMA2_7B, hidden=width, heads=heads)
    said = slow_width(hidden, exported, hidden_multiple_of_heads=multiple)
    claimed = re.match(r"hidden_size (\d+) is no multiple of (\d+),.* the nearest multiples are (.*)", said or "")
    if claimed is None:
        assert said is None
        return
    tile, named = int(claimed[2]), [int(one) for one in re.findall(r"(\d+) \(", claimed[3])]
    assert int(claimed[1]) == width
    assert width % tile
    faster = [k for k in legal if k % tile == 0]
    assert set(named) <= set(faster)
    assert width not in named
    below, above = [k for k in faster if k < width], [k for k in faster if k > width]
    assert named == [*below[-1:], *above[:1]] != []


def test_a_width_is_not_called_slow_where_no_other_is_faster():
    for width in (288, 360, 432, 504):
        smollm2 = dataclasses.replace(LLAMA2_7B, hidden=width, heads=9)
        assert slow_width(576, smollm2, hidden_multiple_of_heads=True) is None
    assert slow_width(4096, wide(3072), hidden_multiple_of_heads=True) is None
    said = slow_width(4096, wide(3008 - 32), hidden_multiple_of_heads=True)
    assert said is not None
    assert said.endswith("the nearest multiples are 2944 (4.84 B parameters), 3008 (4.95 B parameters)")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("width", [64, 48, 32])
def test_parameter_counts_are_those_of_the_model(tied: bool, width: int, tmp_path: Path):
    settings = {"attention_bias": True, "tie_word_embeddings": tied}
    base = open_checkpoint(str(save_tiny_llama(tmp_path, **settings)))
    cut = tiny_llama(hidden_size=width, **settings)
    sizes = dataclasses.replace(base.sizes, hidden=width)
    assert parameters_at(base, sizes) == sum(parameter.numel() for parameter in cut.parameters())
    untied = tiny_llama(hidden_size=width, **(settings | {"tie_word_embeddings": False}))
    if tied:
        expected = sum(parameter.numel() for parameter in untied.parameters())
        assert parameters_at(base, sizes, own_head=True) == expected


@pytest.mark.parametrize(
    ("sizes", "degrees"),
    [
        (LLAMA2_7B, [1, 2, 4, 8, 16, 32]),
        (LLAMA3_8B, [1, 2, 4, 8, 16, 32]),
        (QWEN2_HALF_B, [1, 2]),  # 14 heads: 7 splits neither 2 key-value heads nor 151936 tokens
        (dataclasses.replace(LLAMA2_7B, heads=40, kv_heads=40), [1, 2, 4, 5, 8, 10, 20, 40]),
        (dataclasses.replace(LLAMA2_7B, heads=6, kv_heads=6), [1, 2]),
    ],
)
def test_tensor_parallel_degrees(sizes: ModelSizes, degrees: list[int]):
    # 11008 = 2^8 * 43 does not divide by 5, the table's 13B has 13824.
    sizes = dataclasses.replace(sizes, ffn=13824 * 5) if sizes.heads == 40 else sizes
    assert tensor_parallel_degrees(sizes) == degrees


def test_obstacles_are_named():
    [heads, keys, ffn, vocab] = tensor_parallel_obstacles(LLAMA2_7B, 3)
    assert heads == "32 heads are no multiple of 3"
    assert keys == "32 key-value heads neither divide by 3 nor divide it"
    assert ffn == "intermediate_size 11008 is no multiple of 3"
    assert vocab == "the vocabulary, padded to 32000, is no multiple of 3"


@pytest.mark.vllm
@pytest.mark.parametrize("degree", [2, 3, 4, 5, 6, 7, 8, 16])
@pytest.mark.parametrize("sizes", [LLAMA2_7B, LLAMA3_8B, QWEN2_HALF_B])
def test_vllm_splits_by_the_same_rules(sizes: ModelSizes, degree: int):
    from vllm.distributed.utils import divide
    from vllm.model_executor.layers.vocab_parallel_embedding import pad_vocab_size

    def splits() -> bool:
        """Whether vLLM's LlamaAttention, MLP and VocabParallelEmbedding can divide the model."""
        try:
            divide(sizes.heads, degree)
            if sizes.kv_heads >= degree:
                divide(sizes.kv_heads, degree)
            else:
                divide(degree, sizes.kv_heads)
            divide(sizes.ffn, degree)
            divide(pad_vocab_size(sizes.vocab), degree)
        except AssertionError:
            return False
        return True

    assert splits() == (not tensor_parallel_obstacles(sizes, degree))


@pytest.mark.vllm
@pytest.mark.parametrize("width", [16, 20, 24, 28, 40, 44, 48])
def test_vllms_cpu_kernels_want_eights(width: int):
    import torch

    import_module("vllm._custom_ops")  # loads the kernels

    row, out = torch.randn(1, width), torch.empty(1, width)
    if width % legal_step(4, hidden_multiple_of_heads=False):
        with pytest.raises(RuntimeError, match="VEC_ELEM_NUM"):
            torch.ops._C.rms_norm(out, row, torch.ones(width), 1e-5)
        with pytest.raises(RuntimeError, match="VEC_ELEM_NUM"):
            torch.ops._C.silu_and_mul(out, torch.randn(1, 2 * width))
    else:
        torch.ops._C.rms_norm(out, row, torch.ones(width), 1e-5)
        torch.testing.assert_close(out, row * torch.rsqrt(row.square().mean() + 1e-5))


@pytest.mark.vllm
def test_vllms_cpu_attention_knows_these_heads():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert tuple(CPUAttentionBackend.get_supported_head_sizes()) == CPU_HEAD_DIMS


def test_cautions():
    assert cautions(wide(3072), (1, 2, 4, 8), bits=8) == []
    slow = slow_width(4096, wide(2848), hidden_multiple_of_heads=True)
    assert slow is not None
    assert "2848 is no multiple of 64" in slow
    assert "2816 (4.63 B parameters)" in slow
    [shallow] = cautions(wide(3072), (16,), bits=8)  # 11008 / 16 = 688 is no multiple of 32
    assert "3072 x 688 at 16-fold" in shallow
    assert "AMX" in shallow
    assert any("head_dim 48" in text for text in cautions(dataclasses.replace(wide(3072), head_dim=48)))
    odd = dataclasses.replace(wide(3072), ffn=11012)
    assert any("2753 feed-forward channels" in text for text in cautions(odd, (4,)))


def test_group_sizes():
    assert group_sizes(wide(3072)) == [32, 64, 128]  # 11008 = 86 * 128
    assert group_sizes(wide(2848)) == [32]
    assert group_sizes(wide(2856)) == []


def test_an_export_is_held_to_its_degrees(finished_run: Path, tmp_path: Path):
    done = export_run(finished_run, tmp_path / "out", tp=(2, 4), parity=False)
    assert done.record["fits"]["tensor_parallel"] == [1, 2, 4]
    with pytest.raises(UsageError, match=r"--tp 3: expected a degree .* 1, 2, 4, found 4 heads are no multiple of 3"):
        export_run(finished_run, tmp_path / "other", tp=(2, 3), parity=False)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("text", "degrees"), [("", ()), ("2", (2,)), (" 2, 4 ", (2, 4))])
def test_parse_degrees(text: str, degrees: tuple[int, ...]):
    assert parse_degrees(text) == degrees


@pytest.mark.parametrize("text", ["0", "-2", "two", "2;4", "1.5"])
def test_no_degrees(text: str):
    with pytest.raises(UsageError, match="--tp: expected degrees such as 2,4"):
        parse_degrees(text)
