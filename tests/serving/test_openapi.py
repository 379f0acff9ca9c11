"""Requests drawn from the OpenAPI document: none is answered with a 5xx."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.serving import Client


@pytest.mark.slow  # thousands of requests
def test_no_request_makes_the_server_fail(serve: Callable[..., Client], tmp_path: Path) -> None:
    pytest.importorskip("schemathesis")
    client = serve(limits={"new_tokens": 16, "seconds": 20.0})
    program = Path(sys.executable).with_name("schemathesis")
    options = ["--checks", "not_a_server_error", "--max-examples", "200", "--request-timeout", "60"]
    url = f"http://127.0.0.1:{client.port}/openapi.json"
    done = subprocess.run([program, "run", url, *options], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert client.get("/health") == {"status": "ok"}
