"""What travels with the weights: provenance (pat_export.json) and the model card (README.md)."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any

from pat_serve.architectures import HIDDEN
from pat_serve.export.narrow import architecture, narrow_shapes
from pat_serve.export.parity import Parity
from pat_serve.export.reader import Run
from pat_serve.version import __version__


def provenance(run: Run, dtype: str, parity: Parity | None) -> dict[str, Any]:
    """Content of pat_export.json: where the model comes from, what was cut, and how it was checked."""
    cut = run.plan.axes[HIDDEN]
    base_parameters = sum(prod(entry.shape) for entry in run.base.tensors.values())
    return {
        "version": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "method": run.plan.method,
        "base": run.plan.base.model_dump() | {"source": _public_name(run.plan.base.source)},
        "architecture": architecture(run),
        "hidden_size": {"base": cut.width, "exported": len(cut.kept)},
        "kept_channels": cut.kept.tolist(),
        "parameters": {
            "base": base_parameters,
            "exported": sum(prod(shape) for shape in narrow_shapes(run).values()),
        },
        "dtype": dtype,
        "recipe": run.recipe
        | {key: _public_name(str(run.recipe[key])) for key in ("model", "data") if key in run.recipe},
        "parity": parity.as_dict() if parity else None,
        "versions": {"pat-serve": __version__, **_versions("torch", "transformers", "peft", "safetensors")},
    }


def model_card(record: dict[str, Any]) -> str:
    """README.md, every figure of it from the provenance record."""
    base, exported = record["parameters"]["base"], record["parameters"]["exported"]
    widths = record["hidden_size"]
    parity = record["parity"]
    if parity is None:
        checked = "Parity with the trained model was **not checked** (`--no-parity`)."
    else:
        checked = (
            f"Checked against the trained model on {parity['prompts']} prompts ({parity['positions']} positions): "
            f"largest logit difference {parity['max_abs_over_std']:.2e} of the logits' standard deviation, mean KL "
            f"{parity['mean_kl_nats']:.2e} nats, {parity['top1_agreement']:.2%} equal greedy tokens."
        )
        checked += "".join(f" {note}" for note in parity["notes"])
    source = record["base"]["source"]
    # The hub links a base by its id; a local folder's name means nothing there.
    base_model = f"base_model: {source}\n" if "/" in source else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{base_model}tags: [pruning, pat-serve]
---

# {source.rsplit("/", 1)[-1]}, hidden size {widths["exported"]}

A standard `{record["architecture"]}` checkpoint: stock transformers and stock vLLM load it.

| | base | this model |
|---|---|---|
| hidden_size | {widths["base"]} | {widths["exported"]} |
| parameters | {base:,} | {exported:,} ({exported / base:.1%}) |

Tuned with method `{record["method"]}` (PAT: Pruning-Aware Tuning, arXiv 2408.14721) and exported in
{record["dtype"]} by pat-serve {record["versions"]["pat-serve"]}. {checked}
`pat_export.json` has the kept channels, the recipe and the hashes of the base.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```

```bash
pat-serve --model path/to/this/folder
```
"""


def _public_name(source: str) -> str:
    """A hub id as it is, a path by its last part: a published checkpoint tells nothing of its author's disk."""
    return Path(source).name if Path(source).exists() or source.startswith(("/", ".", "~")) else source


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
