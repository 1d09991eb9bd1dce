"""The contract tests: the laws that every method keeps, to be run over a method of your own.

Needs pytest. In a test file of yours::

    from peftkit.testing import contract_tests
    from fourier import FourierConfig

    test_contract = contract_tests(FourierConfig)

`pytest` then runs every law (`peftkit.testing.laws`) over every example that the config gives of itself and every model
of `peftkit.testing.models`; those of transformers are skipped where that is not installed. peftkit's own methods are
held to the same functions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

try:
    import pytest
except ImportError as error:
    raise ImportError("peftkit.testing needs pytest: pip install pytest") from error

pytest.register_assert_rewrite("peftkit.testing.laws")

import torch  # noqa: E402 - pytest must know of the laws before they are imported

from peftkit.method import Config  # noqa: E402
from peftkit.testing.laws import LAWS  # noqa: E402
from peftkit.testing.models import CASES, Case  # noqa: E402
from peftkit.testing.stands import refusal  # noqa: E402

__all__ = ["CASES", "LAWS", "Case", "contract_tests", "examples"]


def examples(*methods: type[Config]) -> list[tuple[str, Config]]:
    """Every example that `methods` give of themselves, with a name: the method's and a number."""
    return [(f"{cls.method}-{i}", config) for cls in methods for i, config in enumerate(cls.examples())]


def contract_tests(*methods: type[Config], cases: Sequence[Case] = CASES) -> Callable[..., None]:
    """A pytest test of every law, over every example of `methods` and every one of `cases`.

    A law is skipped, with the reason, where the method says that it does not apply: it cannot be attached, is not
    mergeable, or promises no identity. An example that can be attached to none of the cases fails; for a method that
    needs a model of another kind give `cases` of your own.

    Raises:
        ValueError: no methods, or one that is not registered or gives no examples.
    """
    for cls in methods:
        if not cls.method:
            raise ValueError(f"{cls.__name__} has no name; declare it as `class {cls.__name__}(Config, method=...)`")
        if not cls.examples():
            raise ValueError(f"{cls.__name__}.examples() gives none, so there is nothing to test")
    if not methods or not cases:
        raise ValueError(f"nothing to test: {len(methods)} methods, {len(cases)} cases")
    rows = [
        pytest.param(functools.partial(law, case, config), id=f"{name}-{case}-{example}")
        for name, law in LAWS.items()
        for case in cases
        for example, config in examples(*methods)
    ]
    rows += [
        pytest.param(functools.partial(attaches_somewhere, config, cases), id=f"attaches-{example}")
        for example, config in examples(*methods)
    ]

    @pytest.mark.parametrize("law", rows)
    def test(law: Callable[[], None]) -> None:
        torch.manual_seed(0)
        law()

    return test


def attaches_somewhere(config: Config, cases: Sequence[Case]) -> None:
    """Without this, a method that refuses everything would skip every law and pass."""
    reasons = []
    for case in cases:
        if (reason := refusal(case, config)) is None:
            return
        reasons.append(f"{case}: {reason}")
    pytest.fail(f"{config} can be attached to none of the models:\n" + "\n".join(reasons))
