"""The inputs of a run: recorded at its first step, compared when it is resumed."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pydantic

from pat_serve.cut.axes import HIDDEN
from pat_serve.errors import ChangedInput
from pat_serve.files.atomic import write_text
from pat_serve.run.folder import INPUTS_FILE
from pat_serve.run.plan import BaseReference

# Examples are hashed as token ids, which follow from more than the rows.
_EXAMPLES_FIX = (
    "Restore the data, the tokenizer and the version of pat-serve that the run began with, or start a new run."
)
_WAYS_OUT = {"examples_sha256": _EXAMPLES_FIX, "held_out_sha256": _EXAMPLES_FIX}


class RunInputs(pydantic.BaseModel):
    """Everything outside the recipe that decides what a run computes.

    Attributes:
        base: the base model, with the hash of every file.
        examples_sha256: of the token ids and labels, in order, as the tokenizer made them; for a stream, its
            name and the hash of its first 1,000 examples.
        held_out_sha256: likewise of the rows that it is evaluated on.
        total_steps: optimizer steps, which the schedules are stretched over.
        shape: counts to end with, by axis; the stream's always among them.
        dtype: of the frozen base weights, which `auto` chose by the machine.
        narrow: the model is cut down to the kept channels before its first step, so checkpoints are as narrow.
        keeps_tie: a rotation leaves the head tied to the embedding.
        day: that the chat template wrote into the rows, as ISO 8601 has it; None where it writes none.
        processes: that train together; with the recipe's batch size they make the batch of an optimizer step.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    base: BaseReference
    examples_sha256: str
    held_out_sha256: str | None = None
    total_steps: int
    shape: dict[str, int]
    dtype: str
    narrow: bool = False
    keeps_tie: bool = False
    day: str | None = None
    processes: int = 1

    @pydantic.model_validator(mode="before")
    @classmethod
    def _of_an_earlier_version(cls, record: object) -> object:
        """Read the record of an earlier version, whose runs cut the stream alone."""
        if isinstance(record, dict) and "target_width" in record:
            record = {**record, "shape": {HIDDEN: record["target_width"]}}
            del record["target_width"]
        return record

    def save(self, run: Path) -> None:
        """Write inputs.json, complete or not at all."""
        write_text(run / INPUTS_FILE, self.model_dump_json(indent=2) + "\n")

    def require_unchanged(self, run: Path) -> None:
        """Compare with the run's record; a run that stopped before it had one has trained nothing.

        Raises:
            ChangedInput: something differs.
        """
        path = run / INPUTS_FILE
        if not path.is_file():
            return
        before = RunInputs.model_validate_json(path.read_text(encoding="utf-8"))
        for name in type(self).model_fields:
            old, new = getattr(before, name), getattr(self, name)
            if old != new:
                raise ChangedInput(
                    f"{run}: {name}",
                    expected=f"what the run began with ({_short(old)})",
                    found=_short(new),
                    fix=_WAYS_OUT.get(name, "Restore it, or start a new run."),
                )


def day_of(run: Path) -> date:
    """The day that a run's rows have; today, where it has recorded none."""
    path = run / INPUTS_FILE
    day = RunInputs.model_validate_json(path.read_text(encoding="utf-8")).day if path.is_file() else None
    return date.fromisoformat(day) if day else date.today()


def _short(value: object) -> str:
    if isinstance(value, BaseReference):
        hashes = ", ".join(f"{name} {digest[:12]}" for name, digest in value.sha256.items())
        return f"{value.source} with {hashes}"
    return str(value)[:40]
