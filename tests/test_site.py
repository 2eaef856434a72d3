"""The pages as a site (`make docs`), as a browser would get it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mosa_hf

ROOT = Path(__file__).parent.parent


@pytest.mark.real  # needs the extra `docs`
def test_the_site_builds_and_has_every_public_name(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install 'mosa-hf[docs]'")
    pytest.importorskip("mkdocstrings", reason="pip install 'mosa-hf[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "CI": "1"})
    assert result.returncode == 0 and "WARNING -" not in result.stderr, result.stderr
    reference = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    found = set(re.findall(r'id="(mosa_hf[\w.]*)"', reference))
    made = {name for name in mosa_hf.__all__ if re.fullmatch(r"Mosa[A-Z]\w*", name)}  # of families, or native
    assert {f"mosa_hf.{name}" for name in set(mosa_hf.__all__) - made} <= found
    assert {"mosa_hf.conversion.read_text", "mosa_hf.evaluation.trace_text", "mosa_hf.MosaConfig"} <= found
    # Nothing is asked of others when a page is read, but what a reader clicks.
    for page in tmp_path.rglob("*.html"):
        asked = re.findall(
            r'<(?:script|link|img)[^>]*(?:src|href)="(https?://[^"]+)"', page.read_text(encoding="utf-8")
        )
        assert [address for address in asked if "mosa-hf/mosa_hf" not in address] == []
