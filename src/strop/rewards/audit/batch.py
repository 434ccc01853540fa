"""Batch probes: a completion's score does not depend on its neighbours, and values of the wrong kind are refused."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from ...errors import RewardError
from ..call import check_returned
from .bench import Bench
from .registry import Finding, ok, probe, skip


@probe("B1", "neighbours in a list", needs_gold=False, task="lists")
def neighbours(bench: Bench) -> Finding:
    """The score of a completion alone, in a list of 2 and in a list of 64. Functions of group scope may compare."""
    names = [name for name, declared in bench.declarations.items() if declared.scope == "sample"]
    if not names:
        return skip("every function is of group scope")
    found = bench.lab.result("lists")
    if found is None:
        return Finding("FAIL", bench.lab.trouble, advice="a function must not hang or end its process")
    if not found:
        return ok(f"{len(names)} functions")
    name, where, seen = found[0]
    return Finding(
        "FAIL", f"`{name}` scores a completion otherwise beside others ({seen})", rows=len(found), of=len(names),
        problem=where,
        advice='declare it with @reward(scope="group") if it compares the group; else judge each completion alone',
    )  # fmt: skip


@probe("B2", "values that are no scores", needs_gold=False)
def wrong_values(bench: Bench) -> Finding:
    """Wrong lengths and types are refused with the function's name; booleans and scalars of NumPy are numbers."""
    name = bench.pool.names[0]
    refused: list[Any] = [1.0, "1.0", None, [], [1.0, 2.0], ["1.0"], [b"1"], [[1.0]], [{}], {"score": 1.0}, [1 + 2j]]
    through: list[tuple[Any, float | None]] = [
        ([True], 1.0), ([1], 1.0), ((0.5,), 0.5), ([Fraction(1, 2)], 0.5), ([None], None), *_numpy_values(),
    ]  # fmt: skip
    passed = [value for value in refused if not _is_refused(name, value)]
    changed = [value for value, number in through if check_returned(name, value).value != number]
    failed = [value for value in ([float("nan")], [float("inf")], [10**400]) if not check_returned(name, value).failure]
    if passed or changed or failed:
        return Finding("FAIL", f"accepted: {passed + changed + failed}", advice="report this: the pool is at fault")
    return ok(f"{len(refused) + len(through) + 3} values")


def _is_refused(name: str, value: Any) -> bool:
    try:
        check_returned(name, value)
    except RewardError as e:
        return f"`{name}`" in e.message
    return False


def _numpy_values() -> list[tuple[Any, float]]:
    import numpy as np

    return [(np.array([0.25]), 0.25), ([np.float32(0.5)], 0.5), ([np.int64(1)], 1.0), ([np.array(0.5)], 0.5)]
