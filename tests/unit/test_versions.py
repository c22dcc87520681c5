"""Versions are named in one place, and Renovate finds all of them.

- Nothing in the program names an image or a chart's version but components/versions.py; what pages,
  comments and examples show agrees with it.
- Renovate's patterns find every version of that file, everything that must follow it, and what
  set-up installs.
"""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from components import versions
from components.network.multus import CNI_VERSION
from components.settings.model import Image
from hostctl.install import K3D_VERSION
from setup import tools

ROOT = Path(__file__).parents[2]
VERSIONS = ROOT / "components" / "versions.py"
DECLARED = {name: value for name, value in vars(versions).items() if name.isupper()}
IMAGES = [value for value in DECLARED.values() if isinstance(value, str)]
CHARTS = [value for value in DECLARED.values() if isinstance(value, versions.Chart)]

# An image with a path and a version, such as `rancher/k3s:v1.31.5-k3s1`; a name that something
# else stands before is another image or a URL.
_IMAGE = re.compile(r"(?<![\w./:-])[a-z0-9.-]+(?:/[a-z0-9._-]+)+:v?[0-9][\w.-]*\w(?:@sha256:\w+)?")
# hostctl pins the k3d that it installs; CNI's is that of a specification.
_OTHERS = (K3D_VERSION, CNI_VERSION)
_VERSION = re.compile(r"v?[0-9]+\.[0-9]+\.[0-9]+(?:[-+][\w.]+)?")


def shown() -> list[Path]:
    """Where an image may be shown: pages, what runs on the host, the schema. The page on upgrades
    shows releases that follow each other.
    """
    pages = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")]
    pages.remove(ROOT / "docs" / "upgrade.md")
    return [*pages, *ROOT.glob("hostctl/*.py"), ROOT / "settings.schema.json"]


def renovate() -> list[dict[str, Any]]:
    """Renovate's own managers, their patterns as Python writes them."""
    managers = json.loads((ROOT / "renovate.json").read_text())["customManagers"]
    for manager in managers:
        manager["files"] = [re.compile(p.strip("/")) for p in manager["managerFilePatterns"]]
        strings = (text.replace("(?<", "(?P<") for text in manager["matchStrings"])
        manager["patterns"] = [re.compile(text) for text in strings]
    return managers


def found(path: Path) -> Iterator[dict[str, Any]]:
    """What Renovate finds in a file."""
    name = path.relative_to(ROOT).as_posix()
    for manager in renovate():
        if any(pattern.search(name) for pattern in manager["files"]):
            for pattern in manager["patterns"]:
                for match in pattern.finditer(path.read_text()):
                    datasource = manager.get("datasourceTemplate")
                    yield {"datasource": datasource, **match.groupdict()}


def texts(path: Path) -> Iterator[tuple[str, int]]:
    """All text of a program but its docstrings' and comments', with its line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value, node.lineno


@pytest.mark.parametrize("path", sorted(ROOT.glob("components/**/*.py")), ids=lambda p: p.name)
def test_no_other_part_of_the_program_names_a_version(path: Path) -> None:
    if path == VERSIONS:
        return
    named = [
        f"{path.name}:{line}: {text}"
        for text, line in texts(path)
        if _IMAGE.search(text) or (_VERSION.fullmatch(text) and text not in _OTHERS)
    ]
    assert named == []
    comments = re.findall(r"#.*", path.read_text())
    assert [image for text in comments for image in _IMAGE.findall(text)] == []


@pytest.mark.parametrize("path", shown(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_an_image_is_shown_in_its_current_version(path: Path) -> None:
    assert set(_IMAGE.findall(path.read_text())) <= set(IMAGES)


@pytest.mark.parametrize("path", sorted(ROOT.glob("Pulumi.*.yaml")), ids=lambda p: p.name)
def test_comments_of_a_stack_file_show_images_in_their_current_version(path: Path) -> None:
    comments = " ".join(re.findall(r"#.*", path.read_text()))
    assert set(_IMAGE.findall(comments)) <= set(IMAGES)


def test_images_are_pinned_as_the_settings_demand() -> None:
    assert IMAGES
    for image in IMAGES:
        assert TypeAdapter(Image).validate_python(image) == image


def test_renovate_finds_every_declared_version() -> None:
    seen = {(f["depName"], f["currentValue"]) for f in found(VERSIONS)}
    images = {tuple(image.partition("@")[0].rsplit(":", 1)) for image in IMAGES}
    assert seen == images | {(chart.name, chart.version) for chart in CHARTS}
    repositories = {f["registryUrl"] for f in found(VERSIONS) if f["datasource"] == "helm"}
    assert repositories == {chart.repository for chart in CHARTS}


@pytest.mark.parametrize("path", shown(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_renovate_finds_every_image_that_is_shown(path: Path) -> None:
    seen = [f for f in found(path) if f["datasource"] == "docker"]
    assert len(seen) == len(_IMAGE.findall(path.read_text()))


@pytest.mark.parametrize("name", ["docs/settings.md", "settings.schema.json"])
def test_renovate_finds_the_charts_that_are_shown_and_they_are_current(name: str) -> None:
    seen = [f for f in found(ROOT / name) if f["datasource"] == "helm"]
    assert [f["currentValue"] for f in seen] == [versions.TAILSCALE_OPERATOR.version]


def test_renovate_finds_what_set_up_installs() -> None:
    seen = {f["depName"]: f["currentValue"] for f in found(ROOT / "setup" / "tools.py")}
    assert seen == {tool.name: tool.version for tool in (tools.UV, tools.PULUMI)}


def test_a_k3s_release_is_read_as_version_and_build() -> None:
    rules = json.loads((ROOT / "renovate.json").read_text())["packageRules"]
    (rule,) = (rule for rule in rules if rule.get("matchPackageNames") == ["rancher/k3s"])
    pattern = rule["versioning"].removeprefix("regex:").replace("(?<", "(?P<")
    match = re.fullmatch(pattern, versions.K3S.partition(":")[2])
    assert match
    assert set(match.groupdict()) == {"major", "minor", "patch", "build"}
