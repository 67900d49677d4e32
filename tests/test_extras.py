"""What is said where an optional package is missing."""

from __future__ import annotations

import pytest

from pat_serve.errors import MissingExtra
from pat_serve.extras import require


def test_a_package_that_is_there_is_no_obstacle():
    require("json", "bench", wanted_by="--html")


def test_a_missing_one_is_named_with_every_way_out():
    with pytest.raises(MissingExtra) as caught:
        require("no_such_module", "cpu", "cuda", wanted_by="--backend vllm", otherwise="use --backend hf")
    assert str(caught.value) == (
        "--backend vllm: expected the packages of the cpu or cuda extra, found no module no_such_module. "
        'Install them: pip install "pat-serve[cpu]" or "pat-serve[cuda]", or use --backend hf.'
    )
