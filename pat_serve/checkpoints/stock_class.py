"""Build the stock class of a config.json, and check that the weight files hold exactly its tensors.

transformers and vLLM fill in tensors that a checkpoint lacks and leave out tensors that their class does not have, with
a warning at best. The loaded model is then not the model of the files, and an export is made from the files. So the
class is built without weights, from the config alone, and compared with the headers before a weight is read.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from pat_serve.checkpoints.config_check import CONFIG, CORRECT, bad_config, check_config
from pat_serve.checkpoints.locate import check_no_adapter, read_config
from pat_serve.checkpoints.shards import TensorEntry, broken, read_header
from pat_serve.errors import BrokenCheckpoint
from pat_serve.families.architectures import EMBEDDING, FAMILIES, HEAD
from pat_serve.families.family import Family

_COMPARED_BYTES = 1 << 24
_MESSAGE_CHARS = 240


def meta_model(config: Any) -> Any:
    """Make a causal language model without weights; buffers, such as the rotary frequencies, are real."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config).eval()


def check_stock_folder(folder: Path, shards: Iterable[Path]) -> None:
    """Check a folder that a runtime will load by itself, if its family is in the table.

    Args:
        folder: a model folder; if the model is quantized, only its config is checked.
        shards: its weight files, as the runtime chooses them.

    Raises:
        BrokenCheckpoint, UnsupportedModel: the runtimes would compute another model than the folder holds.
    """
    config = read_config(folder)
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        return
    check_no_adapter(folder)
    check_config(config, family, folder)
    if config.get("quantization_config"):
        stock_model(config, folder)
        return
    tensors: dict[str, TensorEntry] = {}
    for shard in shards:
        for name, entry in read_header(shard).items():
            if name in tensors:
                raise broken(shard, f"the tensor {name} once", f"another one in {tensors[name].shard.name}")
            if not family.ignores(name):
                tensors[name] = entry
    check_stock_tensors(stock_shapes(config, tensors, folder), config, family, tensors, folder)


def stock_model(config: Mapping[str, Any], folder: Path) -> Any:
    """Build the class of a config.json without weights, and run it once without numbers.

    Raises:
        BrokenCheckpoint: the class refuses the config, or cannot compute with it.
    """
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path = folder / CONFIG
    for name in ("hidden_act", "hidden_activation"):
        if config.get(name) is not None and config[name] not in list(ACT2FN):
            raise bad_config(path, f"{name} by a name that transformers knows", config[name])
    try:
        built = CONFIG_MAPPING[str(config["model_type"])].from_dict(copy.deepcopy(dict(config)))
        for name, value in (getattr(built, "rope_parameters", None) or {}).items():
            if name == "rope_type" and value not in ("default", *ROPE_INIT_FUNCTIONS):
                raise bad_config(path, f"a rope_type of default, {', '.join(ROPE_INIT_FUNCTIONS)}", value)
            if name not in ("rope_type", "type") and isinstance(value, str):
                raise bad_config(path, f"{name} of the rope settings as a number", value)
        model = meta_model(built)
        _check_rope(model, path)
        _run_once(model)
    except BrokenCheckpoint:
        raise
    # The classes raise half a dozen types, among them those of Python's own operators.
    except Exception as error:
        expected = f"settings that the class of model_type {config['model_type']} takes"
        raise broken(path, expected, _told(error), fix=CORRECT) from error
    return model.eval()


def stock_shapes(
    config: Mapping[str, Any], tensors: Mapping[str, TensorEntry], folder: Path
) -> dict[str, tuple[int, ...]]:
    """List every tensor of the config's class, with its shape.

    Args:
        config: the parsed config.json, checked by `check_config`.
        tensors: of the weight files.
        folder: of the config.json.

    Raises:
        BrokenCheckpoint: the class refuses the config, or the files have too few tensors for its layers.
    """
    if config["num_hidden_layers"] > len(tensors):
        # This check comes before the layers are built: a billion of them would take all memory.
        expected = f"the tensors of {config['num_hidden_layers']} layers, as config.json says"
        raise broken(folder, expected, f"{len(tensors)} tensors")
    return {name: tuple(value.shape) for name, value in stock_model(config, folder).state_dict().items()}


