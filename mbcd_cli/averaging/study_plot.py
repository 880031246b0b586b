"""The one figure of a study of averages: what each gains on the target, and how flat it lies."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from mbcd_cli import plotting
from mbcd_cli.averaging.worth import Summary


def plot_study(rows: Sequence[Summary], path: Path) -> Path:
    """Averages from top to bottom, methods in colours: points over what was trained (95 % interval over seeds), and the
    mean loss increase (standard deviation over targets and seeds)."""
    averages = list(dict.fromkeys(row.average for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    fig, (gains, flat) = plotting.figure(1, 2, size=(10.4, 1.6 + 0.34 * len(averages)), sharey=True)
    for number, (method, colour) in enumerate(zip(methods, cycle(plotting.PALETTE), strict=False)):
        place = (number - (len(methods) - 1) / 2) * 0.6 / max(len(methods), 2)
        look = {"fmt": "o", "color": colour, "markersize": 4, "capsize": 2, "linewidth": 1}
        for row in (row for row in rows if row.method == method):
            y = averages.index(row.average) + place
            if row.gain is not None:
                half = (row.gain.interval()[1] - row.gain.value) if row.gain.freedom else 0.0
                gains.errorbar(row.gain.value, y, xerr=half or None, **look)
            flat.errorbar(row.increase.value, y, xerr=row.increase.std, **look)
        flat.errorbar([], [], **look, label=plotting.legend_label(method))
    gains.axvline(0, color="#777777", linewidth=0.8)
    gains.set_yticks(range(len(averages)), averages)
    gains.invert_yaxis()
    gains.set(xlabel="points on the target over what was trained", title="Target accuracy")
    flat.set(xlabel="mean loss increase (nats)", title="Flatness")
    if all(row.increase.value >= 0 for row in rows):
        flat.set_xlim(left=0)  # a spread that reaches below is no loss that falls
    fig.legend(loc="outside right upper")
    return plotting.save(fig, path)
