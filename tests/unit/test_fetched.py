"""What is fetched is verified, and files with secrets are private before they hold any."""

import ast
import os
import re
import stat
from pathlib import Path

import pytest

from components import versions
from hostctl.machine import Machine
from tests.unit.test_versions import IMAGES

ROOT = Path(__file__).parents[2]
# Each of them compares a sha256 before anything is used: setup/download.py with the one that the
# release publishes, the others with one that is pinned, or published for k3s.
FETCHING = {
    "setup/download.py: urlopen",
    "hostctl/machine.py: build_opener",
    "hostctl/machine.py: OpenerDirector",
    # The certificate that a server shows.
    "hostctl/machine.py: create_connection",
    "hostctl/install.py: download",
    "hostctl/k3s_service.py: download",
    "hostctl/k3s_service.py: read_url",
    # Cloudflare's API, of which nothing is kept.
    "components/permissions.py: build_opener",
    "components/permissions.py: OpenerDirector",
}


def test_nothing_else_fetches() -> None:
    names = {
        "urlopen",
        "urlretrieve",
        "build_opener",
        "OpenerDirector",
        "HTTPConnection",
        "HTTPSConnection",
        "create_connection",
        "download",
        "read_url",
    }
    found = {
        f"{path.relative_to(ROOT)}: {node.attr}"
        for package in ("setup", "hostctl", "components", "homelab", "policy")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr in names
        # `download` is also the name of a module of setup.
        and not (isinstance(node.value, ast.Name) and node.value.id == "setup")
    }
    assert found == FETCHING


def test_every_python_package_has_its_hash() -> None:
    lock = (ROOT / "uv.lock").read_text()
    files = re.findall(r"^.*\burl = .*$", lock, re.M)
    assert len(files) > 100
    assert [line for line in files if 'hash = "sha256:' not in line] == []


@pytest.mark.parametrize("module", sorted(ROOT.glob("*/**/go.mod")), ids=lambda p: p.parent.name)
def test_go_verifies_every_module(module: Path) -> None:
    """It refuses a module that has no sum beside go.mod, unless it is told not to look."""
    assert len((module.parent / "go.sum").read_text().splitlines()) > 50
    told = "".join(path.read_text() for path in (ROOT / "setup").glob("*.py"))
    assert re.findall(r"GO(?:NOSUM|NOSUMDB|INSECURE|PRIVATE|SUMDB|NOVERIFY)\b", told) == []
    assert "GOFLAGS" not in told


def test_charts_have_one_version_and_images_a_tag_or_a_digest() -> None:
    charts = [one for one in vars(versions).values() if isinstance(one, versions.Chart)]
    assert charts
    assert all(re.fullmatch(r"v?\d+\.\d+\.\d+", chart.version) for chart in charts)
    assert all(chart.repository.startswith("https://") for chart in charts)
    assert all(":" in image for image in IMAGES)


def test_a_file_has_its_final_mode_before_its_name_and_none_is_readable_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = os.umask(0)
    seen: list[tuple[str, int]] = []
    replace, fchmod = os.replace, os.fchmod

    def mode_of(path: str | int) -> int:
        return stat.S_IMODE(os.stat(path).st_mode)

    def replacing(source: str, target: str) -> None:
        seen.append(("named", mode_of(source)))
        replace(source, target)

    def changing(descriptor: int, mode: int) -> None:
        seen.append(("written", mode_of(descriptor)))
        fchmod(descriptor, mode)

    monkeypatch.setattr(os, "replace", replacing)
    monkeypatch.setattr(os, "fchmod", changing)
    machine = Machine()
    try:
        machine.write_atomic(str(tmp_path / "kubeconfig"), b"secret", 0o640)
        assert seen == [("written", 0o600), ("named", 0o640)]
        with machine.private_file(b"secret") as path:
            assert mode_of(path) == 0o600
        assert not os.path.exists(path)
        machine.run(["echo", "secret"], to_file=str(tmp_path / "printed"))
        assert mode_of(str(tmp_path / "printed")) == 0o600
    finally:
        os.umask(before)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["kubeconfig", "printed"]
