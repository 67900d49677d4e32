"""Times of decoder layers of a model's own sizes on this machine, at two depths and two widths: a few seconds.

The layers are plain torch with random weights: norms, matrices, attention over a KV cache, a gated FFN, and a head.
Their count is such that no cache holds them, as it holds no whole model. Their fixed work is torch's own: an engine
that compiles or captures its graphs has less of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pat_serve.shapes.sizes import ModelSizes
from pat_serve.terminal.progress import track

if TYPE_CHECKING:
    from torch import Tensor

# More than the last-level cache of any CPU, and little enough to be filled in a second.
_LEAST_BYTES = 1 << 29
_ROUNDS = 10
_VOCAB = 8192


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step that is timed.

    Attributes:
        batch_size: requests.
        tokens: of each request: in its cache for a decode step, of its prompt for a prefill.
        prefill: it reads prompts.
    """

    batch_size: int
    tokens: int
    prefill: bool = False


# Short caches: torch's attention over a long one takes several times what an engine's does, and would pass for the cost
# of a byte.
STEPS = (
    Step(batch_size=1, tokens=128),
    Step(batch_size=4, tokens=64),
    Step(batch_size=1, tokens=128, prefill=True),
)


@dataclass(frozen=True, kw_only=True)
class TimedStep:
    """A measured step.

    Attributes:
        sizes: of the model that did it.
        step: that was timed.
        seconds: the shortest of several.
    """

    sizes: ModelSizes
    step: Step
    seconds: float


def probe_layers(base: ModelSizes, dtype: str) -> list[TimedStep]:
    """Time layers of a model's sizes, half as many, and as many of a quarter of the width.

    Args:
        base: sizes of the model.
        dtype: float32, bfloat16 or float16.
    """
    import torch

    bytes_each = torch.finfo(getattr(torch, dtype)).bits // 8
    layer = replace(base, layers=2), replace(base, layers=1)
    layer_bytes = bytes_each * (layer[0].parameters - layer[1].parameters)
    deep = max(2, min(base.layers, -(-_LEAST_BYTES // layer_bytes)))
    # The head is the same at every size, and small: what it costs is counted as what it reads.
    whole = replace(base, layers=deep, vocab=min(base.vocab, _VOCAB))
    narrow = replace(whole, hidden=max(8, whole.hidden // 32 * 8), ffn=max(8, whole.ffn // 32 * 8))
    with torch.inference_mode():
        models = [_Layers(sizes, dtype) for sizes in (whole, replace(whole, layers=max(1, deep // 2)), narrow)]
        runs = [(model.sizes, step, model.run_of(step)) for model in models for step in STEPS]
        for *_, run in runs:
            run()
        # In turns, so that what disturbs the machine for a while does not fall on one of them alone; and whatever
        # disturbs a run only makes it slower.
        taken = [[_seconds(run) for *_, run in runs] for _ in track(range(_ROUNDS), "probe")]
    return [
        TimedStep(sizes=sizes, step=step, seconds=min(times))
        for (sizes, step, _), times in zip(runs, zip(*taken, strict=True), strict=True)
    ]


class _Layers:
    """Layers with random weights, and the step that they make."""

    def __init__(self, sizes: ModelSizes, dtype: str) -> None:
        import torch

        self.sizes = sizes
        self.dtype = getattr(torch, dtype)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._noise = torch.empty(1 << 20, dtype=self.dtype, device=self.device).uniform_(-0.05, 0.05)
        queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        self.layers = [
            (
                self._random(queries + 2 * keys, sizes.hidden),
                self._random(sizes.hidden, queries),
                self._random(2 * sizes.ffn, sizes.hidden),
                self._random(sizes.hidden, sizes.ffn),
            )
            for _ in range(sizes.layers)
        ]
        self.gain = self._random(sizes.hidden)
        self.head = self._random(sizes.vocab, sizes.hidden)

    def _random(self, *shape: int) -> Tensor:
        """Numbers of a small block over and over: drawing billions would take longer than all that is timed."""
        import torch

        count = 1
        for length in shape:
            count *= length
        filled: Tensor = self._noise.repeat(-(-count // len(self._noise)))[:count].view(shape)
        return torch.clone(filled)

    def run_of(self, step: Step) -> Callable[[], Any]:
        """A step over a KV cache of its own."""
        import torch
        from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

        sizes, batch = self.sizes, step.batch_size
        new = step.tokens if step.prefill else 1
        stream = self._random(batch, new, sizes.hidden)
        queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        caches = [
            (None, None)
            if step.prefill
            else tuple(self._random(batch, sizes.kv_heads, step.tokens, sizes.head_dim) for _ in range(2))
            for _ in self.layers
        ]

        def heads(flat: Tensor) -> Tensor:
            return flat.view(batch, new, -1, sizes.head_dim).transpose(1, 2)

        def run() -> Any:
            x = stream
            for (qkv, out, gate_up, down), (old_keys, old_values) in zip(self.layers, caches, strict=True):
                projected = linear(rms_norm(x, (sizes.hidden,), self.gain), qkv)
                q, k, v = torch.split(projected, [queries, keys, keys], dim=-1)
                attended = scaled_dot_product_attention(
                    heads(q),
                    heads(k) if old_keys is None else old_keys,
                    heads(v) if old_values is None else old_values,
                    is_causal=step.prefill,
                    enable_gqa=sizes.heads != sizes.kv_heads,
                )
                x = x + linear(attended.transpose(1, 2).reshape(batch, new, queries), out)
                gate, up = linear(rms_norm(x, (sizes.hidden,), self.gain), gate_up).chunk(2, dim=-1)
                x = x + linear(silu(gate) * up, down)
            scores = linear(rms_norm(x[:, -1], (sizes.hidden,), self.gain), self.head).argmax(dim=-1)
            if self.device == "cuda":
                torch.cuda.synchronize()
            return scores

        return run


def _seconds(run: Callable[[], Any]) -> float:
    begun_s = time.perf_counter()
    run()
    return time.perf_counter() - begun_s
