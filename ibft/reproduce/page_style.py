"""How the page of a reproduction looks: light and dark as the reader's system has it, from 320 pixels on."""

STYLE = """
:root {
  color-scheme: light dark; --paper: #ffffff; --ink: #1d2127; --soft: #5b6470; --line: #d9dde2; --raised: #f4f6f8;
  --blue: #005f96; --orange: #a84700; --green: #00714f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --ink: #e6e9ed; --soft: #a3acb8; --line: #353c45; --raised: #1d2228;
    --blue: #6cbcf0; --orange: #f0a066; --green: #5fcfa6;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 56rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; line-height: 1.35; margin: 1.6rem 0 .5rem; }
header p, .reading, figcaption { color: var(--soft); }
.reading, figcaption { font-size: .92rem; }
a { color: var(--blue); }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; font-size: .95rem; }
ul.claims { list-style: none; margin: 0; padding: 0; }
ul.claims li { display: flex; gap: .6rem; padding: .45rem 0; border-bottom: 1px solid var(--line); font-size: .95rem; }
ul.claims li > span:last-child { min-width: 0; }
.mark { flex: 0 0 1.1rem; text-align: center; font-weight: 700; color: var(--soft); }
.higher .mark, .less-memorised .mark { color: var(--blue); }
.lower .mark, .more-memorised .mark { color: var(--orange); }
.exists .mark { color: var(--green); }
details { margin: .5rem 0 0; }
summary { cursor: pointer; color: var(--blue); font-size: .95rem; padding: .3rem 0; }
figure { margin: 0 0 2rem; }
figure img { display: block; width: 100%; height: auto; background: #fff; }
figure img { border: 1px solid var(--line); border-radius: 6px; }
figcaption { margin-top: .5rem; }
.scroll { overflow-x: auto; margin: 0 0 1.5rem; border: 1px solid var(--line); border-radius: 6px; }
.scroll:focus-visible { outline: 2px solid var(--blue); }
table { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .6rem .7rem; color: var(--soft); }
th, td { text-align: left; vertical-align: top; padding: .38rem .7rem; border-top: 1px solid var(--line); }
thead th { background: var(--raised); white-space: nowrap; }
tbody th { font-weight: 500; }
#scores td, #training td, #scores tbody th, #training tbody th { white-space: nowrap; }
#models td, #models tbody th { min-width: 8.5rem; }
#settings td { font-family: ui-monospace, monospace; }
pre { overflow-x: auto; padding: .8rem; background: var(--raised); border-radius: 6px; font-size: .88rem; }
code { font-family: ui-monospace, monospace; font-size: .92em; }
ul.warnings { padding-left: 1.2rem; }
@media print { details > ul { display: block; } .scroll { overflow: visible; } }
"""
