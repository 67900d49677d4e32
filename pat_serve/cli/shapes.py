"""pat-shapes: what cuts along each axis save, before anything is trained."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pat_serve.cli.app import Debug, run_command
from pat_serve.errors import MissingModel, UsageError, want

if TYPE_CHECKING:
    from pat_serve.machine.probed_costs import FoundCosts
    from pat_serve.server.analysis.shape_figures import Load, Setting
    from pat_serve.server.bench.shape_search import Found

Flag = typer.Option
_LOAD = re.compile(r"([1-9]\d{0,5})x([1-9]\d{0,7})")
_DTYPES = ("float32", "bfloat16", "float16")


def shapes(
    model: Annotated[
        str, typer.Argument(help="Dense model: folder, .gguf, hub id, config.json, or a shipped shape (llama2-7b).")
    ],
    ratio: Annotated[
        float | None, Flag(help="Share of all parameters to cut, in (0, 0.6]; 0.25 where nothing else is asked for.")
    ] = None,
    speedup: Annotated[
        float | None, Flag(help="Instead: the speed-up of decode to reach, at every --at, with the smallest cut.")
    ] = None,
    shape: Annotated[
        list[str] | None, Flag(help="A shape to show, as layers=24,ffn=1280; repeatable. An illegal one is refused.")
    ] = None,
    at: Annotated[str, Flag(help="Loads, as requests x tokens of each.")] = "1x128,8x1024,32x2048",
    tp: Annotated[str | None, Flag(help="Tensor-parallel degrees that a shape is to be served with, as 2,4.")] = None,
    dtype: Annotated[
        str, Flag(help="float32, bfloat16, float16; auto: 16 bits, and with --probe what suits the machine.")
    ] = "auto",
    probe: Annotated[
        bool, Flag("--probe", help="Measure here what a byte, a FLOP, a layer and a step cost: some 10 seconds.")
    ] = False,
    results: Annotated[
        list[Path] | None,
        Flag(help="Instead take that from results of pat-bench speedup --layers 2,6; repeatable."),
    ] = None,
    revision: Annotated[str | None, Flag(help="Revision of a hub id.")] = None,
    as_json: Annotated[bool, Flag("--json", help="Print all figures to stdout as JSON, and nothing else.")] = False,
    debug: Debug = False,
) -> None:
    """Compare the shapes that a model can be cut to: parameters, bytes, KV cache, ceilings, and what is in the way.

    Example: `pat-shapes llama2-7b --ratio 0.25 --at 1x128,8x1024 --tp 2,4`

    Needs no weights, and takes a second or two. `pat-train --shape` takes the shapes that it shows. Ceilings
    count bytes and FLOPs alone; with --probe or --results a speed-up with the fixed work of each layer and step stands
    beside them.
    """
    want("--probe", not (probe and results), "--probe or --results", "both", "Leave one out.")
    want("--ratio", ratio is None or speedup is None, "--ratio or --speedup", "both", "Leave one out.")
    want("--dtype", dtype in ("auto", *_DTYPES), ", ".join(("auto", *_DTYPES)), dtype, "Try --dtype bfloat16.")
    loads, degrees = _loads(at), _degrees(tp)

    from dataclasses import replace

    from pat_serve.checkpoints.recognize import family_of
    from pat_serve.cut.axes import AXES
    from pat_serve.server.analysis.shape_figures import Setting
    from pat_serve.server.bench.shape_search import Found, for_ratio, for_speedup
    from pat_serve.shapes.candidates import check_ratio
    from pat_serve.shapes.shape import check_shape, parse_shape
    from pat_serve.shapes.sizes import ModelSizes

    if ratio is not None:
        check_ratio(ratio)
    asked = [parse_shape(text) for text in shape or ()]
    config = _config(model, revision)
    family = family_of(config, model)
    base = ModelSizes.of(config, family, model)
    for counts in asked:
        check_shape(counts, base, family, config)
    costs = _costs(base, dtype, probe=probe, results=results or [])
    setting = Setting(
        base=base,
        family=family,
        config=config,
        loads=loads,
        dtype_bytes=4 if (costs.dtype if costs else dtype) == "float32" else 2,
        degrees=degrees,
        costs=costs.costs if costs else None,
    )
    if speedup is not None:
        found = for_speedup(setting, speedup)
    elif ratio is not None or not asked:
        found = for_ratio(setting, 0.25 if ratio is None else ratio)
    else:
        found = Found(shapes=[], picked=None, remarks=[])
    ordered = [{axis: counts[axis] for axis in AXES if axis in counts} for counts in asked]
    found = replace(found, shapes=[*found.shapes, *(setting.figures(counts) for counts in ordered)])
    _print(setting, found, costs, as_json=as_json)


def _print(setting: Setting, found: Found, costs: FoundCosts | None, *, as_json: bool) -> None:
    from pat_serve.server.bench.shape_table import shape_lines

    whole = setting.figures({})
    notes = _notes(setting, costs)
    if found.picked is not None:
        notes.append(
            f"{found.picked + 1}* cuts the fewest parameters. It may lean on one axis, and an even mix of the same "
            "size often keeps more: train both for some steps before you choose."
        )
    if as_json:
        document = {
            "base": asdict(whole),
            "shapes": [asdict(one) for one in found.shapes],
            "picked": found.picked,
            "costs": asdict(costs) if costs else None,
            "remarks": [*found.remarks, *notes],
        }
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
        return
    lines = shape_lines(whole, found.shapes, picked=found.picked, tied=setting.base.tied)
    sys.stdout.write("\n".join([*lines, *(["", *found.remarks] if found.remarks else []), "", *notes]) + "\n")


def _notes(setting: Setting, costs: FoundCosts | None) -> list[str]:
    """Notes on how far the figures can be trusted, a line each."""
    if costs:
        found = costs.costs
        worth = f"{1e-9 / found.byte_s:.1f} GB/s" if found.byte_s else "nothing for a byte"
        return [
            f"Expected from {costs.source}: {worth}, {found.flop_s * 1e12:.2f} s for 1e12 FLOPs, "
            f"{found.layer_s * 1e6:.0f} us for each layer and {found.step_s * 1e6:.0f} us for each step; "
            f"the {costs.times} times are met within {costs.worst_error:.0%}.",
            *([costs.remark] if costs.remark else []),
        ]
    notes = ["Ceilings count bytes (decode) and FLOPs (prefill) alone: no engine is faster, and many are slower."]
    if setting.small_layers:
        notes.append(
            "The layers of this model are so small that fixed work for each layer takes a large part of a step: do not "
            "choose by ceilings alone. --probe or --results adds what to expect."
        )
    return notes


def _costs(base: Any, dtype: str, *, probe: bool, results: list[Path]) -> FoundCosts | None:
    if not probe and not results:
        return None
    from pat_serve.machine.hardware import serving_dtype
    from pat_serve.machine.probed_costs import probed_costs
    from pat_serve.server.bench.shape_costs import recorded_costs

    if results:
        found = recorded_costs(results)
        want(
            "--dtype",
            dtype in ("auto", found.dtype),
            f"{found.dtype}, which the results are in",
            dtype,
            "Leave it out.",
        )
        return found
    return probed_costs(base, serving_dtype(dtype))


def _config(model: str, revision: str | None) -> dict[str, Any]:
    from pat_serve.checkpoints.config_only import config_of_model
    from pat_serve.server.bench.model_source import shipped_config, shipped_shapes

    known = shipped_config(model)
    if known is not None:
        return known
    try:
        return config_of_model(model, revision)
    except MissingModel as error:
        raise MissingModel(
            error.subject,
            expected=f"{error.expected}, a config.json, or a shipped shape ({', '.join(shipped_shapes())})",
            found=error.found,
            fix=error.fix,
        ) from error


def _loads(text: str) -> list[Load]:
    from pat_serve.server.analysis.shape_figures import Load

    parts = list(dict.fromkeys(part.strip() for part in text.split(",")))
    found = [_LOAD.fullmatch(part) for part in parts]
    if not all(found):
        raise UsageError(
            "--at",
            expected="requests x tokens, from 1x1 on, separated by commas",
            found=repr(text),
            fix="Try --at 1x128,8x1024.",
        )
    return [Load(batch_size=int(one[1]), tokens=int(one[2])) for one in found if one]


def _degrees(text: str | None) -> list[int]:
    if text is None:
        return []
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and int(part) >= 1 for part in parts):
        raise UsageError("--tp", expected="degrees from 1 on, separated by commas", found=repr(text), fix="Try --tp 2.")
    return sorted({int(part) for part in parts})


def main() -> None:
    """Run the command line of `pat-shapes`, to the end of the process."""
    run_command(shapes)
