"""The page's style sheet. Pictures stretch with the page while their text keeps its size, see `charts`."""

from worker.engine.catalog.drawing.colours import (
    AMOUNT_DARK,
    AMOUNT_LIGHT,
    BALANCE_DARK,
    BALANCE_LIGHT,
    DARK,
    LEVELS,
    LIGHT,
    LINES,
    variables,
)

LEVEL_RULES = "\n".join(f".{ramp}{i} {{ fill: var(--{ramp}{i}); }}" for ramp in "ab" for i in range(LEVELS))
LINE_RULES = "\n".join(f".l{i} {{ --mark: var(--line{i}); }}" for i in range(1, LINES + 1))

STYLE = (
    f":root {{ color-scheme: light dark; {variables(LIGHT, AMOUNT_LIGHT, BALANCE_LIGHT)} }}\n"
    "@media screen and (prefers-color-scheme: dark) {\n"
    f":root {{ {variables(DARK, AMOUNT_DARK, BALANCE_DARK)} }}\n}}\n"
    + LEVEL_RULES
    + "\n"
    + LINE_RULES
    + """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
header, main, footer, nav { max-width: 72rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.5rem; }
.kind { margin: 0; color: var(--muted); font-size: .875rem; }
h1 { margin: .1rem 0 .5rem; font-size: 1.9rem; line-height: 1.2; font-weight: 650; letter-spacing: -.015em;
  overflow-wrap: anywhere; }
h2 { margin: 0 0 .35rem; font-size: 1.3rem; line-height: 1.3; font-weight: 650; letter-spacing: -.01em; }
h3 { margin: 0 0 .35rem; font-size: 1rem; font-weight: 600; overflow-wrap: anywhere; }
h4 { margin: 0 0 .35rem; font-size: .8125rem; font-weight: 500; color: var(--muted); }
p, ul { margin: .35rem 0 .8rem; max-width: 46rem; overflow-wrap: anywhere; }
.lead { font-size: 1.05rem; color: var(--muted); margin-bottom: 1.4rem; }
.note { color: var(--muted); font-size: .9rem; }
section { padding: 1.8rem 0 1.6rem; border-top: 1px solid var(--rule); scroll-margin-top: .5rem; }
a { color: var(--link); text-underline-offset: .15em; }
a:focus-visible, summary:focus-visible, .scroll:focus-visible, pre:focus-visible {
  outline: 3px solid var(--strong); outline-offset: 2px; border-radius: 3px; }
nav ul { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; list-style: none; margin: 0; padding: .7rem 0;
  max-width: none; font-size: .9rem; }
nav a { display: inline-block; padding: .2rem 0; text-decoration: none; }
nav a:hover { text-decoration: underline; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 1px; margin: 0 0 1.2rem;
  border: 1px solid var(--rule); border-radius: 8px; overflow: hidden; }
.figures div { box-shadow: 0 0 0 1px var(--rule); padding: .8rem 1rem; }
.figures dt { color: var(--muted); font-size: .8125rem; }
.figures dd { margin: 0; font-size: 1.4rem; line-height: 1.3; font-weight: 600; letter-spacing: -.01em;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.figures dd small { display: block; font-size: .8125rem; font-weight: 400; color: var(--muted); letter-spacing: 0;
  line-height: 1.4; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1.4rem 2.5rem;
  margin: 1rem 0; }
.wide { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 2fr); gap: .6rem 2.2rem; margin: .2rem 0 .6rem; }
@media (max-width: 44rem) { .wide { grid-template-columns: minmax(0, 1fr); } }
.cards > *, .wide > * { min-width: 0; }
.narrow { max-width: 46rem; }
.model { margin: 1.3rem 0; }
.card h3 { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem; align-items: baseline; }
.card h3 span:last-child { font-weight: 400; color: var(--muted); font-size: .875rem; white-space: nowrap; }
svg { display: block; overflow: visible; font: 12px/1 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  font-variant-numeric: tabular-nums; }
svg text { fill: var(--muted); }
svg .value { fill: var(--text); font-weight: 600; }
svg .plain { fill: var(--text); }
.rule { stroke: var(--rule); stroke-width: 1; }
.faint { stroke: var(--rule); stroke-width: 1; stroke-dasharray: 1 4; }
.bar { fill: var(--quiet); }
.bar.strong { fill: var(--strong); }
.whisker { stroke: var(--text); stroke-width: 1.5; }
.curve { stroke: var(--mark); stroke-width: 2; }
.band { stroke: var(--mark); stroke-width: 5; stroke-opacity: .22; stroke-linecap: round; }
.mark { fill: var(--mark); stroke: var(--page); stroke-width: 1; }
.hollow { fill: var(--page); stroke: var(--mark); stroke-width: 1.6; }
.ring { fill: none; stroke: var(--text); stroke-width: 1.6; }
.limit { stroke: var(--limit); stroke-width: 1.5; stroke-dasharray: 6 4; }
svg .limit-text { fill: var(--limit); }
.best { stroke: var(--quiet); stroke-width: 1.5; }
.cells { shape-rendering: crispEdges; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; list-style: none; padding: 0; margin: .5rem 0 .8rem;
  font-size: .875rem; max-width: none; }
.key li { display: inline-flex; gap: .4rem; align-items: center; overflow-wrap: anywhere; }
.key svg { flex: none; }
.ramp { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; font-size: .8125rem; color: var(--muted);
  font-variant-numeric: tabular-nums; margin: .5rem 0; }
.scroll { overflow-x: auto; max-width: 100%; margin: .5rem 0 .8rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; min-width: 100%; }
caption { text-align: left; color: var(--muted); padding: .2rem 0 .4rem; }
th, td { text-align: left; padding: .38rem 1.3rem .38rem 0; border-bottom: 1px solid var(--rule); vertical-align: top;
  max-width: 26rem; }
th:last-child, td:last-child { padding-right: .2rem; }
thead th { font-weight: 500; color: var(--muted); vertical-align: bottom; }
tbody th { font-weight: 500; }
td, tbody th { min-width: min-content; overflow-wrap: break-word; }
th.n, td.n { text-align: right; }
td.n { white-space: nowrap; }
tr:has(.chosen) > * { background: var(--panel); }
.chosen { font-weight: 600; }
.facts table { min-width: 0; }
.tiny th, .tiny td { padding: .1rem .5rem .1rem 0; font-size: .75rem; }
details { margin: .4rem 0; }
summary { cursor: pointer; color: var(--link); font-size: .9rem; width: fit-content; padding: .15rem 0; }
pre { overflow: auto; max-height: 24rem; padding: .9rem 1rem; margin: .5rem 0 1rem; background: var(--panel);
  border: 1px solid var(--rule); border-radius: 8px;
  font: .8125rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
code { font: .875em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
footer { padding: 1.2rem 1.25rem 3rem; color: var(--muted); font-size: .875rem; }
@media (max-width: 44rem) { body { font-size: 15px; } header { padding-top: 1.5rem; } h1 { font-size: 1.5rem; }
  .letter { display: none; } .figures dd { font-size: 1.15rem; } th, td { max-width: 15rem; } }
@media print { body { font-size: 11px; } nav { display: none; } section { break-inside: auto; }
  .card, .model, svg, tr { break-inside: avoid; } pre { white-space: pre-wrap; max-height: none; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
@media (forced-colors: active) { .cells, .bar, .mark { forced-color-adjust: none; } }
"""
)
