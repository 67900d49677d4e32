"""An export's speed and memory beside `cp -r` of the same folder, at Llama-2-7B's shapes.

Example: python -m benchmarks.export_speed --folder /tmp/export-speed --rounds 3 --json export_speed.json

Writes a sharded bfloat16 checkpoint (13.5 GB) and a run with LoRA and HSM folds for it, then takes turns: copy the
folder, export the run without the parity gate, and again in the other order. Before each turn the base is dropped from
the page cache, so that both read the disk. The export forces its files to the disk before it names them, `cp` does not;
so the copy is timed with a `sync` behind it too. The bars are at most twice the copy's time and a peak of 1.5 GB plus
twice the largest tensor. `--layers 2` makes a small one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

TIME_BAR = 2.0
MEMORY_BAR_BYTES = 1_500_000_000
HIDDEN, FFN, HEADS, VOCAB = 4096, 11008, 32, 32000
SHARD_BYTES = 5_000_000_000
EXPORT = "from pat_serve.cli.export import main; main()"


def make(folder: Path, options: argparse.Namespace) -> None:
    """Write base/ and run/, in a process of its own, so that the measuring process stays small."""
    import torch
    import yaml
    from safetensors.torch import save_file

    from pat_serve.checkpoints.checkpoint import open_checkpoint
    from pat_serve.checkpoints.shard_layout import index_document
    from pat_serve.cut.cuts import AxisCut, Cuts
    from pat_serve.cut.hybrid import HybridFold
    from pat_serve.export.files.writer import WeightFiles
    from pat_serve.families.architectures import LLAMA
    from pat_serve.run.plan import PruningPlan, file_sha256
    from pat_serve.shapes.sizes import ModelSizes

    base, run = folder / "base", folder / "run"
    base.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": HIDDEN,
        "intermediate_size": FFN, "num_hidden_layers": options.layers, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS, "vocab_size": VOCAB, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config, indent=2))
    sizes = ModelSizes.of(config, LLAMA)
    shapes = {f"{module}.weight": spec.shape("weight", sizes) for module, spec, _ in LLAMA.modules(options.layers)}
    torch.manual_seed(0)
    # The same random rows are cut from another place each time. Their values do not change the time.
    pool = (0.02 * torch.randn(1 << 24)).bfloat16()
    with WeightFiles(base, shapes, torch.bfloat16, SHARD_BYTES) as files:
        for name, shape in shapes.items():
            left, done_bytes = torch.Size(shape).numel(), 0
            while left:
                start = int(torch.randint(len(pool) // 2, (1,)))
                block = pool[start : start + min(left, len(pool) // 2)]
                done_bytes += files.write(name, done_bytes, block)
                left -= len(block)
    if len(files.shards) > 1:
        index = index_document(files.shards, shapes, torch.bfloat16)
        (base / "model.safetensors.index.json").write_text(json.dumps(index))

    checkpoint = open_checkpoint(str(base))
    adapter = run / "adapter"
    adapter.mkdir(parents=True)
    update = {}
    for module, spec, _ in LLAMA.modules(options.layers):
        if spec.lora:
            out, inputs = shapes[f"{module}.weight"]
            update[f"base_model.model.{module}.lora_A.weight"] = torch.randn(options.lora_rank, inputs) / inputs**0.5
            update[f"base_model.model.{module}.lora_B.weight"] = 0.01 * torch.randn(out, options.lora_rank)
    save_file(update, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": options.lora_rank, "lora_alpha": 4})
    )
    (run / "recipe.yaml").write_text(yaml.safe_dump({"method": "pat"}))
    folds = {
        site: HybridFold(
            l0_RD=torch.randn(options.hio_rank, HIDDEN) / HIDDEN**0.5,
            l1_DR=0.01 * torch.randn(HIDDEN, options.hio_rank),
            scale_D=1 + 0.05 * torch.randn(HIDDEN),
        )
        for site in LLAMA.residual_writers(options.layers)
    }
    PruningPlan(
        method="pat",
        base=checkpoint.reference(),
        cuts=Cuts({"hidden": AxisCut(width=HIDDEN, kept=torch.randperm(HIDDEN)[: HIDDEN * 3 // 4].sort().values)}),
        folds=folds,
        rotation=torch.linalg.qr(torch.randn(HIDDEN, HIDDEN)).Q.contiguous() if options.rotate else None,
        adapter={path.name: file_sha256(path) for path in adapter.iterdir()},
    ).save(run)


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def timed(command: list[str]) -> tuple[float, float, int]:
    """Wall time, time on the cores and peak memory (bytes) of a command.

    The kernel counts what a child had in memory before its exec too, so this process must stay small.
    """
    begin = time.perf_counter()
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    wall_s = time.perf_counter() - begin
    if status:
        raise SystemExit(f"{command[0]} failed with status {status}")
    return wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def copy_turn(folder: Path) -> dict[str, float]:
    """Copy the base and throw the copy away."""
    forget(folder / "base")
    wall_s, cpu_s, _ = timed(["cp", "-r", str(folder / "base"), str(folder / "copy")])
    begin = time.perf_counter()
    os.sync()
    sync_s = time.perf_counter() - begin
    shutil.rmtree(folder / "copy")
    return {"copy_s": wall_s, "copy_and_sync_s": wall_s + sync_s, "copy_cpu_s": cpu_s}


def export_turn(folder: Path, arguments: list[str]) -> dict[str, float]:
    """Export the run and throw the result away."""
    forget(folder)
    out = folder / "pruned"
    command = [sys.executable, "-c", EXPORT, "--ckpt", str(folder / "run"), "--out", str(out), "--no-parity"]
    wall_s, cpu_s, peak_bytes = timed([*command, *arguments])
    written = sum(path.stat().st_size for path in out.iterdir())
    shutil.rmtree(out)
    return {"export_s": wall_s, "export_cpu_s": cpu_s, "peak_bytes": peak_bytes, "written_bytes": written}


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure export and copy in turns, and sum the turns up."""
    rounds = []
    for number in range(options.rounds):
        turns = [lambda: copy_turn(folder), lambda: export_turn(folder, options.export)]
        figures: dict[str, float] = {"load": os.getloadavg()[0]}
        for turn in turns if number % 2 == 0 else turns[::-1]:
            figures |= turn()
        rounds.append(figures)
        print(json.dumps(figures), flush=True)
    base_bytes = sum(path.stat().st_size for path in (folder / "base").iterdir())
    largest_bytes = 2 * max(VOCAB * HIDDEN, FFN * HIDDEN)
    median = {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}
    ratio = statistics.median(figures["export_s"] / figures["copy_s"] for figures in rounds)
    peak_bytes = max(figures["peak_bytes"] for figures in rounds)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {_memory_gb():.0f} GB",
        "layers": options.layers,
        "lora_rank": options.lora_rank,
        "hio_rank": options.hio_rank,
        "rotated": options.rotate,
        "base_bytes": base_bytes,
        "rounds": rounds,
        "median": median,
        "export_over_copy": ratio,
        "export_over_copy_and_sync": statistics.median(
            figures["export_s"] / figures["copy_and_sync_s"] for figures in rounds
        ),
        "time_bar": TIME_BAR,
        "time_met": ratio <= TIME_BAR,
        "peak_bytes": peak_bytes,
        "peak_bar_bytes": MEMORY_BAR_BYTES + 2 * largest_bytes,
        "peak_met": peak_bytes <= MEMORY_BAR_BYTES + 2 * largest_bytes,
    }


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def main() -> None:
    """Measure exports and copies in turns, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("export-speed"), help="where to work; deleted at the end")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--lora-rank", type=int, default=20)
    parser.add_argument("--hio-rank", type=int, default=200)
    parser.add_argument("--rotate", action="store_true", help="a plan with a rotation: a product of 4096 per weight")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="leave base/ and run/ there, and use them when they are")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("export", nargs="*", help="more arguments for pat-export, after --")
    options = parser.parse_args()
    folder: Path = options.folder.absolute()
    if options.make:
        make(folder, options)
        return
    if not (folder / "run/plan.json").is_file():
        needed = 2 * 2 * (2 * VOCAB * HIDDEN + options.layers * (4 * HIDDEN**2 + 3 * HIDDEN * FFN)) + 2_000_000_000
        folder.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(folder).free) < needed:
            raise SystemExit(f"{folder}: needs {needed / 1e9:.1f} GB, has {free / 1e9:.1f}; take fewer --layers")
        subprocess.run([sys.executable, "-m", "benchmarks.export_speed", "--make", *sys.argv[1:]], check=True)
    try:
        figures = measure(folder, options)
    finally:
        if not options.keep:
            shutil.rmtree(folder)
    median = figures["median"]
    print(
        f"{figures['machine']}, {figures['date']}: base {figures['base_bytes'] / 1e9:.2f} GB; cp -r "
        f"{median['copy_s']:.1f} s ({median['copy_and_sync_s']:.1f} with sync, {median['copy_cpu_s']:.1f} of a core), "
        f"export {median['export_s']:.1f} s ({median['export_cpu_s']:.1f} of a core), "
        f"ratio {figures['export_over_copy']:.2f} (bar {TIME_BAR}; {figures['export_over_copy_and_sync']:.2f} with "
        f"sync), peak {figures['peak_bytes'] / 1e9:.2f} GB (bar {figures['peak_bar_bytes'] / 1e9:.2f} GB)"
    )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    raise SystemExit(not (figures["time_met"] and figures["peak_met"]))


if __name__ == "__main__":
    main()
