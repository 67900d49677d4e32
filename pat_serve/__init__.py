"""Prune while fine-tuning, export a standard checkpoint, serve it with vLLM, verify what was gained and kept."""

from pat_serve.version import __version__

__all__ = ["__version__"]
