"""The pinned packages against published vulnerabilities: pip-audit, and an honest count of what it looked up.

Example: python scripts/audit.py constraints.txt
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SECONDS = 600


def audit(command: list[str], pins: Path) -> dict[str, Any] | None:
    """Return what pip-audit reports of a file of pins, or None where it could not ask."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "audit.json")
        words = [*command, "-r", str(pins), "--no-deps", "--disable-pip", "--format", "json", "--output", str(out)]
        try:
            subprocess.run(words, capture_output=True, check=False, timeout=SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if not out.is_file():
            return None
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return found


def verdict(found: dict[str, Any] | None) -> tuple[int, list[str]]:
    """Return an exit code, 1 for a known vulnerability, and what to say.

    A package that the service does not know was not looked up, whatever pip-audit's own last line says.
    """
    if found is None:
        return 0, ["not audited: pip-audit is not there, or its service cannot be reached"]
    packages = found["dependencies"]
    known = [one for one in packages if "skip_reason" not in one]
    lines = [f"audited {len(known)} of {len(packages)} pinned packages"]
    if skipped := [one["name"] for one in packages if "skip_reason" in one]:
        lines.append(f"not audited, unknown to the service: {', '.join(skipped)}")
    bad = [(one, vulnerability) for one in known for vulnerability in one.get("vulns", [])]
    for one, vulnerability in bad:
        mended = ", ".join(vulnerability.get("fix_versions", [])) or "no version yet"
        lines.append(f"{one['name']} {one['version']}: {vulnerability['id']}, mended in {mended}")
    return int(bool(bad)), lines


def main() -> int:
    """Audit the file given, with the pip-audit given."""
    pins, command = Path(sys.argv[1]), sys.argv[2:] or [sys.executable, "-m", "pip_audit"]
    code, lines = verdict(audit(command, pins))
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main())
