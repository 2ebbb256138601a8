"""Reading rows: formats, gzip, stdin, row numbers, and one clear line for every broken file."""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
from pathlib import Path

import pytest

from patarm_lite.errors import UserError
from patarm_lite.pairs import load_pairs
from patarm_lite.pairs.files import Row, numbered, read_rows, stem

RECORDS = [
    {"prompt": "Name a colour", "chosen": "Red, for one", "rejected": "No"},
    {"prompt": "Name, please, a\nfish", "chosen": 'A "cod"', "rejected": "A dog"},
]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)
CSV = 'prompt,chosen,rejected\nName a colour,"Red, for one",No\n"Name, please, a\nfish","A ""cod""",A dog\n'


def _written(path: Path, data: str | bytes) -> str:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def _parquet_bytes() -> bytes:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzipped"])
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_rows_plain_and_gzipped(tmp_path: Path, ending: str, packed: bool) -> None:
    tabbed = 'prompt\tchosen\trejected\nName a colour\tRed, for one\tNo\n"Name, please, a\nfish"\t"A ""cod"""\tA dog\n'
    texts = {"jsonl": LINES, "json": json.dumps(RECORDS, indent=1), "csv": CSV, "tsv": tabbed}
    data = _parquet_bytes() if ending == "parquet" else texts[ending].encode()
    source = _written(tmp_path / f"p.{ending}{'.gz' if packed else ''}", gzip.compress(data) if packed else data)
    assert read_rows(source) == [Row(1, RECORDS[0]), Row(2, RECORDS[1])]


@pytest.mark.parametrize(
    "text", [LINES, json.dumps(RECORDS), json.dumps({"data": RECORDS}), CSV], ids=["l", "j", "d", "c"]
)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzipped"])
def test_stdin_is_read_by_its_first_bytes(monkeypatch: pytest.MonkeyPatch, text: str, packed: bool) -> None:
    data = gzip.compress(text.encode()) if packed else text.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert [row.value for row in read_rows("-")] == RECORDS


def test_row_numbers_in_json_lines_are_line_numbers(tmp_path: Path) -> None:
    assert [row.number for row in read_rows(_written(tmp_path / "p.jsonl", '\n{"a": 1}\r\n\n{"a": "\u2028"}\n'))] == [
        2,
        4,
    ]


def test_json_lines_in_a_file_called_json_are_read(tmp_path: Path) -> None:
    assert len(read_rows(_written(tmp_path / "p.json", LINES))) == 2


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    assert read_rows(_written(tmp_path / "p.csv", b"\xef\xbb\xbfa,b\n1,2\n")) == [Row(1, {"a": "1", "b": "2"})]


def test_chat_messages_in_a_csv_cell_are_read_as_messages(tmp_path: Path) -> None:
    cell = '"[{""role"": ""user"", ""content"": ""hi""}]"'
    (row,) = read_rows(_written(tmp_path / "p.csv", f"prompt,chosen\n{cell},[1]\n"))
    assert row.value == {"prompt": [{"role": "user", "content": "hi"}], "chosen": "[1]"}


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("p.jsonl", '{"a": 1}\n\n{"a": \n', r"p\.jsonl line 3: broken JSON"),
        ("p.json", '[\n{"a": 1},\n{"a" 2}\n]', r"p\.json line 3: broken JSON"),
        ("p.json", '{"a": 1}\n{"a": \n', r"p\.json line 2: broken JSON"),
        ("p.json", "7", "holds one int, not a list of records"),
        ("p.jsonl", '{"a": ' + "9" * 5000 + "}", "line 1: "),
        ("p.jsonl", '{"a": 1}\n' + "[" * 100_000, "line 2: "),
        ("p.jsonl", b'{"a": "fine"}\n{"a": "gr\xfcn"}\n', r"not UTF-8: byte 0xfc on line 2 \(byte 23 of the file\)"),
        ("p.csv", b"\xff\xfea\x00", r"not UTF-8: byte 0xff on line 1 \(byte 0 of the file\)"),
        ("p.jsonl", "", "is empty"),
        ("p.jsonl", " \n\n", "is empty"),
        ("p.jsonl.gz", gzip.compress(b""), "is empty"),
        ("p.json", "[]", "holds no rows"),
        ("p.csv", "prompt,chosen\n", "holds no rows"),
        ("p.csv", "a,b\n1,2\n1,2,3\n", "line 3: 3 cells where the header names 2"),
        ("p.csv", "a,b,a\n1,2,3\n", "column 'a' is named twice"),
        ("p.csv", 'a,b\n1,"2', "broken CSV"),
        ("p.txt", "just words", "neither JSON nor a CSV"),
        ("p.jsonl.gz", gzip.compress(LINES.encode())[:-9], "broken gzip"),
        ("p.gz", b"\x1f\x8bnothing", "broken gzip"),
        ("p.parquet", b"PAR1 no", "not a sound Parquet file"),
        ("p.parquet", b"", "is empty"),
    ],
)
def test_a_broken_file_is_one_clear_line(tmp_path: Path, name: str, data: str | bytes, told: str) -> None:
    if name.endswith(".parquet") and data:
        pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    with pytest.raises(UserError, match=told) as caught:
        read_rows(_written(tmp_path / name, data))
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file .*gone\.jsonl"):
        read_rows(str(tmp_path / "gone.jsonl"))
    with pytest.raises(UserError, match="is a folder"):
        read_rows(str(tmp_path))
    with pytest.raises(UserError, match="can't be read"):
        read_rows(_written(tmp_path / "file", "x") + "/p.jsonl")


@pytest.mark.parametrize("source", ["someone/some-set", "someone/some-set:train", "someone/some-set@main:test"])
def test_a_hub_id_while_offline_says_so(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(UserError, match="while offline"):
        load_pairs([source], offline=True)
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        load_pairs([source])


def test_a_data_set_of_the_datasets_library_gives_numbered_rows() -> None:
    datasets = pytest.importorskip("datasets", reason="hub data sets need datasets")
    assert numbered(datasets.Dataset.from_list(RECORDS)) == [Row(1, RECORDS[0]), Row(2, RECORDS[1])]


def test_parquet_without_pyarrow_gives_the_pip_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'patarm-lite\[train\]'"):
        read_rows(_written(tmp_path / "p.parquet", b"PAR1"))


def test_a_source_has_a_short_name() -> None:
    assert [stem(name) for name in ("a/b.jsonl.gz", "a/testset-v1.json", "-", "me/set@c:s")] == [
        "b",
        "testset-v1",
        "stdin",
        "set",
    ]
