"""Provenance (pat_export.json) and the model card (README.md), which travel with the weights."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any

import yaml

from pat_serve.export.formats.quality import QuantizationQuality
from pat_serve.export.formats.schemes import SCHEMES, Scheme
from pat_serve.export.parity.comparison import Parity
from pat_serve.export.record.shape import changed_sizes, recorded_shape, told_shape
from pat_serve.export.rewrite.contents import architecture, shapes_of
from pat_serve.export.run.reader import Run
from pat_serve.version import __version__

_NOTHING_MEASURED = (
    "Not measured with this checkpoint. `pat-bench speedup --baseline BASE --candidate THIS` checks the speed, "
    "`pat-eval BASE THIS --data heldout.jsonl` the quality."
)
_PAT = " (PAT: Pruning-Aware Tuning, arXiv 2408.14721)"
# Recipe entries that tell how the model was tuned; the whole recipe is in pat_export.json.
_RECIPE = (
    "method",
    "ratio",
    "rotate",
    "gate",
    "max_steps",
    "epochs",
    "batch_size",
    "learning_rate",
    "train",
    "lora_rank",
    "distillation_weight",
    "train_norms",
    "lr_scale",
    "data",
)


def provenance(
    run: Run,
    dtype: str,
    parity: Parity | None,
    scheme: Scheme | None = None,
    quality: QuantizationQuality | None = None,
    fitness: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Content of pat_export.json: where the model comes from, what was cut, and how it was checked."""
    cuts, shape = run.plan.cuts, recorded_shape(run.base.sizes, run.plan.cuts.sizes(run.base.sizes))
    base_parameters = sum(prod(entry.shape) for entry in run.base.tensors.values())
    return {
        "version": 2,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "method": run.plan.method,
        "base": run.plan.base.model_dump() | {"source": _public_name(run.plan.base.source)},
        "license": base_license(run.base.folder),
        "architecture": architecture(run),
        "hidden_size": shape["hidden_size"],
        "shape": shape,
        "cuts": {line: cut.kept.tolist() for line, cut in cuts.items()},
        "parameters": {
            "base": base_parameters,
            "exported": sum(prod(shape) for shape in shapes_of(run).values()),
        },
        "dtype": dtype,
        "recipe": run.recipe
        | {key: _public_name(str(run.recipe[key])) for key in ("model", "data") if key in run.recipe},
        "parity": parity.as_dict() if parity else None,
        "quantization": _quantization(scheme, quality) if scheme else None,
        "fits": fitness,
        "versions": {"pat-serve": __version__, **_versions("torch", "transformers", "peft", "safetensors")},
    }


def _quantization(scheme: Scheme, quality: QuantizationQuality | None) -> dict[str, Any]:
    groups = {} if scheme.group_size is None else {"group_size": scheme.group_size}
    return {"scheme": scheme.name, "format": scheme.format, **groups, "quality": quality and quality.as_dict()}


def base_license(folder: Path) -> dict[str, str]:
    """`license`, `license_name` and `license_link` of the base's own model card, as far as it has them."""
    from huggingface_hub import ModelCard

    path = folder / "README.md"
    if not path.is_file():
        return {}
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return {}  # another author's README: no reason to refuse the export
    return {
        key: value
        for key in ("license", "license_name", "license_link")
        if isinstance(value := data.get(key), str) and value
    }


def model_card(record: dict[str, Any], measured: str | None = None) -> str:
    """README.md, every figure of it from the provenance record.

    Args:
        record: content of pat_export.json.
        measured: speed and quality tables (`card_sections.py`), where they were measured.
    """
    from huggingface_hub import ModelCard, ModelCardData

    source = str(record["base"]["source"])
    scheme = SCHEMES[record["quantization"]["scheme"]] if record["quantization"] else None
    data_source = str(record["recipe"].get("data", ""))
    data = ModelCardData(
        # The hub links a base or a data set by its id; a local folder's name means nothing there.
        base_model=source if "/" in source else None,
        base_model_relation="finetune" if "/" in source else None,
        datasets=[data_source] if data_source.count("/") == 1 else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[
            "pruning",
            "sparsity" if record.get("sparsity") else "structured-pruning",
            "pat-serve",
            *(["compressed-tensors", scheme.name] if scheme else []),
        ],
        **record["license"],
    )
    name = source.rsplit("/", 1)[-1]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(record, name, scheme, measured or _NOTHING_MEASURED)}"))


