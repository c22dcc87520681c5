"""How long the newest of what is taken on a schedule of cron may be old."""

from datetime import timedelta

import pytest

from status.look import _longest_gap  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize(
    ("cron", "gap"),
    [
        ("0 */12 * * *", timedelta(hours=12)),
        ("15 * * * *", timedelta(hours=1)),
        ("*/20 * * * *", timedelta(minutes=20)),
        ("* * * * *", timedelta(minutes=1)),
        ("50/5 * * * *", timedelta(minutes=55)),
        ("0 9-17 * * *", timedelta(hours=16)),
        ("0 3,4 * * *", timedelta(hours=23)),
        ("0 3 * * 1-5", timedelta(days=3)),
        ("0 3 * * 7", timedelta(days=7)),
        ("0 3 1 * *", timedelta(days=31)),
        ("0 3 1 * 0", timedelta(days=7)),
        ("0 3 29 2 *", timedelta(days=4 * 365)),
        ("0 0 30 2 *", timedelta(days=4 * 365)),
    ],
)
def test_the_longest_gap_between_two_runs_of_a_schedule(cron: str, gap: timedelta) -> None:
    assert _longest_gap(cron) == gap
