"""The shape by which a share of all parameters is best cut: candidates are cut and measured, the best ones tuned."""
