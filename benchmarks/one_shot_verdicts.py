"""The verdicts of `benchmarks/one_shot_orderings.py`: each ordering, whether it holds, and by how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# The smaller of each pair is promised to be the first.
LINEAR_ORDERS = (
    ("2:4 MM", "2:4 MS"),
    ("2:4 MS", "2:4 SS"),
    ("2:4 MM", "2:4 SM"),
    ("2:4 SM", "2:4 SS"),
    ("50 % SM", "50 % SS"),
    ("50 % SS", "50 % wanda"),
    ("50 % wanda", "50 % magnitude"),
    ("50 % SM", "2:4 MM"),
    ("dsnot after", "dsnot before"),
)
MODEL_ORDERS = (
    ("50 % wanda", "50 % magnitude"),
    ("50 % SM", "50 % wanda"),
    ("50 % SM", "50 % SS"),
    ("50 % SM", "2:4 MM"),
    ("50 % wanda", "2:4 wanda"),
    ("2:4 MM", "2:4 SS"),
    ("2:4 MM", "2:4 MS"),
    ("2:4 MS", "2:4 SS"),
    ("2:4 SM", "2:4 SS"),
    ("70 % SM, alpha", "70 % SM"),
    ("70 % wanda, alpha", "70 % wanda"),
    ("50 % wanda, dsnot", "50 % wanda"),
    ("70 % wanda, dsnot", "70 % wanda"),
)


def print_verdicts(lines: Sequence[Mapping[str, Any]]) -> None:
    """Print one row for each ordering."""
    linears = [
        (f"{line['name']}.{name}", errors)
        for line in lines
        if line["part"] == "errors"
        for name, errors in line["linears"].items()
    ]
    layers = {name.partition(".")[0] for name, _ in linears}
    if linears:
        print(f"mean squared error of outputs, {len(linears)} linears of {len(layers)} layers")
    for less, more in LINEAR_ORDERS if linears else ():
        held = [name for name, errors in linears if errors[less] <= errors[more]]
        by_layer = [
            sum(errors[less] for name, errors in linears if name.partition(".")[0] == layer)
            <= sum(errors[more] for name, errors in linears if name.partition(".")[0] == layer)
            for layer in sorted(layers, key=int)
        ]
        ratio = sum(errors[less] for _, errors in linears) / sum(errors[more] for _, errors in linears)
        print(
            f"  {less} <= {more}: {len(held)} of {len(linears)} linears, {sum(by_layer)} of {len(layers)} layers; "
            f"sum {ratio:.3f} of the other"
        )
    models = {line["name"]: line["perplexity"] for line in lines if line["part"] == "perplexity"}
    if models:
        print("perplexity")
        for name, value in models.items():
            print(f"  {name}: {value:.2f}")
    for less, more in MODEL_ORDERS:
        if less in models and more in models:
            verdict = "holds" if models[less] <= models[more] else "does NOT hold"
            print(f"  {less} <= {more}: {verdict}, {models[less]:.2f} and {models[more]:.2f}")
