"""Names that others gave their jobs are no commands to the terminal of who lists them."""

import pytest

from app.cli.printing import print_table


def test_a_table_has_a_line_for_each_row_and_no_control_character(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("JOB", "NAME"), [("1", "a\x1b[31m\nforged"), ("2", "\x9b2J\u202e"), ("3", "größer als 5")])
    assert capsys.readouterr().out.splitlines() == [
        "JOB  NAME",
        "1    a\\x1b[31m\\nforged",
        "2    \\x9b2J\\u202e",
        "3    größer als 5",
    ]
