"""Check that the line through two cut depths leads to the whole model's speed-up, where all three can be measured.

Example: python -m benchmarks.depth_check --rounds 16 --out depth.json

Two shapes with random weights that fit whole: 24 layers, hidden 1024 against 768 (the FFN and the heads as they are, as
PAT leaves them). `pat-bench speedup --layers 2,6` predicts the whole pair; `pat-bench speedup` without cutting measures
it right after. The table has prediction and measurement beside each other.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pat_serve.server.bench.report.read import read_result
from pat_serve.server.bench.speedup.result import SpeedupResult

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "vocab_size": 32000, "max_position_embeddings": 2048, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def main() -> None:
    """Predict, measure, print both, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs=2, default=(1024, 768), help="of baseline and candidate")
    parser.add_argument("--ffn", type=int, default=2816)
    parser.add_argument("--heads", type=int, default=16, help="of 64 numbers each")
    parser.add_argument("--whole", type=int, default=24, help="layers that are predicted and measured")
    parser.add_argument("--layers", default="2,6", help="depths that predict")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--claim", type=float, default=1.33)
    parser.add_argument("--keep", type=Path, help="folder for both results; one that is there is not measured again")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = []
        for hidden in options.hidden:
            folder = Path(scratch) / f"hidden-{hidden}"
            folder.mkdir()
            shape = {"hidden_size": hidden, "intermediate_size": options.ffn, "num_hidden_layers": options.whole,
                     "num_attention_heads": options.heads, "num_key_value_heads": options.heads,
                     "head_dim": 64}  # fmt: skip
            (folder / "config.json").write_text(json.dumps({**LLAMA, **shape}), encoding="utf-8")
            folders.append(folder)
        kept = options.keep or Path(scratch)
        kept.mkdir(parents=True, exist_ok=True)
        predicted = check(options, folders, kept / "cut.json", "--layers", options.layers)
        measured = check(options, folders, kept / "whole.json")
    figures = rows(predicted, measured)
    print(table(figures))
    if options.out:
        about = {"date": measured.date, "machine": measured.machine, "dtype": measured.dtype}
        options.out.write_text(json.dumps({**about, "rows": figures}, indent=2) + "\n", encoding="utf-8")


def check(options: argparse.Namespace, folders: list[Path], out: Path, *cut: str) -> SpeedupResult:
    """Run `pat-bench speedup` in a process of its own, or read a result that is there."""
    command = [sys.executable, "-m", "pat_serve.cli.bench", "speedup", "--load-format", "dummy", "--no-roofline",
               "--baseline", str(folders[0]), "--candidate", str(folders[1]), "--out", str(out), *cut]  # fmt: skip
    for name in ("rounds", "prompt_tokens", "batch_size", "claim"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    done = None if out.exists() else subprocess.run(command, check=False)
    if done is not None and done.returncode not in (0, 1, 3):
        raise SystemExit(f"pat-bench ended with {done.returncode}")
    result = read_result(out)
    assert isinstance(result, SpeedupResult)
    return result


def rows(predicted: SpeedupResult, measured: SpeedupResult) -> list[dict[str, Any]]:
    """Make a row for each phase: the lines' prediction for the whole models, and their measurement."""
    found = []
    for line, whole in zip(predicted.extrapolated, measured.regimes, strict=True):
        cut = [depth.regimes[predicted.regimes.index(one)] for depth in predicted.depths for one in predicted.regimes
               if one.regime is whole.regime]  # fmt: skip
        found.append(
            {
                "regime": whole.regime.value,
                "ratios_cut": {
                    depth.layers: one.ratio.median for depth, one in zip(predicted.depths, cut, strict=True)
                },
                "predicted": [line.ratio.median, line.ratio.low, line.ratio.high],
                "measured": [whole.ratio.median, whole.ratio.low, whole.ratio.high],
                "predicted_s": [line.baseline.total_s, line.candidate.total_s],
                "measured_s": [whole.baseline.median, whole.candidate.median],
                "fixed_s": [line.baseline.fixed_s, line.candidate.fixed_s],
                "layer_s": [line.baseline.layer_s, line.candidate.layer_s],
                "ceiling": whole.ceiling,
                "verdicts": [line.verdict.value, whole.verdict.value],
                "spread": [line.noise.spread, whole.noise.spread],
            }
        )
    return found


def table(figures: list[dict[str, Any]]) -> str:
    """Put the rows into a Markdown table."""
    lines = [
        "| | ratio, cut | predicted for the whole | measured whole | ceiling | ms predicted | ms measured | spread |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in figures:
        cut = ", ".join(f"{layers}: {ratio:.3f}" for layers, ratio in one["ratios_cut"].items())
        ratios = ["{:.3f} ({:.3f} to {:.3f})".format(*one[side]) for side in ("predicted", "measured")]
        times = [", ".join(f"{1e3 * value:.1f}" for value in one[f"{side}_s"]) for side in ("predicted", "measured")]
        spread = ", ".join(f"{value:.0%}" for value in one["spread"])
        lines.append(
            f"| {one['regime']} | {cut} | {ratios[0]} | {ratios[1]} | {one['ceiling']:.3f} | {times[0]} | {times[1]} "
            f"| {spread} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
