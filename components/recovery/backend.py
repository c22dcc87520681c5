"""The files of a `file://` backend, which a killed `pulumi` can leave half written."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from components.recovery.engine import Engine, RecoveryError


def mend(engine: Engine) -> None:
    """Makes a state that cannot be read readable again, from what Pulumi itself left beside it.

    Pulumi writes the checkpoint atomically, but not the file with its attributes, which may be left
    empty; without one they are the defaults (gocloud.dev/blob/fileblob). A checkpoint that is
    damaged all the same is replaced by the one of the write before, which Pulumi keeps: what was
    recorded since is pending there.

    Raises RecoveryError for another backend, and where no whole checkpoint is left.
    """
    project = engine.project
    url = json.loads(engine.run("whoami", "--verbose", "--json", on_stack=False))["url"]
    if not url.startswith("file://"):
        raise RecoveryError(
            f"the state cannot be read from {url}.\n  Cause: see `pulumi stack export`\n"
            "  Remedy: restore its last version in that backend; then run this again."
        )
    root = Path(unquote(urlsplit(url).path or urlsplit(url).netloc)).expanduser() / ".pulumi"
    for attributes in _attributes(root, project, engine.stack):
        if not _is_json(attributes):
            attributes.unlink()
            engine.say(f"state: {attributes} was cut off while it was written: removed")
    checkpoint = root / "stacks" / project / f"{engine.stack}.json"
    before = checkpoint.with_name(checkpoint.name + ".bak")
    if checkpoint.exists() and not _is_json(checkpoint):
        if not _is_json(before):
            raise RecoveryError(
                f"{checkpoint} is damaged, and so is {before}.\n  Cause: not JSON\n  Remedy: put"
                f" the newest whole *.checkpoint.json of {root}/history/{project}/{engine.stack} in"
                f" its place; without one, remove it and `make adopt STACK={engine.stack}`."
            )
        shutil.copy(checkpoint, checkpoint.with_name(checkpoint.name + ".damaged"))
        shutil.copy(before, checkpoint)
        engine.say(f"state: {checkpoint} was damaged: restored from {before}, of one write before")


def _attributes(root: Path, project: str, stack: str) -> Iterator[Path]:
    yield from (root / "stacks" / project).glob(f"{stack}.json*.attrs")
    yield from (root / "locks" / "organization" / project / stack).glob("*.attrs")


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True
