"""The picture of the fan-out comparison: bars, in SVG.

It has no background and one grey for all text, which is legible on white and on black: a page that
shows it as an image says nothing of its theme.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

WIDTH, LABELS, VALUES = 720, 100, 220
"""Pixels: all of it, left of the bars, right of the longest bar."""
HEAD, PANEL, ROW, BAR, FOOT = 30, 40, 26, 16, 36
"""Heights: of the title, of a panel's heading, of a server's row and its bar, of the last line."""
INK, OURS, OTHERS = "#768390", "#2f81f7", "#8b949e"


def picture(result: dict[str, Any], ours: str, machine: str) -> str:
    """A panel for each number of messages in flight, each with a scale of its own, from zero."""
    windows = list(dict.fromkeys(row["window"] for row in result["rows"]))
    panels = [[row for row in result["rows"] if row["window"] == each] for each in windows]
    height = HEAD + sum(PANEL + ROW * len(rows) for rows in panels) + FOOT
    title = f"Deliveries per second in one room of {result['sockets']:,} receivers"
    svg = ET.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {WIDTH} {height}",
            "role": "img",
            "font-family": "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif",
            "font-size": "13",
            "fill": INK,
        },
    )
    ET.SubElement(svg, "title").text = title
    _text(svg, 0, 20, title, weight="600")
    top = HEAD
    for window, rows in zip(windows, panels, strict=True):
        messages = "One message" if window == 1 else f"{window} messages"
        _text(svg, 0, top + 24, f"{messages} in flight")
        top += PANEL
        _bars(svg, top, rows, ours)
        top += ROW * len(rows)
    _text(svg, 0, height - 12, machine, size="11")
    ET.indent(svg)
    return ET.tostring(svg, encoding="unicode") + "\n"


def _bars(svg: ET.Element, top: int, rows: list[dict[str, Any]], ours: str) -> None:
    longest = max(row["deliveries"] for row in rows)
    own = next(row for row in rows if row["server"] == ours)
    for index, row in enumerate(rows):
        is_ours = row["server"] == ours
        width = (WIDTH - LABELS - VALUES) * row["deliveries"] / longest
        weight = "600" if is_ours else "400"
        y = top + index * ROW
        _text(svg, LABELS - 10, y + 13, row["server"], anchor="end", weight=weight)
        ET.SubElement(
            svg,
            "rect",
            {
                "x": str(LABELS),
                "y": str(y),
                "width": f"{width:.1f}",
                "height": str(BAR),
                "rx": "2",
                "fill": OURS if is_ours else OTHERS,
            },
        )
        value = f"{row['deliveries']:,.0f}"
        if not is_ours:
            value += f" (chatserver: {own['x ' + row['server']]:.2g} ×)"
        _text(svg, LABELS + width + 8, y + 13, value, weight=weight)


def _text(
    svg: ET.Element,
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    weight: str = "400",
    size: str = "13",
) -> None:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}
    ET.SubElement(svg, "text", place | {"font-weight": weight, "font-size": size}).text = text
