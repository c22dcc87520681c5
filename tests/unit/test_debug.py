"""No debug message of the SDK shows the values of outputs."""

import logging

import pulumi

from components import debug


class Holder(pulumi.ComponentResource):
    """Registers a secret output, as the kubeconfig's component does."""

    def __init__(self) -> None:
        super().__init__("homelab:index:Holder", "holder")
        self.register_outputs({"content": pulumi.Output.secret("c4n4ry")})


def test_a_secret_output_is_in_no_debug_message(run_program, monkeypatch, caplog):
    monkeypatch.setattr(pulumi.log, "debug", lambda message, *_: logging.debug(message))
    caplog.set_level("DEBUG")
    run_program(Holder)
    assert "c4n4ry" in caplog.text  # without it the SDK shows the value
    caplog.clear()
    debug.keep_outputs_out_of_messages()
    run_program(Holder)
    assert "register resource outputs prepared: urn=" in caplog.text
    assert "c4n4ry" not in caplog.text
