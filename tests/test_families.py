"""Every model family from its base to its export: trained, rewritten, loaded by stock transformers, compared."""

from __future__ import annotations

import pytest

from pat_serve.architectures import FAMILIES, HIDDEN


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_reader_names_the_norm_that_feeds_it(model_type: str):
    family = FAMILIES[model_type]
    norms = {spec.module for spec in family.tensors if spec.hidden_norm}
    for spec in family.tensors:
        reads = len(spec.axes) == 2 and spec.axes[1] == HIDDEN and not spec.writes_residual
        assert (spec.norm in norms) if reads else (spec.norm is None), spec.module
    assert {spec.norm for spec in family.tensors} - {None} == norms
