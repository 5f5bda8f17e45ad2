"""Texts in a column of a table: .parquet, and Arrow's .arrow and .feather, among them what `save_to_disk` writes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from data_tools.documents import BadLine, Document, Piece
from data_tools.kinds import kind_of
from data_tools.records import known_columns, text_of


def count_parts(path: str) -> int:
    """The number of row groups of a .parquet file, or of record batches of an Arrow file, for `Piece`.

    Raises:
        ValueError: the file is not what its name says.
    """
    with _naming_damaged_files(path):
        if _is_parquet(path):
            return int(_parquet_file(path).num_row_groups)
        return sum(1 for _ in _arrow_batches(path))


def read_table(piece: Piece, text_key: str | None) -> Iterator[Document | BadLine]:
    """Read the texts of a piece's row groups or record batches.

    Raises:
        ValueError: the file is not what its name says, damaged, or without the column `text_key`.
    """
    row, batches = (
        _parquet_batches(piece, text_key) if _is_parquet(piece.path) else _arrow_part(piece, text_key)
    )
    with _naming_damaged_files(piece.path):
        for batch in batches:
            # one value at a time: a row that is not UTF-8 then harms no other
            columns = [batch.column(name) for name in batch.schema.names]
            for values in zip(*columns, strict=True):
                row += 1
                yield _from_values(
                    dict(zip(batch.schema.names, values, strict=True)), piece.path, row, text_key
                )


def _from_values(values: dict[str, Any], path: str, row: int, text_key: str | None) -> Document | BadLine:
    try:
        text, reason = text_of({name: value.as_py() for name, value in values.items()}, text_key)
    except UnicodeDecodeError as error:
        return BadLine(path, row, f"not UTF-8 (byte {error.start} of the value)")
    except Exception as error:  # whatever a library raises of one value
        return BadLine(path, row, f"cannot be read ({type(error).__name__}: {error})")
    return BadLine(path, row, reason) if reason else Document(text, f"{path}:{row}")


def _is_parquet(path: str) -> bool:
    kind = kind_of(path)
    return kind is not None and kind.format == "parquet"


@contextmanager
def _naming_damaged_files(path: str) -> Iterator[None]:
    import pyarrow

    suffix = path[path.rindex(".") :]
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.filename:
            raise
        raise ValueError(f"{path} must be a whole {suffix} file ({error}); copy it again") from error


def _parquet_file(path: str) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path)


def _parquet_batches(piece: Piece, text_key: str | None) -> tuple[int, Iterable[Any]]:
    """The rows before a piece, and its batches."""
    with _naming_damaged_files(piece.path):
        file = _parquet_file(piece.path)
        columns = _columns(piece.path, file.schema_arrow.names, text_key)
        stop = piece.stop if piece.stop >= 0 else file.num_row_groups
        before = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
        groups = list(range(piece.start, stop))
        return before, file.iter_batches(batch_size=256, row_groups=groups, columns=columns)


def _arrow_part(piece: Piece, text_key: str | None) -> tuple[int, Iterable[Any]]:
    with _naming_damaged_files(piece.path):
        batches = list(_arrow_batches(piece.path))  # memory maps, not copies
    columns = _columns(piece.path, batches[0].schema.names, text_key) if batches else []
    stop = piece.stop if piece.stop >= 0 else len(batches)
    before = sum(batch.num_rows for batch in batches[: piece.start])
    return before, [batch.select(columns) for batch in batches[piece.start : stop]]


def _arrow_batches(path: str) -> Iterator[Any]:
    """Batches of a file in either of Arrow's two formats, which share their suffixes."""
    import pyarrow
    import pyarrow.ipc

    source = pyarrow.memory_map(path)
    try:
        file = pyarrow.ipc.open_file(source)
    except pyarrow.ArrowInvalid:
        source.seek(0)
        yield from pyarrow.ipc.open_stream(source)
        return
    for number in range(file.num_record_batches):
        yield file.get_batch(number)


def _columns(path: str, names: list[str], text_key: str | None) -> list[str]:
    columns = known_columns(text_key, names)
    if len(set(columns)) < len(columns):
        raise ValueError(f"{path} has several columns of one name ({', '.join(names)}); rename columns")
    if columns:
        return columns
    if text_key is None:
        raise ValueError(
            f"{path} has no column 'messages', nor 'prompt' and 'completion' (it has {', '.join(names)}); rename columns"
        )
    raise ValueError(f"{path} has no column {text_key!r} (it has {', '.join(names)}); set --text-key")
