"""pat-export: rewrite a finished run as a standard smaller checkpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from pat_serve.cli.app import Debug, run_command

Flag = typer.Option


def export(
    ckpt: Annotated[Path, Flag("--ckpt", help="A finished training run (run/).")],
    out: Annotated[Path, Flag("--out", help="Folder for the checkpoint; must not exist.")],
    base: Annotated[str | None, Flag(help="Where the base model lies now, if it was moved since.")] = None,
    dtype: Annotated[str, Flag(help="auto (the base's), float32, bfloat16, float16 or float64.")] = "auto",
    rounding: Annotated[
        str,
        Flag(help="Of 16-bit files: nearest, stochastic, or auto: nearest, unless that loses what the training moved."),
    ] = "auto",
    max_shard_size: Annotated[str, Flag(help="Largest weight file: 5GB, 500MB, 2GiB.")] = "5GB",
    quantize: Annotated[
        str | None,
        Flag(help="int8 (W8A8), int4 (W4A16, GPTQ) or fp8 (W8A8) for the decoder's linears, as compressed-tensors."),
    ] = None,
    calibration: Annotated[
        str | None,
        Flag(help="What int4 rounds for: instructions (.jsonl or a hub id) or any text. [default: the run's data]"),
    ] = None,
    gguf: Annotated[bool, Flag("--gguf", help="Write model.gguf for llama.cpp too.")] = False,
    push: Annotated[
        str | None, Flag("--push-to-hub", help="Upload the finished export to this hub repository.")
    ] = None,
    private: Annotated[bool, Flag("--private", help="Create that repository as a private one.")] = False,
    tp: Annotated[str, Flag(help="Tensor-parallel degrees that it must serve at, such as 2,4.")] = "",
    parity: Annotated[
        bool,
        Flag("--parity/--no-parity", help="Measure the exported files against the trained model; refuse a mismatch."),
    ] = True,
    parity_vllm: Annotated[
        bool, Flag("--parity-vllm", help="Measure in vLLM too: an engine for each dtype, a minute each.")
    ] = False,
    parity_walk: Annotated[
        bool | None,
        Flag(
            "--parity-walk/--no-parity-walk",
            help="Measure one layer at a time; by default when the model would not fit into memory.",
        ),
    ] = None,
    require_quality: Annotated[
        list[str] | None,
        Flag(help="A bound that the model must keep against its base, such as ppl<=1.02x; may be given again."),
    ] = None,
    quality_data: Annotated[
        Path | None, Flag(help="What it is measured on: instructions (.jsonl), or any text, in windows.")
    ] = None,
    as_json: Annotated[bool, Flag("--json", help="Print pat_export.json to stdout.")] = False,
    force: Annotated[bool, Flag("--force", help="Replace what is at --out.")] = False,
    debug: Debug = False,
) -> None:
    """Merge LoRA, fold the hybrid operators, cut what the plan cuts, and prove that the model is still the same.

    Example: `pat-export --ckpt run/ --out pruned/`

    The result loads in stock transformers and stock vLLM. Exit code 1 means that parity failed or a required quality is
    missed, and 3 that the data cannot say whether it is missed. Both leave no output.

    `pat-export verify pruned/ --ckpt run/` repeats the proof at any time later. `pat-export card pruned/` adds later
    measurements to the model card.
    """
    from pat_serve.errors import UsageError
    from pat_serve.export.record.hub import check_hub, push_to_hub

    if push:
        check_hub(push)  # before torch is imported, let alone a model exported
    if parity_vllm and not parity:
        raise UsageError("--parity-vllm", expected="a parity check", found="--no-parity", fix="Leave one of them out.")
    from pat_serve.cli.calibration import calibration_of
    from pat_serve.cli.quality_gate import quality_gate
    from pat_serve.export.exporter import export_run
    from pat_serve.export.formats.sizes import parse_size
    from pat_serve.export.parity.report import parity_lines
    from pat_serve.export.record.shape import changed_sizes
    from pat_serve.export.rewrite.shape_check import parse_degrees
    from pat_serve.server.engine.workers.scoring import score_with_vllm
    from pat_serve.terminal.progress import say

    if calibration and quantize != "int4":
        raise UsageError(
            "--calibration",
            expected="--quantize int4",
            found=f"--quantize {quantize}" if quantize else "none",
            fix="Leave --calibration out: nothing else is calibrated.",
        )
    accept = quality_gate(require_quality or [], quality_data, out=out)
    done = export_run(
        ckpt,
        out,
        base=base,
        dtype=dtype,
        rounding=rounding,
        max_shard_bytes=parse_size(max_shard_size, "--max-shard-size"),
        parity=parity,
        walk=parity_walk,
        scorer=score_with_vllm if parity_vllm else None,
        force=force,
        quantize=quantize,
        tp=parse_degrees(tp),
        gguf=gguf,
        calibration=calibration_of(calibration, ckpt) if quantize == "int4" else None,
        accept=accept,
    )
    parameters = done.record["parameters"]
    sizes = "".join(f"{name} {of['base']} -> {of['exported']}, " for name, of in changed_sizes(done.record).items())
    say(
        f"{out}: {sizes}parameters {parameters['base']:,} -> "
        f"{parameters['exported']:,} ({parameters['exported'] / parameters['base']:.1%})"
    )
    if done.parity is not None:
        say("\n".join(parity_lines(done.parity)))
    if done.quality is not None:
        say(f"{done.quality.scheme}: {done.quality.describe()}")
    if push:
        say(f"pushed: {push_to_hub(out, push, private=private)}")
    if as_json:
        sys.stdout.write(json.dumps(done.record, indent=2) + "\n")


def main() -> None:
    """Entry point. These are no commands of a group, so that the plain command keeps its required flags."""
    if sys.argv[1:2] == ["verify"]:
        from pat_serve.cli.verify import main as verify

        sys.argv = [f"{sys.argv[0]} verify", *sys.argv[2:]]
        verify()
    if sys.argv[1:2] == ["card"]:
        from pat_serve.cli.card import main as card

        sys.argv = [f"{sys.argv[0]} card", *sys.argv[2:]]
        card()
    run_command(export)
