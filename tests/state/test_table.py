"""The page that says what is saved says what the zoo shows, and nothing else."""

from __future__ import annotations

import pytest

from tests.state.table import PAGE, page, table


def test_the_page_of_what_is_saved_has_the_table_of_the_zoo() -> None:
    assert PAGE.read_text() == page(PAGE.read_text()), "python -m tests.state.table --write"


def test_a_changed_line_of_the_table_is_noticed() -> None:
    text = PAGE.read_text()
    line = next(line for line in table().splitlines() if "| carried |" in line)
    changed = text.replace(line, line.replace("| carried |", "| refused |"), 1)
    assert changed != text
    assert page(changed) == text


def test_a_page_without_its_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="lost the marks"):
        page("# What is saved\n")
