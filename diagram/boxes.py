"""Boxes of text in boxes, and curves between their lines, as SVG."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import drawsvg

LINE, PAD, GAP, TITLE = 19, 12, 12, 24
_FONT = "ui-sans-serif, system-ui, Helvetica, Arial, sans-serif"
# Of this font's letters at 13 px; a little more than most take, since a viewer may have another.
_LETTER = 7.1
_FILLS = ("#ffffff", "#f4f6f9", "#ffffff", "#f4f6f9")


@dataclass(frozen=True)
class Line:
    """A line of text. ``key`` names it for a curve; ``note`` is said behind it in grey."""

    text: str
    note: str = ""
    key: str = ""

    @property
    def width(self) -> float:
        return (len(self.text) + (len(self.note) + 2 if self.note else 0)) * _LETTER


@dataclass(frozen=True)
class Box:
    """A titled box: its lines, and below them its boxes, one below the other."""

    title: str
    lines: Sequence[Line] = ()
    boxes: Sequence["Box"] = ()
    color: str = "#54708f"

    @property
    def width(self) -> float:
        inside = [self._head, *(line.width for line in self.lines), *(b.width for b in self.boxes)]
        return max(inside) + 2 * PAD

    @property
    def _head(self) -> float:
        # Bold is wider.
        return len(self.title) * _LETTER * 1.1

    @property
    def height(self) -> float:
        lines = len(self.lines) * LINE + (4 if self.lines and self.boxes else 0)
        boxes = sum(box.height + GAP for box in self.boxes)
        return TITLE + lines + boxes + (0 if self.boxes else PAD - 4)


@dataclass
class Picture:
    """Columns of boxes, left to right, and curves from a line to one right of it."""

    title: str
    columns: Sequence[Sequence[Box]]
    curves: Sequence[tuple[str, str]]
    _ends: dict[str, tuple[float, float, float]] = field(default_factory=dict, init=False)

    def svg(self) -> str:
        """The same text for the same boxes."""
        widths = [max((box.width for box in column), default=0) for column in self.columns]
        heights = [sum(box.height + 2 * GAP for box in column) for column in self.columns]
        margin, top = 24, 56
        # Only the first column has curves to the next.
        spaces = [110 if self.curves else 40, *(40 for _ in widths)]
        width = sum(widths) + sum(spaces[: len(widths) - 1]) + 2 * margin
        height = max(heights) + top + margin - 2 * GAP
        drawing = drawsvg.Drawing(round(width), round(height))
        drawing.append_title(self.title)
        drawing.append(drawsvg.Rectangle(0, 0, "100%", "100%", fill="#ffffff"))
        drawing.append(_text(self.title, 20, margin, 34, "#1d2b3a", bold=True))
        shapes: list[drawsvg.DrawingElement] = []
        x = float(margin)
        for column, wide, tall, space in zip(self.columns, widths, heights, spaces, strict=False):
            y = top + (max(heights) - tall) / 2
            for box in column:
                shapes += self._draw(box, x, y, wide, 0)
                y += box.height + 2 * GAP
            x += wide + space
        drawing.extend(shapes)
        # Above the boxes, whose fill would hide them.
        drawing.extend(self._curves())
        return f"{drawing.as_svg()}\n"

    def _draw(
        self, box: Box, x: float, y: float, width: float, depth: int
    ) -> Iterator[drawsvg.DrawingElement]:
        look: dict[str, Any] = {
            "rx": 6,
            "fill": _FILLS[depth],
            "stroke": box.color,
            "stroke_width": 1.4,
        }
        yield drawsvg.Rectangle(_n(x), _n(y), _n(width), _n(box.height), **look)
        yield _text(box.title, 13, x + PAD, y + 19, box.color, bold=True)
        y += TITLE
        for line in box.lines:
            self._ends[line.key or line.text] = (x + PAD - 5, x + width - PAD + 5, y + LINE / 2 + 1)
            text = _text(line.text, 13, x + PAD, y + 14, "#1d2b3a")
            if line.note:
                text.append(drawsvg.TSpan(f"\u2002{line.note}", fill="#77818c"))
            yield text
            y += LINE
        y += 4 if box.lines and box.boxes else 0
        for inner in box.boxes:
            yield from self._draw(inner, x + PAD, y, width - 2 * PAD, depth + 1)
            y += inner.height + GAP

    def _curves(self) -> Iterator[drawsvg.DrawingElement]:
        for source, target in self.curves:
            (_, x, y), (to_x, _, to_y) = self._ends[source], self._ends[target]
            bend = (to_x - x) / 2
            path = drawsvg.Path(fill="none", stroke="#c0703a", stroke_width=1.3, opacity=0.85)
            path.M(_n(x), _n(y)).C(
                _n(x + bend), _n(y), _n(to_x - bend), _n(to_y), _n(to_x - 5), _n(to_y)
            )
            yield path
            tip = (to_x, to_y, to_x - 6, to_y - 3, to_x - 6, to_y + 3)
            yield drawsvg.Lines(*map(_n, tip), close=True, fill="#c0703a")


def _n(number: float) -> float:
    return round(number, 1)


def _text(text: str, size: int, x: float, y: float, fill: str, *, bold: bool = False) -> Any:
    more: dict[str, Any] = {"font_weight": "bold"} if bold else {}
    # A Text of several parts is given its first part like the others.
    element = drawsvg.Text("", size, _n(x), _n(y), fill=fill, font_family=_FONT, **more)
    element.append(drawsvg.TSpan(text))
    return element
