"""Functions that this folder's YAML files name. lm-eval imports this file by its path."""

from pat_serve.evaluation.paper14.datasets import dataset
from pat_serve.evaluation.paper14.scoring import process_results

__all__ = ["dataset", "process_results"]
