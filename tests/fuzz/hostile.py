"""What a settings file, a spec or a program's output may hold that nobody meant well by."""

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

Place = tuple[Any, ...]


def examples(sample: int) -> settings:
    """The profile of a fuzz test: `make test` takes a sample, `make fuzz` that many times more."""
    return settings(
        max_examples=sample * int(os.environ.get("HOMELAB_FUZZ", "1")),
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


TEXTS = (
    # shells
    "; touch /tmp/hostile", "$(touch /tmp/hostile)", "`touch /tmp/hostile`", "a|b", "a&&b", "a>b",
    "'", '"', "'\"'\"'", "\\", "$HOME", "${IFS}", "*", "~root", "a b", "!!", "#",
    # options
    "-", "--", "--help", "-oProxyCommand=touch /tmp/hostile", "--upload-pack=touch /tmp/hostile",
    "--kubeconfig=/etc/hostile",
    # line ends, control characters, terminals
    "a\nb", "a\r\nb", "a\0b", "\t", "\x1b[2J", "\x7f", "\x85", "a\u2028b",
    # look-alikes, direction, what cannot be encoded
    "\u0430dmin", "\uff0e\uff0e\uff0f", "\u202egnp.exe", "\u200b", "\u0661\u0662", "\u212a",
    "\u017f", "e\u0301", "\U0001f4a9", "\ud800", "\ufeff",
    # paths
    "..", "../../etc/shadow", "/etc/../root/.ssh", "/", "//", "/dev/null", "/proc/self/environ",
    "C:\\", "file:///etc/passwd",
    # YAML, JSON, Go templates, k3d's and systemd's expansion, formats
    "!!python/object/apply:os.system [id]", "&a", "*a", "{", "[", "null", "~", "yes", "1e3",
    "0x10", "0o17", "2026-01-01", "<<", "{{.}}", "{{ env }}", "${", "%h", "%n", "%s", "{0}",
    "__proto__", "__class__",
    # addresses
    "0.0.0.0", "::", "169.254.169.254", "127.0.0.1@example.org", "256.1.1.1", "1.1.1.1/0",
    "http://[", "https://user:hunter2@example.org", "example.org:99999", "a" * 64, "a." * 200,
    # lengths
    "", " ", "a" * 300, "a" * 5000, "9" * 400,
)  # fmt: skip
SCALARS = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**64), 10**400, 0.5, 1e400, -0.0),
    *([], {}, [[]], {"": ""}, [None], {"kind": "x"}, {"secure": "v1:x"}, [{}] * 3),
)
ANY_TEXT = st.sampled_from(TEXTS) | st.text(max_size=40)
ANYTHING = (
    ANY_TEXT
    # A value that is changed in one example must be as it was in the next.
    | st.sampled_from(SCALARS).map(copy.deepcopy)
    | st.integers()
    | st.lists(ANY_TEXT, max_size=3)
    | st.dictionaries(ANY_TEXT, ANY_TEXT, max_size=2)
)


def places(node: Any, path: Place = ()) -> Iterator[Place]:
    """Paths of all values in nested mappings and lists."""
    if path:
        yield path
    inner: Any = ()
    if isinstance(node, Mapping):
        inner = node.items()
    elif isinstance(node, Sequence) and not isinstance(node, str):
        inner = enumerate(node)
    for key, child in inner:
        yield from places(child, (*path, key))


def at(node: Any, path: Place) -> Any:
    for key in path:
        node = node[key]
    return node


@st.composite
def mutated(draw: st.DrawFn, whole: Any, where: Sequence[Place]) -> Any:
    """A copy of ``whole`` in which one to three of the places ``where`` are not as they were."""
    changed = copy.deepcopy(whole)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        path = draw(st.sampled_from(where))
        try:
            container = at(changed, path[:-1])
            value = container[path[-1]]
        except (KeyError, IndexError, TypeError):
            continue  # gone with what was changed before
        if not isinstance(container, dict | list):
            continue
        how = draw(st.sampled_from(["replace", "replace", "insert", "insert", "rename", "more"]))
        if how == "insert" and isinstance(value, str):
            hostile, cut = draw(ANY_TEXT), draw(st.integers(0, len(value)))
            container[path[-1]] = value[:cut] + hostile + value[cut:]
        elif how == "rename" and isinstance(container, dict):
            del container[path[-1]]
            container[draw(ANY_TEXT | st.just(f"{path[-1]}x"))] = value
        elif how == "more" and isinstance(value, list) and value:
            container[path[-1]] = value * draw(st.sampled_from([2, 50]))
        elif how == "more" and isinstance(value, dict):
            value[draw(ANY_TEXT)] = draw(ANYTHING)
        else:
            container[path[-1]] = draw(ANYTHING)
    return changed
