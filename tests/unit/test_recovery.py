"""What `make recover` and `make adopt` say of a `pulumi` that fails."""

import json
from pathlib import Path

import pytest

from components.recovery import Engine, RecoveryError


def test_a_preview_that_fails_is_told_by_its_errors_and_not_by_its_whole_plan(tmp_path: Path):
    plan = {
        "config": {"homelab:cluster": "{}"},
        "diagnostics": [
            {"severity": "warning", "message": "warning: a sidecar is deprecated\n"},
            {"severity": "error", "message": "error: 1 setting is refused\n"},
        ],
    }
    pulumi = tmp_path / "pulumi"
    pulumi.write_text(f"#!/bin/sh\ncat <<'END'\n{json.dumps(plan)}\nEND\nexit 1\n")
    pulumi.chmod(0o755)
    engine = Engine(tmp_path, "dev", {"PATH": f"{tmp_path}:/usr/bin:/bin"})
    with pytest.raises(RecoveryError) as raised:
        engine.run("preview", "--json")
    text = str(raised.value)
    assert "Cause: error: 1 setting is refused\n" in text
    assert "sidecar" not in text
    assert "homelab:cluster" not in text
