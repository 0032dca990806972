"""Triton's compiler is tried before a run needs it."""

import pytest

from rmipo.plan.compiler import compiler_problem


def test_what_compiles_here_is_no_problem():
    assert compiler_problem() is None


@pytest.mark.parametrize(
    ("compiler", "named"), [("/bin/false", "/bin/false"), ("/no/such/cc", "/no/such/cc"), ("", "no C compiler")]
)
def test_a_compiler_that_does_not_work_is_named(monkeypatch, compiler, named):
    monkeypatch.setenv("CC", compiler)
    if not compiler:
        monkeypatch.setenv("PATH", "/nonexistent")
    assert named in compiler_problem()
