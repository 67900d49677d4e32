"""The gain of a width in the matrix products alone: a Llama-2-7B layer at several hidden sizes, without vLLM.

    python -m benchmarks.widths --rows 1,4,64

Each round runs every width once, in alternating order; the ratio is that of each round's pair with the dense width. A
ratio below its ceiling here is the kernels' doing; one at its ceiling leaves the rest of a step to the engine.
"""

from __future__ import annotations

import argparse
import time

import torch

from pat_serve.machine.hardware import compute_cores
from pat_serve.server.analysis.statistics import paired_ratio, percentile

ATTENTION, FFN, DENSE = 4096, 11008, 4096
WIDTHS = (4096, 3328, 3200, 3072, 3008, 2944, 2868)


def matrices(width: int) -> list[torch.Tensor]:
    """The four products of a layer, as vLLM fuses them: qkv, o, gate and up, down."""
    shapes = ((3 * ATTENTION, width), (width, ATTENTION), (2 * FFN, width), (width, FFN))
    # The numbers do not matter to the time; drawing a billion of them does.
    return [torch.full((outputs, inputs), 0.01) for outputs, inputs in shapes]


def seconds(weights: list[torch.Tensor], inputs: list[torch.Tensor]) -> float:
    """One pass through the layer's products."""
    begun_s = time.perf_counter()
    for weight, rows in zip(weights, inputs, strict=True):
        torch.nn.functional.linear(rows, weight)
    return time.perf_counter() - begun_s


def main() -> None:
    """Print a line for each number of rows and width."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,4,64", help="rows of the input: requests in a step, or prompt tokens")
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    torch.set_num_threads(len(compute_cores()))
    layers = {width: matrices(width) for width in WIDTHS}
    for rows in map(int, arguments.rows.split(",")):
        inputs = {width: [torch.randn(rows, weight.shape[1]) for weight in layers[width]] for width in WIDTHS}
        times: dict[int, list[float]] = {width: [] for width in WIDTHS}
        for index in range(arguments.rounds + 2):
            for width in WIDTHS if index % 2 else WIDTHS[::-1]:
                taken_s = seconds(layers[width], inputs[width])
                if index >= 2:
                    times[width].append(taken_s)
        for width in WIDTHS:
            ratio, ceiling = paired_ratio(times[DENSE], times[width]), DENSE / width
            median_ms = 1000 * percentile(times[width], 50)
            print(
                f"rows {rows:4d}  width {width}: {median_ms:8.2f} ms  ratio {ratio.median:.3f} "
                f"[{ratio.low:.3f}, {ratio.high:.3f}]  ceiling {ceiling:.3f}  reached {ratio.median / ceiling:.0%}"
            )


if __name__ == "__main__":
    main()
