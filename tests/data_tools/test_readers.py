import errno
import gzip
import os
import random

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard

from data_tools.readers import (
    BadLine,
    BadLineCounter,
    Document,
    Piece,
    TooManyBadLines,
    find_inputs,
    read_piece,
    split_into_pieces,
    warn_of_unread_files,
)

KINDS = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow", "a.feather"]
WHOLE = ["a.json", "lines.json", "a.json.gz"]


def read(pieces: list[Piece]) -> list[str]:
    items = [item for piece in pieces for item in read_piece(piece)]
    assert all(isinstance(item, Document) for item in items)
    return [item.text for item in items]


@pytest.mark.parametrize("name", [*KINDS, *WHOLE, "folder"])
def test_each_kind_of_input_gives_its_documents_in_order(tmp_path, write_input, texts, name):
    path = write_input(tmp_path / name, texts)
    assert read([Piece(file) for file in find_inputs([path])]) == texts


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "lines.json", "a.txt"])
def test_a_byte_order_mark_at_the_beginning_of_a_file_costs_nothing(tmp_path, write_input, texts, name):
    path = tmp_path / name
    if name == "a.txt":
        path.write_text(texts[0], newline="")
    else:
        write_input(path, texts)
    opened = gzip.open if name.endswith(".gz") else open
    with opened(path, "rb") as file:
        data = file.read()
    with opened(path, "wb") as file:
        file.write(b"\xef\xbb\xbf" + data)
    assert read([Piece(str(path))]) == (texts[:1] if name == "a.txt" else texts)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("piece_bytes", [1, 97, 1000, 10**9])
