"""config.json of the exported model."""

from __future__ import annotations

from typing import Any

import torch

from pat_serve.cut.axes import HIDDEN
from pat_serve.cut.config import cut_config
from pat_serve.export.rewrite.contents import unties_head
from pat_serve.export.rewrite.stream_width import exported_eps
from pat_serve.export.run.reader import Run


def exported_config(run: Run, dtype: torch.dtype) -> dict[str, Any]:
    """A stock config with the sizes of what is kept, the eps of its width and an explicit head_dim.

    Args:
        run: the run to export.
        dtype: of the weights.

    Raises:
        IllegalShape: no stock class takes the sizes.
    """
    base, cuts = run.base, run.plan.cuts
    config = cut_config(base.config, base.family, cuts)
    config["rms_norm_eps"] = exported_eps(float(config["rms_norm_eps"]), cuts.line(HIDDEN, None, base.sizes))
    config["tie_word_embeddings"] = base.tied and not unties_head(run)
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    # Names of the base's folder or of its authors' code have no place in a self-contained checkpoint.
    config.pop("_name_or_path", None)
    config.pop("auto_map", None)
    return config