def _text(record: dict[str, Any], name: str, scheme: Scheme | None, measured: str) -> str:
    base, exported = record["parameters"]["base"], record["parameters"]["exported"]
    dtype = record["dtype"]
    rows = "".join(f"| {name} | {of['base']} | {of['exported']} |\n" for name, of in changed_sizes(record).items())
    rounded = f"{dtype}, rounded by chance" if record.get("rounding") == "stochastic" else dtype
    stored = f"{scheme.name} ({scheme.label}, compressed-tensors), everything else {dtype}" if scheme else rounded
    told = {key: record["recipe"].get(key) for key in _RECIPE} | (record["recipe"].get("settings") or {})
    recipe = "\n".join(f"- {key}: {value}" for key, value in told.items() if value)
    runs = f" It runs in {scheme.runs_on}." if scheme else ""
    needs = "\nTransformers needs `pip install compressed-tensors` to read it.\n" if scheme else ""
    return f"""# {name}, {told_shape(record)}

A standard `{record["architecture"]}` checkpoint: stock transformers and stock vLLM load it.{runs}

| | base | this model |
|---|---|---|
{rows}| parameters | {base:,} | {exported:,} ({exported / base:.1%}) |
| weights | | {stored} |
| tensor-parallel degrees | | {_degrees(record)} |

## How it was made

Made with method `{record["method"]}`{_PAT if record["method"] == "pat" else ""} and exported by pat-serve
{record["versions"]["pat-serve"]}. `pat_export.json` has what was kept, the whole recipe and the hashes of the base.
{_zeros_note(record)}{_gguf_note(record)}
{recipe}

## Checked

{_checked(record)}

## Measured

{measured}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
{needs}
```bash
pat-serve --model path/to/this/folder   # or: vllm serve path/to/this/folder
```
{_license_note(record)}"""


def _checked(record: dict[str, Any]) -> str:
    parity, quantization = record["parity"], record["quantization"]
    if parity is None:
        return "Parity with the trained model was **not checked** (`--no-parity`)."
    checked = (
        f"Against the trained model on {parity['prompts']} prompts ({parity['positions']} positions): "
        f"largest logit difference {parity['max_abs_over_std']:.2e} of the logits' standard deviation, mean KL "
        f"{parity['mean_kl_nats']:.2e} nats, {parity['top1_agreement']:.2%} equal greedy tokens."
    )
    checked += "".join(f" {note}" for note in parity["notes"])
    if quantization is None:
        return checked
    quality = QuantizationQuality(**{key: value for key, value in quantization["quality"].items() if key != "passed"})
    return (
        f"{checked} These are the figures of the exact float32 weights.\n\n"
        f"Quantised to {quality.scheme}{_calibrated(quantization)}, against the same weights in float32: "
        f"{quality.describe()}."
    )


def _zeros_note(record: dict[str, Any]) -> str:
    sparsity = record.get("sparsity")
    if not sparsity:
        return ""
    return (
        f"\n{sparsity['zeros'] / sparsity['numbers']:.1%} of the numbers in {sparsity['modules']} linears are zero "
        f"(pattern {sparsity['pattern']}). They are stored and computed like any other number: vLLM has no kernels for "
        "them, and this model is neither smaller nor faster than its base.\n"
    )


def _calibrated(quantization: dict[str, Any]) -> str:
    used = quantization.get("calibration")
    if not used:
        return ""
    return f" in groups of {quantization['group_size']} by GPTQ ({used['tokens']} tokens of {used['source']})"


def _gguf_note(record: dict[str, Any]) -> str:
    sha256 = record["base"].get("gguf_sha256")
    return f"\nBase: {record['base']['source']}, SHA-256 `{sha256}`.\n" if sha256 else ""


def _degrees(record: dict[str, Any]) -> str:
    return ", ".join(map(str, record["fits"]["tensor_parallel"])) if record.get("fits") else "not checked"


def _license_note(record: dict[str, Any]) -> str:
    if record["license"]:
        return ""
    return "\nThe base's card names no license; whoever publishes this model adds the base's.\n"


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
