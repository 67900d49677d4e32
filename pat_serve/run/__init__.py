"""The folder of a training run: training writes it and export reads it. The plan and the replaced weights lie in it."""
