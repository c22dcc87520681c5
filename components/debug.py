"""Keeps secrets out of the SDK's debug messages."""

from typing import Any

import pulumi


def keep_outputs_out_of_messages() -> None:
    """Cuts the values off the message in which the SDK tells a stack's or component's outputs.

    `register_resource_outputs` (pulumi 3.259, pulumi/runtime/resource.py) writes them in the clear,
    secret ones too. On the terminal they show with --debug only, in event logs always.
    """
    debug = pulumi.log.debug

    def without_values(msg: str, *args: Any, **kwargs: Any) -> None:
        debug(msg.partition(", props=")[0], *args, **kwargs)

    pulumi.log.debug = without_values
