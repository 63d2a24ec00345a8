"""What a check found, and how a list of findings is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One row. passed: None where the check does not apply, which `measured` explains. remedy: Where it failed."""

    name: str
    passed: bool | None
    measured: str
    expected: str = ""
    remedy: str = ""

    @property
    def status(self) -> str:
        return {True: "passed", False: "failed", None: "skipped"}[self.passed]


def healthy(findings: Sequence[Finding]) -> bool:
    """Did nothing fail?"""
    return all(finding.passed is not False for finding in findings)


def table(findings: Sequence[Finding]) -> str:
    """Rows of name, status, what was measured and what is expected; remedies below the rows that failed."""
    width = max((len(finding.name) for finding in findings), default=0)
    lines = []
    for one in findings:
        expected = f" (expected: {one.expected})" if one.expected and one.passed is not None else ""
        lines.append(f"{one.name:{width}}  {one.status:7}  {one.measured}{expected}")
        if one.passed is False and one.remedy:
            lines.append(f"{'':{width}}  -> {one.remedy}")
    failed = sum(finding.passed is False for finding in findings)
    return "\n".join([*lines, f"{len(findings)} checks, {failed} failed"])


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """The same for a program: whether all is well, and the rows."""
    rows = [{"status": one.status, **asdict(one)} for one in findings]
    return {"healthy": healthy(findings), "checks": [{k: v for k, v in row.items() if k != "passed"} for row in rows]}
