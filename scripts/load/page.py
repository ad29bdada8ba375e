"""The report as one HTML file: nothing in it comes from elsewhere, and no script runs."""

from __future__ import annotations

import math
import time
from html import escape

from . import chart
from .advice import notices
from .report import (
    LATENCIES,
    PERCENTILES,
    count_rows,
    describe,
    effort_rows,
    latency_rows,
)
from .results import Results
from .tally import Measure, total

RATES = {
    "Deliveries per second": ("deliveries",),
    "Sends and acks per second": ("sends", "acks"),
    "Coming and going, per second": ("connects", "reconnects", "closed", "refused"),
    "Other commands per second": ("joins", "leaves", "histories", "refreshes", "revoked", "error"),
    "Faults per second": ("lost", "doubled", "reordered", "stray"),
}


def html(results: Results) -> str:
    options = results.options
    body = [
        f"<h1>Load test: {escape(options.scenario)}</h1>",
        f"<p>{escape(describe(options))}<br>{time.strftime('%Y-%m-%d %H:%M:%S %z')}</p>",
        _verdicts(results),
        "".join(f'<p class="notice">{escape(notice)}</p>' for notice in notices(results)),
        "<p>Shaded is the time in which the load was on; before it the clients connect.</p>",
        '<div class="charts">',
        *_charts(results),
        "</div>",
        "<h2>Times, in ms</h2>",
        _table(["", *(f"p{q:g}" for q in PERCENTILES), "max", "count"], latency_rows(results)),
        "<h2>Counts</h2>",
        _table(["", "in all", "per second"], count_rows(results)),
        "<h2>The load test itself</h2>",
        _table(
            ["", "cpu, ramp", "cpu, load", "late p99, ramp", "late p99, load"],
            effort_rows(results),
        ),
        "<p>Times count from the moment something was meant to begin, whether or not the load test "
        "got around to it: what it was late by itself is in them.</p>",
    ]
    title = escape(f"Load test: {options.scenario}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body>{''.join(body)}</body></html>\n"
    )


def _verdicts(results: Results) -> str:
    items = []
    for requirement, value, met in results.verdicts():
        found = "nothing was measured" if value is None else f"{value:,.6g}"
        items.append(
            f'<li class="{"met" if met else "missed"}"><b>{"✓ met" if met else "✗ not met"}</b> '
            f"{escape(str(requirement))} <span>({found})</span></li>"
        )
    return f'<ul class="verdicts">{"".join(items)}</ul>' if items else ""


def _charts(results: Results) -> list[str]:
    load = _load(results)
    curves = [
        (name, histogram.count, [(q, value / 1000) for q, value in histogram.curve()])
        for measure, name in LATENCIES.items()
        if (histogram := results.latencies.get(measure))
    ]
    found = (
        [
            _figure(
                "Latency by percentile",
                [name for name, _, _ in curves],
                chart.percentile_curve(curves),
            )
        ]
        if curves
        else []
    )
    if Measure.DELIVERY in results.latencies:
        found.append(_latency_over_time(results, Measure.DELIVERY, load))
    elif Measure.CONNECT in results.latencies:
        found.append(_latency_over_time(results, Measure.CONNECT, load))
    for title, names in RATES.items():
        lines = [
            chart.Line(name, [(s.at + 1, s.rates.get(name, 0.0)) for s in results.seconds])
            for name in names
            if total(results.counts, name)
        ]
        if lines:
            found.append(_over_time(title, lines, load))
    found.append(
        _over_time(
            "Connections",
            [chart.Line("connected", [(s.at + 1, s.connected) for s in results.seconds])],
            load,
        )
    )
    found.append(
        _over_time(
            "CPU of the busiest process",
            [chart.Line("cpu", [(s.at + 1, 100 * s.cpu) for s in results.seconds])],
            load,
            " %",
        )
    )
    return found


