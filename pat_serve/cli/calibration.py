"""pat-export --calibration: the data that four-bit weights are rounded for."""

from __future__ import annotations

from pathlib import Path

from pat_serve.export.formats.calibrated import CALIBRATION_TOKENS, PROMPT_TOKENS, Calibration

_FLAG = "--calibration"
_INSTRUCTIONS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
# More than these are not encoded; they have CALIBRATION_TOKENS unless they are very short.
_ROWS = 1024


def calibration_of(given: str | None, ckpt: Path) -> Calibration:
    """Make the calibration of an export.

    Args:
        given: a file of instructions, any other file for its text, or a hub id of instructions; None takes the data
            that the run was trained on.
        ckpt: the run.

    Raises:
        UsageError: the run has no recipe to take the data from.
    """
    from pat_serve.run.folder import RECIPE_FILE
    from pat_serve.training.recipe_file import read_recipe

    recipe = {} if given else read_recipe(ckpt / RECIPE_FILE)
    source, split = given or str(recipe.get("data", "")), str(recipe.get("data_split", "train"))

    def prompts(base: Path) -> list[list[int]]:
        return _prompts(source, split, base)

    return Calibration(source=Path(source).name if Path(source).exists() else source, prompts=prompts)


def _prompts(source: str, split: str, base: Path) -> list[list[int]]:
    """Token ids of rows from all over the source, or of a text's windows."""
    from pat_serve.evaluation.text import text_from_file
    from pat_serve.training.data import encode_rows, load_rows, load_tokenizer

    tokenizer, path = load_tokenizer(base), Path(source)
    if path.is_file() and path.suffix.lower() not in _INSTRUCTIONS:
        ids = tokenizer(text_from_file(path), add_special_tokens=True)["input_ids"][:CALIBRATION_TOKENS]
        return [ids[start : start + PROMPT_TOKENS] for start in range(0, len(ids), PROMPT_TOKENS)]
    rows = load_rows(source, split, tokenizer, flag=_FLAG)
    examples, _ = encode_rows(rows[:: max(1, len(rows) // _ROWS)][:_ROWS], tokenizer, PROMPT_TOKENS)
    return [example["input_ids"] for example in examples]
