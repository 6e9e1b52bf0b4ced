"""What ``docs/serve`` gives operators, held against the tools that read it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SERVE = Path(__file__).resolve().parents[2] / "docs" / "serve"
ANALYZE = shutil.which("systemd-analyze")


def analyzed(tmp_path: Path, text: str, *words: str) -> subprocess.CompletedProcess[str]:
    unit = tmp_path / "mtu-test.service"
    unit.write_text(text)
    assert ANALYZE
    return subprocess.run([ANALYZE, *words, str(unit)], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed (apt-get install systemd)")
@pytest.mark.parametrize("name", ["mtu-serve.service", "mtu-board.service"])
def test_systemd_takes_the_units_and_finds_them_closed(name: str, tmp_path: Path) -> None:
    """But for the program, which is not installed here."""
    text, count = re.subn(r"^ExecStart=\S+", "ExecStart=/bin/true", (SERVE / name).read_text(), flags=re.MULTILINE)
    assert count == 1
    done = analyzed(tmp_path, text, "verify", "--man=no")
    assert done.returncode == 0 and not done.stderr, done.stderr
    wrong = analyzed(tmp_path, text.replace("PrivateTmp=true", "PrivateTemp=true"), "verify", "--man=no")
    assert "PrivateTemp" in wrong.stderr, "what systemd does not know is found"
    secure = analyzed(tmp_path, text, "security", "--offline=true", "--threshold=25", "--no-pager")
    assert secure.returncode == 0, secure.stdout[-300:]
