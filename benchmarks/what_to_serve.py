"""Compare forms of a model to serve: speed against the dense one in its own dtype, size and perplexity of each.

    python -m benchmarks.what_to_serve speed DENSE NAME=FOLDER ... --out forms.jsonl
    python -m benchmarks.what_to_serve quality NAME=FOLDER ... --text wiki.test.raw --out forms.jsonl
    python -m benchmarks.what_to_serve table forms.jsonl

Speed is `pat-bench speedup --grid`: each form takes turns with the dense model, so that a drift of the machine does not
favour one of them. A form that was measured before is left out. The dense model against itself shows the noise.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.cut_quality import perplexity, windows_of

PHASES = ("prefill", "decode")


def speed(dense: str, folder: str, grid: str, rounds: int) -> dict[str, Any]:
    """One form against the dense model, in both phases of every cell."""
    from pat_serve.server.bench.speedup.check import check_speedup
    from pat_serve.server.bench.speedup.grid import parse_grid
    from pat_serve.server.bench.speedup.settings import SpeedupSettings

    settings = SpeedupSettings(claim=1.0, grid=parse_grid(grid, "--grid"), rounds=rounds, roofline=False)
    result = check_speedup(dense, folder, settings, progress=lambda *_: None)
    return {
        "date": result.date,
        "machine": result.machine,
        "dtype": result.dtype,
        "rounds": rounds,
        "regimes": [
            {
                "cell": one.batches,
                "phase": one.regime.value,
                "dense_s": one.baseline.median,
                "form_s": one.candidate.median,
                "ratio": one.ratio.median,
                "low": one.ratio.low,
                "high": one.ratio.high,
                "spread": one.noise.spread,
                "verdict": one.verdict.value,
            }
            for one in result.regimes
        ],
    }


def quality(folder: str, text: Path, length: int, most: int) -> dict[str, Any]:
    """Size on the disk, and perplexity on a text in windows, as transformers computes it in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    windows = windows_of(text, AutoTokenizer.from_pretrained(folder), length, most)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {
        "text": text.name,
        "windows": len(windows),
        "window_tokens": length,
        "perplexity": perplexity(model, windows),
        "weight_bytes": sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")),
    }


def table(lines: list[dict[str, Any]]) -> str:
    """The forms as a Markdown table: times as fast as the dense model, with 95 % intervals."""
    speeds = {line["name"]: line for line in lines if line["kind"] == "speed"}
    qualities = {line["name"]: line for line in lines if line["kind"] == "quality"}
    cells = list(dict.fromkeys(one["cell"] for line in speeds.values() for one in line["regimes"]))
    columns = [(phase, cell) for cell in cells for phase in PHASES]
    heads = ["form", "weights MiB", "perplexity", *(f"{phase} {cell}" for phase, cell in columns)]
    rows = [heads, ["---"] * len(heads)]
    for name in dict.fromkeys([*qualities, *speeds]):
        kept = qualities.get(name)
        row = [name, f"{kept['weight_bytes'] / 2**20:.0f}" if kept else "", f"{kept['perplexity']:.2f}" if kept else ""]
        found = {(one["phase"], one["cell"]): one for one in speeds[name]["regimes"]} if name in speeds else {}
        for column in columns:
            one = found.get(column)
            row.append(f"{one['ratio']:.2f}x ({one['low']:.2f} to {one['high']:.2f})" if one else "")
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Parse the flags and append the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    speeds, qualities = commands.add_parser("speed"), commands.add_parser("quality")
    shown = commands.add_parser("table")
    shown.add_argument("out", type=Path)
    speeds.add_argument("dense")
    speeds.add_argument("--grid", default="1x128,8x1024")
    speeds.add_argument("--rounds", type=int, default=5)
    qualities.add_argument("--text", type=Path, required=True)
    qualities.add_argument("--window-tokens", type=int, default=1024)
    qualities.add_argument("--windows", type=int, default=16)
    for command in (speeds, qualities):
        command.add_argument("forms", nargs="+", metavar="NAME=FOLDER")
        command.add_argument("--out", type=Path, required=True)
    flags = parser.parse_args()
    known = flags.out.read_text(encoding="utf-8").splitlines() if flags.out.exists() else []
    lines = [json.loads(line) for line in known]
    if flags.command == "table":
        print(table(lines))
        return
    done = {(line["kind"], line["name"]) for line in lines}
    for form in flags.forms:
        name, _, folder = form.partition("=")
        if (flags.command, name) in done:
            continue
        if flags.command == "speed":
            found = speed(flags.dense, folder, flags.grid, flags.rounds)
        else:
            found = quality(folder, flags.text, flags.window_tokens, flags.windows)
        with flags.out.open("a", encoding="utf-8") as out:
            out.write(json.dumps({"kind": flags.command, "name": name} | found) + "\n")
        print(name, flush=True)


if __name__ == "__main__":
    main()
