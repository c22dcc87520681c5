"""placeholder"""


def adopt() -> None: ...