def test_the_pieces_of_a_file_have_each_document_once(tmp_path, write_input, name, piece_bytes):
    texts = [f"{number} " * (number % 7 + 1) for number in range(700 if "jsonl." in name else 60)]
    pieces = split_into_pieces(str(write_input(tmp_path / name, texts)), piece_bytes)
    assert (len(pieces) > 1) == (piece_bytes < 10**9)
    assert sorted(read(pieces)) == sorted(texts)


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n\n"], ids=repr)
def test_any_two_byte_ranges_of_a_jsonl_file_meet_without_gap_or_overlap(tmp_path, end):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"text": "one"}\n\n{"text": "two"}\r\n{"text": "\u00e9"}' + end, encoding="utf-8", newline=""
    )
    size = path.stat().st_size
    for cut in range(size + 1):
        assert read([Piece(str(path), 0, cut), Piece(str(path), cut, size)]) == ["one", "two", "\u00e9"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not JSON"),
        (b"plain text", "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'["text"]', "not a JSON object but list"),
        (b'{"body": "a"}', "no key 'text' (it has 'body'; --text-key names another)"),
        (b'{"text": null}', "'text' is not a string but NoneType"),
        (b'{"text": 5}', "'text' is not a string but int"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": "a", "id": ' + b"1" * 5000 + b"}", "not JSON (Exceeds the limit"),
        (b'\xef\xbb\xbf{"text": "a"}', "not JSON (Unexpected UTF-8 BOM"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value[:20]),
)
def test_a_malformed_line_is_reported_with_file_line_and_reason(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "also good"}\n')
    items = list(read_piece(Piece(str(path))))
    bad = [item for item in items if isinstance(item, BadLine)]
    assert [item.text for item in items if isinstance(item, Document)] == ["good", "also good"]
    assert len(bad) == 1
    assert str(bad[0]).startswith(f"{path}:3: {reason}")


def test_the_line_number_is_that_of_the_file_in_every_piece(tmp_path):
    path = tmp_path / "a.jsonl"
    rng = random.Random(0)
    lines = [
        "oops" if number % 10 == 7 else '{"text": "%s"}' % ("x" * rng.randrange(30)) for number in range(100)
    ]
    path.write_text("\n".join(lines) + "\n")
    for piece_bytes in (13, 100, 10**6):
        items = [item for piece in split_into_pieces(str(path), piece_bytes) for item in read_piece(piece)]
        assert [item.line for item in items if isinstance(item, BadLine)] == list(range(8, 101, 10))


def test_bad_rows_and_files_are_reported_too(tmp_path, write_input):
    path = write_input(tmp_path / "a.parquet", ["one", None, "three"])
    assert [str(item) for item in read_piece(Piece(str(path))) if isinstance(item, BadLine)] == [
        f"{path}:2: 'text' is not a string but NoneType"
    ]
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthr\xffee\n")
    (bad,) = read_piece(Piece(str(tmp_path / "a.txt")))
    assert str(bad) == f"{tmp_path}/a.txt:3: not UTF-8 (byte 11)"


def test_one_bad_record_of_an_array_is_one_bad_line(tmp_path):
    path = tmp_path / "a.json"
    records = [
        '{"text": "one"}',
        '{"text": null}',
        '{"text": "x", "id": ' + "1" * 5000 + "}",
        '{"text": "two"}',
    ]
    path.write_text("[\n" + ",\n".join(records) + "\n]\n")
    items = list(read_piece(Piece(str(path))))
    assert [item.text for item in items if isinstance(item, Document)] == ["one", "two"]
    assert [item.source for item in items if isinstance(item, Document)] == [f"{path}:2", f"{path}:5"]
    assert [str(item)[:60] for item in items if isinstance(item, BadLine)] == [
        f"{path}:3: 'text' is not a string but NoneType"[:60],
        f"{path}:4: not JSON (Exceeds the limit (4300 digits)"[:60],
    ]
    for text, bad in (("[\n" + records[0] + ",\n{oops", [3]), ("\ufeff[" + records[0] + "]", [])):
        path.write_text(text)
        items = list(read_piece(Piece(str(path))))
        assert [item.text for item in items if isinstance(item, Document)] == ["one"]
        assert [item.line for item in items if isinstance(item, BadLine)] == bad
    path.write_text('{\n "text": "alone"\n}\n')
    assert read([Piece(str(path))]) == ["alone"]


def test_compressed_text_files_are_one_document_each(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("one\ncaf\u00e9".encode()))
    (tmp_path / "b.py.zst").write_bytes(zstandard.compress(b"def f(): ..."))
    assert read([Piece(file) for file in find_inputs([tmp_path])]) == ["one\ncaf\u00e9", "def f(): ..."]


def test_a_zstd_file_with_a_long_window_is_read(tmp_path):
    lines = b"".join(b'{"text": "document %d"}\n' % number for number in range(100))
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=28, enable_ldm=True)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(writer.compress(lines) + writer.flush())
    assert len(read([Piece(str(tmp_path / "a.jsonl.zst"))])) == 100


def test_what_a_folder_holds_and_is_not_read_is_counted_and_named(tmp_path, capsys):
    for name in ("a.txt", "b.csv", "in/c.csv", "d.tar.gz", ".git/e.csv", "manifest.json", "noext"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "lost.txt").symlink_to(tmp_path / "moved.txt")
    (tmp_path / "more").symlink_to(tmp_path / "in")
    (tmp_path / "package.json").write_text('{"name": "no text"}')
    (tmp_path / "records.json").write_text('[{"text": "one"}]')
    assert [path.removeprefix(f"{tmp_path}/") for path in find_inputs([tmp_path])] == [
        "a.txt",
        "records.json",
    ]
    warn_of_unread_files([tmp_path, tmp_path / "a.txt"])
    assert capsys.readouterr().err == (
        f"{tmp_path}: 7 files are not read: 2 .csv ({tmp_path}/b.csv), 1 .tar.gz ({tmp_path}/d.tar.gz), "
        f"2 links to no file ({tmp_path}/lost.txt), 1 no suffix ({tmp_path}/noext), 1 .json ({tmp_path}/package.json)\n"
    )
    warn_of_unread_files([tmp_path / "in"])
    assert capsys.readouterr().err == f"{tmp_path}/in: 1 file is not read: 1 .csv ({tmp_path}/in/c.csv)\n"


def test_a_folder_that_may_not_be_read_is_an_error_and_not_left_out(tmp_path, monkeypatch):
    (tmp_path / "in" / "closed").mkdir(parents=True)
    (tmp_path / "in" / ".closed").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a")
    scan = os.scandir

    def refuse(path):  # as of a user that is not root
        if os.fspath(path).endswith("closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="in/closed"):
        find_inputs([tmp_path / "in"])
    (tmp_path / "in" / "closed").rmdir()
    assert find_inputs([tmp_path / "in"]) == [str(tmp_path / "in" / "a.txt")]


def test_a_limit_of_bad_lines_below_zero_is_refused():
    with pytest.raises(ValueError, match="--max-bad-lines=-1 must be at least 0"):
        BadLineCounter(-1)


def test_bad_lines_past_the_limit_are_an_error(capsys):
    counter = BadLineCounter(2)
    counter.add(BadLine("f", 1, "r"))
    counter.add(BadLine("f", 2, "r"))
    with pytest.raises(TooManyBadLines, match=r"--max-bad-lines=2 .* f:3: r is bad line 3"):
        counter.add(BadLine("f", 3, "r"))
    assert capsys.readouterr().err == "bad line: f:1: r\nbad line: f:2: r\nbad line: f:3: r\n"


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.json.gz", "a.parquet", "a.feather"])
@pytest.mark.parametrize("share", [0, 0.3, 0.6, 0.99])
def test_a_file_that_was_cut_short_is_an_error_and_not_a_shorter_file(
    tmp_path, write_input, texts, name, share
):
    path = write_input(tmp_path / name, texts)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match=rf"{name} must be a whole"):
        read([Piece(str(path))])


def test_a_file_that_is_not_what_its_name_says_is_an_error(tmp_path):
    for name in ("a.jsonl.gz", "a.jsonl.zst", "a.txt.gz", "a.txt.zst", "a.parquet", "a.arrow"):
        (tmp_path / name).write_text("plain text, and more of it than a header")
        with pytest.raises(ValueError, match=f"{name} must be a whole"):
            read([Piece(str(tmp_path / name))])


def test_lines_longer_than_any_buffer_are_read_whole(tmp_path, write_input):
    texts = ["x" * 3_000_000, "short", "y" * 700_000]
    for name in KINDS:
        assert read([Piece(str(write_input(tmp_path / name, texts)))]) == texts
    many = tmp_path / "many.jsonl.zst"
    many.write_bytes(b"".join(zstandard.compress(b'{"text": "%d"}\n' % number) for number in range(50)))
    assert read([Piece(str(many))]) == [str(number) for number in range(50)]


def test_a_wrong_column_names_those_there_are(tmp_path, write_input):
    path = write_input(tmp_path / "a.parquet", ["one"], text_key="body")
    with pytest.raises(ValueError, match=r"no column 'text' \(it has id, body\); set --text-key"):
        read([Piece(str(path))])


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_two_columns_of_one_name_are_refused(tmp_path, name):
    table = pyarrow.table({"text": ["a"], "other": ["b"]}).rename_columns(["text", "text"])
    if name == "a.parquet":
        pyarrow.parquet.write_table(table, tmp_path / name)
    else:
        with pyarrow.ipc.new_file(tmp_path / name, table.schema) as file:
            file.write_table(table)
    with pytest.raises(ValueError, match=f"{name} has several columns of one name"):
        read([Piece(str(tmp_path / name))])


def test_documents_without_text_are_left_out(tmp_path, write_input):
    path = write_input(tmp_path / "a.jsonl", ["one", "", "two"])
    assert read([Piece(str(path))]) == ["one", "two"]


def test_folders_are_searched_in_order_and_other_files_left_alone(tmp_path):
    for name in (
        "b.md",
        "a/z.py",
        "a/b.jsonl",
        "c.bin",
        ".hidden/d.txt",
        "__pycache__/e.py",
        "manifest.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_inputs([tmp_path, tmp_path / "b.md"])
    assert [path.removeprefix(f"{tmp_path}/") for path in found] == ["a/b.jsonl", "a/z.py", "b.md"]


def test_an_input_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.bin").touch()
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        find_inputs([tmp_path / "nothing"])
    with pytest.raises(ValueError, match="empty must hold files to read"):
        find_inputs([tmp_path / "empty"])
    with pytest.raises(ValueError, match=r"a\.bin must be of a kind that can be read"):
        find_inputs([tmp_path / "a.bin"])
