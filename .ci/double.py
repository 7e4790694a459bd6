"""Print what the tests of the ClearML double depend on, as one hash: its code, `tracking/`, what sends
sweeps to agents, what agents start, the installed SDK and agent.

With --check: exit status 0 if that is what they last passed with, as `tests/data/double.sha256` says.
"""

import hashlib
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PASSED = ROOT / "tests" / "data" / "double.sha256"


def fingerprint() -> str:
    digest = hashlib.sha256(f"{version('clearml')} {version('clearml-agent')}".encode())
    patterns = (
        "tests/*clearml_server.py",
        "tests/clearml_double/*.py",
        "tests/test_agents.py",
        "tests/test_tracking.py",
        "tests/test_upload.py",
        "tests/test_queue.py",
        "tracking/*.py",
        "studies/*.py",
        "sweep.py",
        "train.py",
    )
    for path in sorted(path for pattern in patterns for path in ROOT.glob(pattern)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(not PASSED.exists() or PASSED.read_text().strip() != fingerprint())
    print(fingerprint())
