"""How errors end a data tool."""

import errno
import os

import pytest

from dash_megatron.files import telling_errors_of_the_disk
from data_tools.arguments import make_parser, run


def test_a_full_disk_is_one_line_without_a_number(capsys):
    def work(options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *options.file)

    parser = make_parser("some", "Some tool.")
    parser.add_argument("file", nargs="*")
    assert run(parser, [], work) == run(parser, ["a"], work) == 1
    assert capsys.readouterr().err == "error: No space left on device\nerror: No space left on device: a\n"


def test_an_error_of_writing_names_the_output_where_the_system_names_no_file(capsys):
    def work(options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    parser = make_parser("some", "Some tool.")
    parser.add_argument("--output")
    assert run(parser, ["--output", "out"], work) == 1
    assert capsys.readouterr().err == "error: No space left on device: out\n"


def test_a_copy_that_finds_no_room_names_what_it_writes(capsys):
    def work(options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "read", None, "written")

    assert run(make_parser("some", "Some tool."), [], work) == 1
    assert capsys.readouterr().err == "error: No space left on device: written\n"


def test_an_error_of_the_disk_that_a_library_tells_in_words_is_one():
    with pytest.raises(OSError, match="No space left on device: 'out'"), telling_errors_of_the_disk("out"):
        raise Exception("No space left on device (os error 28)")
    with pytest.raises(ZeroDivisionError), telling_errors_of_the_disk("out"):
        raise ZeroDivisionError
