"""Stage 1: fine-tune a base model while its hidden dimension is pruned; writes run/ with a plan.

For a notebook: `apply_pat`, `PatCallback`, `PatConfig` and `save_run` (see api.py), which load torch when first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pat_serve.training.api import PatCallback, PatConfig, apply_pat, save_run

__all__ = ["PatCallback", "PatConfig", "apply_pat", "save_run"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from pat_serve.training import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
