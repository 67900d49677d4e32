"""ATP: which FFN channels and key-value groups stay is learnt while LoRA is trained (arXiv 2412.14426)."""
