from __future__ import annotations

from scripts.settings_table import PAGE, table, with_table
from server.settings import Settings


def test_the_page_has_the_settings_of_today():
    page = PAGE.read_text(encoding="utf-8")
    assert with_table(page) == page, "run python -m scripts.settings_table"


def test_every_setting_has_a_row_that_explains_it():
    rows = table().splitlines()[2:]
    assert len(rows) == len(Settings.model_fields)
    for name, row in zip(Settings.model_fields, rows, strict=True):
        assert f"MOLEX_{name.upper()}" in row
        assert len(row.split(" | ")[3]) > 10
    assert "| `--port`, `MOLEX_PORT` | 8000 | 0 to 65,535 |" in table()
    assert "--pepper" not in table()
