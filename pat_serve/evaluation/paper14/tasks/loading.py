"""What the YAML files of this folder name; lm-eval imports it by its path."""

from pat_serve.evaluation.paper14.datasets import dataset
from pat_serve.evaluation.paper14.scoring import process_results

__all__ = ["dataset", "process_results"]
