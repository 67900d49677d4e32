"""Instruction data: from files and hub sets to token ids whose loss covers the response alone.

sources.py  rows from a file or the hub   ->  rows.py  prompt and completion  ->  encoding.py  token ids, batches
messages.py, chat.py  of messages, by the template     row.py  an example as text     remarks.py  what is said once
marks.py  what of a chat is learned     day.py  the day that a template writes       rowless.py  tokens without a row
packing.py  several examples in a row         streaming.py  without an end        training_data.py  a recipe's data
"""

from pat_serve.training.data.encoding import PadBatch, encode_row, encode_rows, load_tokenizer
from pat_serve.training.data.packing import pack_examples
from pat_serve.training.data.row import Row
from pat_serve.training.data.rows import ALPACA, ALPACA_INPUT, parse_row
from pat_serve.training.data.sources import load_rows
from pat_serve.training.data.training_data import TrainingData, read_training_data

__all__ = [
    "ALPACA",
    "ALPACA_INPUT",
    "PadBatch",
    "Row",
    "TrainingData",
    "encode_row",
    "encode_rows",
    "load_rows",
    "load_tokenizer",
    "pack_examples",
    "parse_row",
    "read_training_data",
]
