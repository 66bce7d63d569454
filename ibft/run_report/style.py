"""How the page looks beyond what it shares with a reproduction's: charts whose colours are told apart by colour-blind
readers (after Okabe and Ito; dashes differ too), on light and on dark."""

from itertools import pairwise

from ibft.reproduce.page_style import STYLE as SHARED

# ColorBrewer's YlGnBu: of one order also in greys and to the colour-blind. On dark paper it goes the other way, so that
# what is least is next to the paper on both
_HEAT = ("fbfcd3", "edf8b1", "c7e9b4", "7fcdbb", "41b6c4", "1d91c0", "225ea8", "253494", "081d58")


def heat_colours() -> list[str]:
    """The nine, and between each two their mean."""
    colours = [tuple(bytes.fromhex(colour)) for colour in _HEAT]
    between = [tuple((a + b) // 2 for a, b in zip(*two, strict=True)) for two in pairwise(colours)]
    mixed = [colour for pair in zip(colours, between, strict=False) for colour in pair] + [colours[-1]]
    return [f"#{bytes(colour).hex()}" for colour in mixed]


def heat_rules(colours: list[str]) -> str:
    return " ".join(f"figure.heat .k{number} {{ fill: {colour}; }}" for number, colour in enumerate(colours))


STYLE = (
    SHARED
    + """
:root { --c0: #0068a8; --c1: #c24a00; --c2: #007d58; --c3: #a3468b; --c4: #7a6200; --c5: #4a5560; }
@media (prefers-color-scheme: dark) {
  :root { --c0: #62b8f2; --c1: #f5975a; --c2: #4fcb9f; --c3: #e79fce; --c4: #e3c73f; --c5: #c3cad3; }
}
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1.4rem 1.6rem; }
.charts figure { margin: 0; min-width: 0; }
.charts figcaption { margin: 0 0 .3rem; }
.charts figcaption b { color: var(--ink); }
.charts + .reading { margin-top: 1rem; }
figure.chart svg { display: block; width: 100%; height: auto; }
figure.chart text { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); fill: none; }
svg g path { fill: none; stroke: currentColor; stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round; }
svg g path.pale { stroke-width: 1; stroke-dasharray: none; opacity: .3; }
svg g circle { fill: currentColor; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.d1 path { stroke-dasharray: 6 4; } .d2 path { stroke-dasharray: 1 4; } .d3 path { stroke-dasharray: 8 3 1 3; }
.d4 path { stroke-dasharray: 12 4; }
ul.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: 0 0 .9rem; padding: 0; }
ul.legend li { display: flex; align-items: center; gap: .45rem; min-width: 0; font-size: .92rem; }
ul.legend svg { flex: 0 0 30px; height: 8px; }
ul.legend span { min-width: 0; overflow-wrap: anywhere; }
#runs thead th { white-space: normal; overflow-wrap: anywhere; }
#runs td { min-width: 10rem; max-width: 24rem; overflow-wrap: anywhere; }
#outcome td, #outcome tbody th, #rows td, #scores td { white-space: nowrap; }
#warnings td { min-width: 6rem; }
#settings td { min-width: 8rem; overflow-wrap: anywhere; }
details .scroll { margin-top: .6rem; }
figure.heat g path { stroke: none; shape-rendering: crispEdges; }
"""
    + heat_rules(heat_colours())
    + f"\n@media (prefers-color-scheme: dark) {{ {heat_rules(heat_colours()[::-1])} }}\n"
)
