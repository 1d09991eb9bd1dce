"""The laws, over every registered method, host and dtype they make sense for."""

from __future__ import annotations

import foreign_methods  # noqa: F401 - registers its methods, as any package may

from peftkit.method import registered
from peftkit.testing import contract_tests

test_laws = contract_tests(*registered().values())
