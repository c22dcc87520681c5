"""The picture of a stack: what is declared is in it, nothing lies over something else, and those in
the repository are current.
"""

import re
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest

from components import settings
from components.settings import Settings
from diagram.platform import picture

ROOT = Path(__file__).parents[2]
FILES = settings.stack_files(ROOT)
SVG = "{http://www.w3.org/2000/svg}"


def drawn(file: Path) -> str:
    return picture(file.name.split(".")[1], settings.read_file(file)[0]).svg()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_picture_of_each_stack_is_current_and_in_a_page(file: Path):
    name = file.name.split(".")[1]
    assert (ROOT / f"docs/diagrams/{name}.svg").read_text() == drawn(file), (
        f"make diagram STACK={name}"
    )
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    assert any(f"diagrams/{name}.svg)" in page.read_text() for page in pages)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_boxes_lie_in_or_beside_each_other_and_all_text_lies_in_the_picture(file: Path):
    root = ElementTree.fromstring(drawn(file))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    boxes = [
        (x, y, x + float(box.attrib["width"]), y + float(box.attrib["height"]))
        for box in root.findall(f"{SVG}rect")[1:]
        for x, y in [(float(box.attrib["x"]), float(box.attrib["y"]))]
    ]
    for one, other in combinations(boxes, 2):
        beside = (
            one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        )
        within = one[0] < other[0] and one[1] < other[1] and one[2] > other[2] and one[3] > other[3]
        assert beside or within
    assert all(0 < x < right < width and 0 < y < low < height for x, y, right, low in boxes)
    texts = [float(text.attrib["y"]) for text in root.findall(f"{SVG}text")]
    assert len(texts) > len(boxes)
    assert all(0 < y < height for y in texts)


def test_each_route_is_a_curve_from_its_name_to_its_service():
    p510 = settings.read_file(ROOT / "Pulumi.p510.yaml")[0]
    routes = [route for tunnel in p510.tunnels.values() for route in tunnel.routes]
    svg = drawn(ROOT / "Pulumi.p510.yaml")
    assert svg.count('fill="none"') == len(routes)
    for route in routes:
        assert f"<tspan>{route.hostname}</tspan>" in svg
    assert "<tspan>localhost:32400</tspan>" in svg


def test_what_a_setting_says_is_text_and_no_markup():
    stack = Settings.model_validate(
        {
            "cluster": {
                "kind": "existing",
                "name": "lab",
                "kubeconfig": {"file": "/k", "context": "a"},
                "nodes": {"one": {"address": "192.168.1.2"}},
                "podSubnet": "10.244.0.0/16",
                "serviceSubnet": "10.96.0.0/12",
                "storageClass": "local",
            }
        },
        by_alias=True,
        by_name=False,
    )
    svg = picture("a<b>&c", stack).svg()
    assert "a&lt;b&gt;&amp;c: the declared platform" in svg
    assert not re.search(r"<b>", svg)
