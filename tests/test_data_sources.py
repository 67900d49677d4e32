"""Every kind of source gives the same rows, and names a bad one by its place."""

from __future__ import annotations

import csv
import gzip
import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow.parquet import write_table

from pat_serve.errors import DataError, UsageError
from pat_serve.perplexity import IGNORED_LABEL
from pat_serve.training.config import TrainRecipe
from pat_serve.training.data import Row, encode_rows, load_rows, read_training_data
from pat_serve.training.data.calibration_samples import calibration_samples
from pat_serve.training.data.sources import iterate_rows
from pat_serve.training.data.streaming import ExampleStream
from pat_serve.training.data.training_data import TrainingData, split_examples
from tests.tiny_models import tiny_tokenizer

ROWS = [{"instruction": f"Say {number}", "output": f"{number}, and\nmore"} for number in range(7)]
SUFFIXES = [".jsonl", ".json", ".csv", ".tsv", ".parquet"]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_all_formats_give_the_same_rows(suffix: str, tmp_path: Path):
    reference = load_rows(str(write(tmp_path / "reference.jsonl", ROWS)), "train", tiny_tokenizer())
    assert load_rows(str(write(tmp_path / f"rows{suffix}", ROWS)), "train", tiny_tokenizer()) == reference
    assert len(reference) == 7


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_bad_row_is_named_or_left_out(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bad: list[dict[str, Any]] = [dict(row) for row in ROWS]
    for number in (1, 3, 4, 6):
        bad[number]["output"] = " "
    path = write(tmp_path / f"rows{suffix}", bad)
    # In CSV, where a row here spans two lines after the header's one, the line in the file as well.
    lines = {".jsonl": "line 2", ".json": "item 2", ".parquet": "row 2"}
    place = lines.get(suffix, "row 2 (line 4)")
    with pytest.raises(DataError, match=re.escape(f"{place}: expected a text in the field 'output'")):
        load_rows(str(path), "train", tiny_tokenizer())
    assert len(load_rows(str(path), "train", tiny_tokenizer(), skip_bad=True)) == 3
    said = capsys.readouterr().err
    assert "4 bad rows left out, the first 3 because of" in said
    assert place in said
    assert said.count("expected a text") == 3


def test_a_line_that_is_no_json_is_left_out(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": \n[1]\n{"prompt": "\xff"}\n' + json.dumps(ROWS[0]).encode())
    assert len(load_rows(str(path), "train", tiny_tokenizer(), skip_bad=True)) == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_a_byte_order_mark_is_no_part_of_the_data(suffix: str, tmp_path: Path):
    path = write(tmp_path / f"rows{suffix}", ROWS)
    expected = load_rows(str(path), "train", tiny_tokenizer())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n" if suffix == ".jsonl" else b"\n"))
    assert load_rows(str(path), "train", tiny_tokenizer()) == expected


def test_files_joined_with_their_byte_order_marks(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(b"\xef\xbb\xbf" + json.dumps(row).encode() + b"\n" for row in ROWS))
    assert len(load_rows(str(path), "train", tiny_tokenizer())) == len(ROWS)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_utf_16_is_named(suffix: str, tmp_path: Path):
    """The shell of Windows writes such files."""
    path = write(tmp_path / f"rows{suffix}", ROWS)
    path.write_text(path.read_text(), encoding="utf-16")
    with pytest.raises(DataError, match="expected a file in UTF-8, found UTF-16"):
        load_rows(str(path), "train", tiny_tokenizer(), skip_bad=True)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_sets_put_together_have_every_column_in_every_row(suffix: str, tmp_path: Path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}[assistant] "
    messages: Any = [{"role": "user", "content": "q", "name": "n"}, {"role": "assistant", "content": "a", "name": None}]
    messages = messages if suffix in (".jsonl", ".json", ".parquet") else json.dumps(messages)
    path = write(
        tmp_path / f"rows{suffix}",
        [
            {"messages": None, "prompt": "p", "completion": "c", "tools": None},
            {"messages": messages, "prompt": None, "completion": None, "tools": None},
        ],
    )
    for skip_bad in (False, True):
        rows = load_rows(str(path), "train", tokenizer, skip_bad=skip_bad)
        assert [row.completion for row in rows] == ["c", "a"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_that_datasets_saved(streaming: bool, tmp_path: Path):
    from datasets import Dataset, DatasetDict

    tokenizer = tiny_tokenizer()
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train_sft": Dataset.from_list(ROWS[:3])}).save_to_disk(str(tmp_path / "several"))

    def read(name: str, split: str) -> list[Row]:
        return list(iterate_rows(str(tmp_path / name), split, tokenizer, streaming=streaming))

    reference = load_rows(str(write(tmp_path / "rows.jsonl", ROWS)), "train", tokenizer)
    assert read("one", "train") == reference
    assert read("several", "train_sft") == reference[:3]
    with pytest.raises(DataError, match=r"no split 'train'; the splits are train_sft"):
        read("several", "train")
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"ARROW1")
    with pytest.raises(DataError, match="expected a dataset as save_to_disk writes it"):
        read("one", "train")


@pytest.mark.parametrize(
    ("name", "start", "found"),
    [
        ("rows.jsonl.gz", gzip.compress(b"{}", mtime=0), "a gzip archive. Unpack it"),
        ("rows.xlsx", b"PK\x03\x04", "a zip archive or a spreadsheet"),
        ("data-00000-of-00001.arrow", b"ARROW1\x00\x00", "an Arrow file. Give the folder"),
        ("rows.data", b"PAR1", "a Parquet file. Rename it"),
    ],
)
def test_a_file_that_is_no_text_is_named(name: str, start: bytes, found: str, tmp_path: Path):
    (tmp_path / name).write_bytes(start)
    with pytest.raises(DataError, match=found):
        load_rows(str(tmp_path / name), "train", tiny_tokenizer(), skip_bad=True)


def test_half_a_surrogate_pair_is_a_bad_row(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", [*ROWS, {"instruction": "a \ud800", "output": "b"}])
    with pytest.raises(DataError, match="line 8: expected text that can be written in UTF-8"):
        load_rows(str(path), "train", tiny_tokenizer())
    assert len(load_rows(str(path), "train", tiny_tokenizer(), skip_bad=True)) == 7


def test_bad_rows_alone_are_no_data(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text("{}\n{}\n")
    with pytest.raises(DataError, match=r"none \(2 bad ones left out\)"):
        load_rows(str(tmp_path / "rows.jsonl"), "train", tiny_tokenizer(), skip_bad=True)


def test_a_csv_row_with_too_many_columns(tmp_path: Path):
    (tmp_path / "rows.csv").write_text("prompt,completion\na,b\na,b,c\n")
    with pytest.raises(DataError, match=r"row 2 \(line 3\): expected 2 columns, as the header has, found 3"):
        load_rows(str(tmp_path / "rows.csv"), "train", tiny_tokenizer())


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
def test_a_damaged_file(suffix: str, tmp_path: Path):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(b'[prompt,completion\n"a,\xff')
    with pytest.raises(DataError, match=f"rows{suffix}"):
        load_rows(str(path), "train", tiny_tokenizer(), skip_bad=True)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_messages_in_tables(suffix: str, tmp_path: Path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}[assistant] "
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    value = json.dumps(messages) if suffix == ".csv" else messages
    path = write(tmp_path / f"rows{suffix}", [{"messages": value}])
    row = load_rows(str(path), "train", tokenizer)[0]
    assert (row.prompt, row.completion) == ("[user] q [assistant] ", "a")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_dataset(streaming: bool, tmp_path: Path):
    """A folder with a file for each split is what `load_dataset` reads from the hub."""
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.parquet", ROWS)
    write(folder / "validation.parquet", ROWS[:2])
    tokenizer = tiny_tokenizer()
    if streaming:
        stream = ExampleStream(str(folder), "validation", tokenizer, 256, seed=0, packing=False, skip_bad=False)
        assert len(list(stream.examples())) == 2
    else:
        assert len(load_rows(str(folder), "train", tokenizer)) == 7
        assert len(load_rows(str(folder), "validation", tokenizer)) == 2
        with pytest.raises(DataError, match="nothing"):
            load_rows(str(folder), "nothing", tokenizer)


def test_a_stream_repeats_by_its_seed_and_never_ends(tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", ROWS)

    def take(seed: int, packing: bool = False) -> list[list[int]]:
        stream = ExampleStream(str(path), "train", tiny_tokenizer(), 256, seed=seed, packing=packing, skip_bad=False)
        return [example["input_ids"] for example in islice(stream, 21)]

    first = take(0)
    assert first == take(0) != take(1)
    passes = [first[:7], first[7:14], first[14:]]
    assert passes[0] != passes[1]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(passes[2])
    assert max(map(len, take(0, packing=True))) > max(map(len, first))


def test_a_stream_says_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write(tmp_path / "rows.jsonl", [*ROWS, {"instruction": "x", "output": ""}])
    recipe = TrainRecipe(model="m", data=str(path), streaming=True, skip_bad_rows=True, max_steps=12)
    assert len(read_training_data(recipe, tiny_tokenizer()).samples) == 7
    assert "1 bad rows left out" in " ".join(capsys.readouterr().err.split())


def test_a_stream_names_unused_columns_once_in_all_its_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write(tmp_path / "rows.jsonl", [{**row, "id": "1"} for row in ROWS])
    stream = ExampleStream(str(path), "train", tiny_tokenizer(), 256, seed=0, packing=False, skip_bad=False)
    assert len(list(islice(stream, 21))) == 21
    assert capsys.readouterr().err.count("columns that are not used: id") == 1


def test_the_split_is_seeded():
    examples = [{"input_ids": [number], "labels": [number]} for number in range(100)]
    train, held_out = split_examples(examples, 0.1, seed=3)
    assert len(held_out) == 10
    assert sorted(example["input_ids"][0] for example in train + held_out) == list(range(100))
    assert split_examples(examples, 0.1, seed=3) == (train, held_out) != split_examples(examples, 0.1, seed=4)
    for share in (0.001, 0.999):
        with pytest.raises(UsageError, match="--eval-share"):
            split_examples(examples, share, seed=0)


def test_data_without_a_label():
    """A tokenizer that makes no token of a response, and no end of one."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    encode = tokenizer.encode
    tokenizer.encode = lambda text, **settings: encode(text.replace("drop", ""), **settings)
    rows = [Row(prompt="p", completion="drop")] * 2
    with pytest.raises(DataError, match="every label of 2 rows masked"):
        encode_rows(rows, tokenizer, 64)
    examples, dropped = encode_rows([*rows, Row(prompt="p", completion="c")], tokenizer, 64)
    assert dropped == 2
    assert [label != IGNORED_LABEL for label in examples[0]["labels"]][-1]


@pytest.mark.parametrize(
    ("streaming", "wanted", "found"), [(False, 8, 8), (False, 50, 40), (True, 8, 8), (True, 1020, 1020)]
)
def test_as_many_samples_as_the_calibration_wants(streaming: bool, wanted: int, found: int, tmp_path: Path):
    rows = [{"instruction": f"Say {number}", "output": "b"} for number in range(1100 if streaming else 40)]
    path = write(tmp_path / "rows.jsonl", rows)

    def read(calibration_rows: int) -> TrainingData:
        settings = {"streaming": streaming, "max_steps": 12, "calibration_rows": calibration_rows}
        recipe = TrainRecipe.build({"model": "m", "data": str(path), **settings}, "test")
        return read_training_data(recipe, tiny_tokenizer())

    data = read(wanted)
    assert len(data.samples) == found
    # The hash of the rows does not depend on how many are measured.
    assert data.train_sha256 == read(8).train_sha256


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([10] * 600, 512),  # as many rows as a default takes
        ([10] * 100, 100),
        ([512] * 600, 256),  # as many tokens: 131,072
        ([131_072, *[1] * 300], 128),  # and 128 rows all the same
        ([2048] * 600, 128),
    ],
)
def test_calibration_takes_rows_by_their_tokens_where_nobody_says(lengths: list[int], rows: int):
    examples = [{"input_ids": [1] * length} for length in lengths]
    assert len(calibration_samples(examples, None)) == rows
    assert len(calibration_samples(examples, 600)) == len(lengths[:600])