def check_stock_tensors(
    wanted: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
    family: Family,
    tensors: Mapping[str, TensorEntry],
    folder: Path,
) -> None:
    """Check that the weight files hold the tensors of the config's class, no more and no less.

    Args:
        wanted: from `stock_shapes`.
        config: the parsed config.json.
        family: of the config.
        tensors: of the weight files, from their headers; weights are read only where a tied head is stored too.
        folder: of the config.json.

    Raises:
        BrokenCheckpoint: they hold others.
    """
    head, embedding = f"{HEAD}.weight", f"{EMBEDDING}.weight"
    tied = bool(config.get("tie_word_embeddings", family.defaults.get("tie_word_embeddings")))
    if extra := [name for name in tensors if name not in wanted]:
        raise broken(
            folder / CONFIG,
            f"settings with which {family.architecture} has all tensors of the weight files",
            f"none for {extra[0]}{_more(extra)}, which would be left out",
            fix=_biases(extra, config) or "Correct config.json, or delete what is not the model's from the files.",
        )
    if missing := [name for name in wanted if name not in tensors and not (tied and name == head)]:
        raise broken(
            folder,
            f"all tensors that {family.architecture} has by config.json",
            f"no {missing[0]}{_more(missing)}, which would be made up",
            fix=_biases(missing, config) or "Correct config.json, or copy the model again.",
        )
    for name, shape in wanted.items():
        if name in tensors and tensors[name].shape != shape:
            raise broken(tensors[name].shard, f"{name} of shape {shape}, by config.json", str(tensors[name].shape))
    if tied and head in tensors and not _equal(tensors[head], tensors[embedding]):
        raise broken(
            folder / CONFIG,
            f"tie_word_embeddings: true only where {head} is {embedding}",
            "a head of its own",
            fix='Write "tie_word_embeddings": false if the head is the model\'s; else delete it from the weight files.',
        )


def _check_rope(model: Any, path: Path) -> None:
    """Check that frequencies are above zero: no class checks the settings behind them, and others make logits NaN."""
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and not bool((torch.isfinite(buffer) & (buffer > 0)).all()):
            found = "others; look at rope_theta, rope_scaling and rope_parameters"
            raise broken(path, "rope settings that give frequencies above zero", found, fix=CORRECT)


def _run_once(model: Any) -> None:
    """Forward a token through shapes alone: sizes that do not fit each other pass every class's own checks.

    Training mode catches an impossible dropout. The cache keeps transformers from looking into the positions.
    """
    token_BT = torch.zeros(1, 1, dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            logits = model.to("meta").train()(token_BT, use_cache=True).logits
    except RuntimeError as error:
        # A model that asks for a number (dynamic rope, for the length so far) can only be run up to there.
        if "meta tensors" not in str(error):
            raise
    else:
        assert logits.shape[-1] == model.config.vocab_size


def _biases(names: list[str], config: Mapping[str, Any]) -> str | None:
    """Tell how to correct a config whose class has other biases than the files."""
    if not all(name.endswith(".bias") for name in names):
        return None
    flags = sorted({"attention_bias" if ".self_attn." in name else "mlp_bias" for name in names})
    told = " and ".join(f"{flag} (now {str(bool(config.get(flag))).lower()})" for flag in flags)
    return f"Correct {told} in config.json, or copy the model again."


def _equal(one: TensorEntry, other: TensorEntry) -> bool:
    """Compare the bytes of two tensors in runs of rows, up to the first difference.

    This uses no threads of torch: vLLM may fork this process, and the child of a process that had them can hang.
    """
    if one.dtype != other.dtype:
        return False
    rows = max(1, _COMPARED_BYTES // max(1, one.size_bytes // one.shape[0]))
    for start in range(0, one.shape[0], rows):
        stop = min(one.shape[0], start + rows)
        pair = [entry.read(start, stop).view(torch.uint8).numpy().tobytes() for entry in (one, other)]
        if pair[0] != pair[1]:
            return False
    return True


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} others" if len(names) > 1 else ""


def _told(error: Exception) -> str:
    """Put a config class's own message into one line, without the frame of its validators."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    framed = "alidation error for" in lines[0] and len(lines) > 1
    told = lines[1].partition(": ")[2] if framed else lines[0]
    return told.split(" Errors: ")[0].rstrip(".")[:_MESSAGE_CHARS]
