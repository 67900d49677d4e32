"""Every error that a user can cause, as one tree.

    PatServeError                 exit 1   carries subject, expected, found, fix
    ├── UsageError                exit 2   a flag or argument is wrong
    │   ├── IllegalRatio                   --ratio outside (0, 0.6]
    │   ├── IllegalWidth                   a hidden_size that the architecture or a kernel refuses
    │   ├── IllegalShape                   counts that a base does not have, or that no stock class takes together
    │   ├── OutputExists                   --out is there already and --force was not given
    │   └── PortInUse                      the address is taken
    ├── ModelError                exit 1   a base model or checkpoint folder
    │   ├── MissingModel                   no such folder or hub id, or no config.json or tokenizer in it
    │   ├── UnsupportedModel               an architecture that the table does not cover
    │   ├── BrokenCheckpoint               a truncated shard, a missing tensor, a damaged tokenizer
    │   └── UnknownTensor                  a tensor that the architecture table does not name
    ├── DataError                 exit 1   a dataset or a row of it (with its line number)
    ├── RunError                  exit 1   a training run's folder
    │   ├── UnfinishedRun                  the training has not reached its last step
    │   ├── BrokenPlan                     plan.json or what it names is damaged or does not fit the base
    │   ├── ChangedInput                   base, data or length differ from what the run began with
    │   ├── Diverged                       training came to numbers that are not finite
    │   └── EmptyMask                      the gate closed on every channel
    ├── ParityError               exit 1   the exported model is not the trained one
    ├── QualityError              exit 1   the exported model lost more than was allowed
    │   └── UnclearQuality        exit 3   the data cannot say whether it did
    ├── HubError                  exit 1   the Hugging Face hub was not reached or refused
    ├── EngineError               exit 1   a vLLM engine did not start, or died
    ├── MissingExtra              exit 1   an optional dependency is not installed
    ├── DiskFull                  exit 1   an output that does not fit on the disk that is there
    └── TooLarge                  exit 1   a training that cannot fit into the memory that is there

A message always names the object, what was expected, what was found and the way out.
"""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """A library's exception in one line, its type's name when it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class PatServeError(Exception):
    """Base of all errors that are shown to the user as one readable line.

    Args:
        subject: the object at fault: a path, a flag, a tensor's name, a row.
        expected: what would have been right.
        found: what is there instead.
        fix: the way out, as an imperative sentence.
    """

    exit_code = 1

    def __init__(self, subject: object, *, expected: str, found: str, fix: str) -> None:
        self.subject = str(subject)
        self.expected = expected
        self.found = found
        self.fix = fix
        super().__init__(f"{self.subject}: expected {expected}, found {found}. {fix}")


class UsageError(PatServeError):
    exit_code = 2


def want(flag: str, fine: bool, expected: str, found: object, fix: str) -> None:
    """Refuse a flag's value unless it is fine.

    Raises:
        UsageError: it is not.
    """
    if not fine:
        raise UsageError(flag, expected=expected, found=str(found), fix=fix)


class IllegalRatio(UsageError): ...


class IllegalWidth(UsageError): ...


class IllegalShape(UsageError): ...


class OutputExists(UsageError): ...


class PortInUse(UsageError): ...


class ModelError(PatServeError): ...


class MissingModel(ModelError): ...


class UnsupportedModel(ModelError): ...


class BrokenCheckpoint(ModelError): ...


class UnknownTensor(ModelError): ...


class DataError(PatServeError): ...


class RunError(PatServeError): ...


class UnfinishedRun(RunError): ...


class BrokenPlan(RunError): ...


class ChangedInput(RunError): ...


class Diverged(RunError): ...


class EmptyMask(RunError): ...


class ParityError(PatServeError): ...


class QualityError(PatServeError): ...


class UnclearQuality(QualityError):
    exit_code = 3


class HubError(PatServeError): ...


class EngineError(PatServeError): ...


class MissingExtra(PatServeError): ...


class DiskFull(PatServeError): ...


class TooLarge(PatServeError): ...
