"""Reading rows from files, folders and saved data sets, and what is said about rows that cannot be used."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from tokenizers_for_tests import CHATML, char_tokenizer

from strop.config import TaskConfig
from strop.errors import ConfigError, DataError, StropError
from strop.tasks import Renderer, Task, build_task
from strop.tasks.data import open_source

ROWS = [
    {"question": "What is 1+1?", "answer": "2"},
    {"question": 'He said "three, four".\nHow many?', "answer": "zwei 🐍"},
    {"question": "¿Cuántos?", "answer": "1,234"},
]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def read(path: Path | str, split: str = "train") -> list[dict]:
    rows = open_source(str(path)).read(split, "task.train_split")
    return [rows[i] for i in range(len(rows))]


def build(path: Path | str, **settings: object) -> Task:
    settings = {"eval_split": None, "eval_size": 1, "max_prompt_length": 200, **settings}
    config = TaskConfig(name="dataset", path=str(path), **settings)
    return build_task(config, Renderer(char_tokenizer(CHATML)), seed=0, eval_size=config.eval_size)


def error_of(path: Path | str, **settings: object) -> str:
    with pytest.raises(StropError) as caught:
        build(path, **settings)
    assert caught.value.hint
    return str(caught.value)


def raw(tmp_path: Path, content: bytes, name: str = "bad.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


GOOD = b'{"question": "1+1?", "answer": "2"}\n'


def test_every_format_gives_equal_rows(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "list.json").write_text(json.dumps(ROWS, indent=2), encoding="utf-8")
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(tmp_path / "saved_splits")
    assert read(write_jsonl(tmp_path / "a.jsonl", ROWS)) == ROWS
    assert read(write_csv(tmp_path / "a.csv", ROWS)) == ROWS
    assert read(write_parquet(tmp_path / "a.parquet", ROWS)) == ROWS
    assert read(tmp_path / "list.json") == ROWS
    assert read(tmp_path / "lines.json") == ROWS
    assert read(tmp_path / "saved") == ROWS
    assert read(tmp_path / "saved_splits") == ROWS
    assert read(tmp_path / "saved_splits", "test") == ROWS[:1]
    with pytest.raises(DataError, match=r"has no split `dev`; it has train, test"):
        read(tmp_path / "saved_splits", "dev")


def test_bom_crlf_and_blank_lines_are_fine(tmp_path: Path) -> None:
    lines = b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(row).encode() for row in ROWS)
    assert read(raw(tmp_path, lines, "a.jsonl")) == ROWS
    text = write_csv(tmp_path / "b.csv", ROWS[:1]).read_bytes()
    assert b"\r\n" in text
    assert read(raw(tmp_path, b"\xef\xbb\xbf" + text + b"\r\n", "b.csv")) == ROWS[:1]


def test_line_separators_inside_strings_do_not_end_a_line(tmp_path: Path) -> None:
    row = {"question": "a\u2028b\x85c", "answer": "1"}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read(path) == [row]


def test_saved_index_column_of_a_csv_is_left_out(tmp_path: Path) -> None:
    assert read(raw(tmp_path, b",question,answer\n0,1+1?,2\n", "a.csv")) == [{"question": "1+1?", "answer": "2"}]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (GOOD + b"{question: 1}\n", r"bad.jsonl:2: not valid JSON (Expecting property name"),
        (GOOD + b'{"question": "1+', "bad.jsonl:2: not valid JSON (Unterminated string"),
        (GOOD + b'{"question": "1+', "may be cut off"),
        (GOOD + b'[1, 2]\n', "bad.jsonl:2: the row is a list, an object"),
        (GOOD + b'\n"text"\n', "bad.jsonl:3: the row is a str"),
        (GOOD + b'{"answer": "1", "answer": "2"}\n', "bad.jsonl:2: the key 'answer' stands twice"),
        (GOOD + b'{"question": "\xff", "answer": "2"}\n', "bad.jsonl:2: byte 0xff is not UTF-8"),
        (GOOD + b'{"question": "a\\ud800", "answer": "2"}\n', "bad.jsonl:2: column 'question' holds half of a"),
        (GOOD + b'{"question": "a", "answer": [{"x": "\\udfff"}]}\n', "bad.jsonl:2: column 'answer' holds half"),
        (GOOD + b'{"question": "a\\u0000", "answer": "2"}\n', "bad.jsonl:2: column 'question' holds a NUL"),
        (GOOD + b'{"answer": "2"}\n', "bad.jsonl:2: no column `prompt`; the columns are answer"),
        (GOOD + b'{"question": null, "answer": "2"}\n', "bad.jsonl:2: column `question` is empty (None)"),
        (GOOD + b'{"question": "  ", "answer": "2"}\n', "bad.jsonl:2: column `question` is empty"),
        (GOOD + b'{"question": NaN, "answer": "2"}\n', "bad.jsonl:2: column `question` is empty (nan)"),
        (GOOD + b'{"question": 7, "answer": "2"}\n', "bad.jsonl:2: column `question` is a int, text is needed"),
        (GOOD + b'{"question": "a"}\n', "bad.jsonl:2: no column `answer`; the columns are question"),
        (GOOD + b'{"question": "a", "answer": ""}\n', "bad.jsonl:2: column `answer` is empty"),
        (GOOD + b'{"question": "a", "answer": NaN}\n', "bad.jsonl:2: column `answer` is empty"),
        (GOOD + b'{"prompt": 7, "answer": "2"}\n', "bad.jsonl:2: column `prompt` is a int, text or a list of messages"),
        (GOOD + b'{"prompt": [], "answer": "2"}\n', "bad.jsonl:2: the prompt is an empty list"),
        (GOOD + b'{"prompt": ["a"], "answer": "2"}\n', "bad.jsonl:2: message 1 is a str, not an object"),
        (GOOD + b'{"prompt": [{"role": "human", "content": "a"}], "answer": "2"}\n', "has the role 'human'; known"),
        (GOOD + b'{"prompt": [{"role": "user"}], "answer": "2"}\n', "bad.jsonl:2: message 1 has no content"),
        (GOOD + b'{"prompt": [{"role": "user", "content": [1]}], "answer": "2"}\n', "message 1: `content` is a list"),
        (GOOD + b'{"prompt": [{"role": "system", "content": "a"}], "answer": "2"}\n', "bad.jsonl:2: the messages hold"),
        (
            b'{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "answer": "2"}\n',
            "bad.jsonl:1: the last message is from the assistant",
        ),
        (GOOD + b'{"question": "a", "answer": "2", "completions": 1}\n', "bad.jsonl:2: the column `completions` has"),
        (GOOD + b'{"question": "a", "answer": ' + b"9" * 5000 + b"}\n", "bad.jsonl:2: Exceeds the limit"),
        (GOOD + b'{"a":' * 100_000, "bad.jsonl:2: nested too deeply"),
        (b"", "no rows"),
        (b"\n \n", "no rows"),
    ],
)  # fmt: skip
def test_bad_rows_are_named_by_file_and_line(tmp_path: Path, content: bytes, expected: str) -> None:
    assert expected in error_of(raw(tmp_path, content))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", b'[{"question": "a", "answer": "1"}, 7]', "a.json, row 1: the row is a int"),
        ("a.json", b'[\n{"question": "a",\n "answer": 1,}]', "a.json:3: not valid JSON"),
        ("a.json", b'[{"question": "a", "answer": null}]', "a.json, row 0: column `answer` is empty"),
        ("a.json", b"[]", "no rows"),
        ("a.csv", b"question,answer\n1+1?,2\n1+2?\n", "a.csv:3: 1 fields, the header has 2"),
        ("a.csv", b'question,answer\n"1\n+1?",2\na,b,c\n', "a.csv:4: 3 fields"),
        ("a.csv", b'question,answer\n1+1?,2\n"1+2', "a.csv:3: not valid CSV"),
        ("a.csv", b"question,answer\n1+1?,\n", "a.csv:2: column `answer` is empty"),
        ("a.csv", b"question,answer\n1+1?,2\n\xe9,2\n", "a.csv:3: byte 0xe9 is not UTF-8"),
        ("a.csv", b"question,answer,answer\na,b,c\n", "a.csv:1: the column 'answer' stands twice"),
        ("a.csv", b"question;answer\n1+1?;2\n", "the columns are question;answer"),
        ("a.csv", "question,answer\n1,2\n".encode("utf-16"), "a.csv:1: byte 0xff is not UTF-8"),
        ("a.csv", b"question,answer\n", "no rows"),
        ("a.parquet", b"PAR1 no", "is not a Parquet file"),
        ("a.txt", b"hello", "files with the suffix `.txt` cannot be read"),
        ("a.jsonl.gz", b"", "files with the suffix `.gz` cannot be read"),
    ],
)
def test_bad_files_of_other_formats(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    assert expected in error_of(raw(tmp_path, content, name))


def test_bad_parquet_row_is_named_by_index(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [*ROWS, {"question": None, "answer": "1"}])
    assert "a.parquet, row 3: column `question` is empty (None)" in error_of(path)


def test_missing_column_offers_the_nearest(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"questions": "a", "answer": "1"}, {"questions": "b", "answer": "1"}])
    assert "a.jsonl:1: no column `prompt`; the columns are questions, answer" in error_of(path)
    message = error_of(path, prompt_column="question")
    assert "a.jsonl:1: no column `question`; the columns are questions, answer" in message
    assert "set task.prompt_column to `questions`" in message
    assert "set task.answer_column to `answer`" in error_of(path, prompt_column="questions", answer_column="answers")


def test_missing_paths(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    assert f"did you mean `{tmp_path / 'train.jsonl'}`?" in error_of(tmp_path / "trian.jsonl")
    assert "there is no file or folder" in error_of("no/such/place/a.jsonl")
    assert "there is no file or folder" in error_of("bad\0path")
    (tmp_path / "empty").mkdir()
    assert "has no data files" in error_of(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"task\.path names no data"):
        build_task(TaskConfig(name="dataset"), Renderer(char_tokenizer()), seed=0, eval_size=1)


def test_hub_that_cannot_be_reached_is_a_data_error() -> None:
    message = error_of("nobody/no-such-data")
    assert "the hub cannot be reached" in message
    assert "set task.path to a local file or folder" in message


def test_folder_with_splits_and_shards(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "test.jsonl", ROWS[:1])
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "data").mkdir()
    for i in range(3):
        write_parquet(tmp_path / "data" / f"train-{i:05d}-of-00003.parquet", [ROWS[i]])
    assert read(tmp_path) == ROWS
    rows = open_source(str(tmp_path)).read("train", "task.train_split")
    assert rows.problem_id(2) == f"{tmp_path.name}/train/2"
    assert rows.where(2).endswith("train-00002-of-00003.parquet, row 0")
    assert read(tmp_path, "test") == ROWS[:1]
    (tmp_path / "data" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(DataError, match="has 2 of the 3 files of the split `train`"):
        read(tmp_path)
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    assert read(tmp_path) == ROWS
    write_csv(tmp_path / "train.csv", ROWS)
    with pytest.raises(DataError, match=r"several files for the split `train`: train\.csv, train\.jsonl"):
        read(tmp_path)


def test_configuration_names_a_subfolder(tmp_path: Path) -> None:
    (tmp_path / "main").mkdir()
    write_jsonl(tmp_path / "main" / "train.jsonl", ROWS)
    assert len(open_source(str(tmp_path), dataset_config="main").read("train", "")) == 3
    with pytest.raises(DataError, match="holds main"):
        open_source(str(tmp_path)).read("train", "task.train_split")
    with pytest.raises(ConfigError, match="has no configurations"):
        open_source(str(tmp_path / "main" / "train.jsonl"), dataset_config="main")


def test_missing_split_lists_those_there_are(tmp_path: Path) -> None:
    for name in ("train", "validation"):
        write_jsonl(tmp_path / f"{name}.jsonl", ROWS)
    message = error_of(tmp_path, eval_split="test")
    assert "has no split `test`; it has train, validation" in message
    assert "task.eval_split to null" in message
    assert "set task.train_split to `train`" in error_of(tmp_path, train_split="trian")
    assert "a.jsonl` has no split `test`; it has train" in error_of(
        write_jsonl(tmp_path / "a.jsonl", ROWS), eval_split="test"
    )