def _load(results: Results) -> tuple[float, float] | None:
    """When the load was on, in seconds of the run."""
    during = [second.at for second in results.seconds if second.phase == "load"]
    return (during[0], during[-1] + 1) if during else None


def _latency_over_time(results: Results, measure: Measure, load: tuple[float, float] | None) -> str:
    told = results.seconds
    lines = [
        chart.Line("p50", [(s.at + 1, s.p50.get(measure, math.nan)) for s in told]),
        chart.Line("p99", [(s.at + 1, s.p99.get(measure, math.nan)) for s in told]),
    ]
    return _over_time(f"Latency of {measure} over time", lines, load, " ms")


def _over_time(
    title: str, lines: list[chart.Line], load: tuple[float, float] | None, unit: str = ""
) -> str:
    return _figure(title, [line.name for line in lines], chart.over_time(lines, load, unit))


def _figure(title: str, names: list[str], svg: str) -> str:
    legend = "".join(
        f'<li><i class="s{number % chart.SERIES}"></i>{escape(name)}</li>'
        for number, name in enumerate(names)
    )
    return f"<figure><figcaption>{escape(title)}</figcaption><ul>{legend}</ul>{svg}</figure>"


def _table(head: list[str], rows: list[list[str]]) -> str:
    def cells(row: list[str], tag: str) -> str:
        return "".join(f"<{tag}>{escape(text)}</{tag}>" for text in row)

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="table"><table><tr>{cells(head, "th")}</tr>{body}</table></div>'


_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1c1e21; --quiet: #5d6570; --grid: #e3e6ea;
  --band: #f3f5f8; --good: #13713c; --bad: #b3261e; --warn: #fff4dc; --warn-text: #5c4200;
  --s0: #2a78d6; --s1: #d9541e; --s2: #14966a; --s3: #b87b00; --s4: #c8487e; --s5: #4a3aa7;
  --s6: #5f7d00; --s7: #7a5c45; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171a; --text: #e8eaed; --quiet: #9aa3ad; --grid: #2b3138; --band: #1c2126;
    --good: #62c98c; --bad: #ff8a80; --warn: #3a2f12; --warn-text: #ffdf9b;
    --s0: #5b9df0; --s1: #f0814d; --s2: #35bd8d; --s3: #dda428; --s4: #e67fa8; --s5: #a598f2;
    --s6: #a8c13f; --s7: #c4a184; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1060px; padding: 1.5rem 1rem 3rem; background: var(--page);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { color: var(--quiet); margin: .5rem 0; }
ul { list-style: none; margin: 0; padding: 0; }
.verdicts { margin: 1rem 0; } .verdicts span { color: var(--quiet); }
.met b { color: var(--good); } .missed b { color: var(--bad); }
.notice { background: var(--warn); color: var(--warn-text); border-radius: 6px;
  padding: .6rem .8rem; }
.charts { display: grid; gap: 1.5rem; margin-top: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
figure { margin: 0; min-width: 0; } figcaption { font-weight: 600; }
figure ul { display: flex; flex-wrap: wrap; gap: 0 1rem; font-size: 13px; color: var(--quiet); }
figure i { display: inline-block; width: 14px; height: 3px; margin-right: .4em;
  vertical-align: middle; }
svg { display: block; width: 100%; height: auto; font-size: 12px; }
svg text { fill: var(--quiet); } .grid { stroke: var(--grid); } .band { fill: var(--band); }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
circle { fill-opacity: 0; } circle:hover { fill-opacity: 1; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .9rem .25rem 0; white-space: pre; }
th { color: var(--quiet); font-weight: 500; border-bottom: 1px solid var(--grid); }
td { border-bottom: 1px solid var(--grid); } th:first-child, td:first-child { text-align: left; }
""" + "".join(
    f".line.s{n} {{ stroke: var(--s{n}); }} circle.s{n} {{ fill: var(--s{n}); }} "
    f"i.s{n} {{ background: var(--s{n}); }}\n"
    for n in range(chart.SERIES)
)
