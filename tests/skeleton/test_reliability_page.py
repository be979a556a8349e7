"""docs/reliability.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path


def test_the_page_of_promises_names_tests_that_exist(repository: Path) -> None:
    named = set(re.findall(r"`(\w+/test_\w+\.py)`", (repository / "docs/reliability.md").read_text()))
    assert len(named) > 10 and not [name for name in named if not (repository / "tests" / name).is_file()]
