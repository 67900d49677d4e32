"""Notes beside parity figures: the particulars of a family's export."""

from __future__ import annotations

import torch

from pat_serve.cut.axes import HIDDEN
from pat_serve.export.files.model_files import dtype_name
from pat_serve.export.rewrite.contents import architecture
from pat_serve.export.run.reader import Run


def family_notes(run: Run, model_dtype: torch.dtype) -> tuple[str, ...]:
    """Sentences for the parity report on the particulars of this model's export."""
    base = run.base
    cut, notes = run.plan.cuts.line(HIDDEN, None, base.sizes), []
    if not cut.is_identity and any(spec.head_norm for spec in base.family.tensors):
        notes.append(
            "The norms over q and k heads see the changed rms_norm_eps; q_proj and k_proj carry "
            f"sqrt({cut.width}/{len(cut.kept)}), which undoes it exactly."
        )
    if not cut.is_identity and base.family.scaled_embedding:
        notes.append(
            f"The embedding is rescaled for sqrt(hidden_size) as {dtype_name(model_dtype)} rounds it; "
            "both models were compared with that."
        )
    if architecture(run) != base.family.architecture:
        notes.append(f"A {base.family.architecture} of these sizes is written as the same {architecture(run)}.")
    if run.replaced:
        notes.append(f"The run replaced {len(run.replaced)} of the base's tensors; both models have them.")
    return tuple(notes)
