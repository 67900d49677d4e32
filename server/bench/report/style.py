"""The style sheet of the report."""

STYLE = """
:root { color-scheme: light; --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --paper: #f8fafc; }
* { box-sizing: border-box; }
body { margin: 0; font: 15px/1.55 system-ui, -apple-system, 'Segoe UI', sans-serif; color: var(--ink);
       background: var(--paper); }
main { max-width: 1180px; margin: 0 auto; padding: 2.2rem 1.2rem 3rem; }
h1 { font-size: 1.7rem; margin: 0; letter-spacing: -.01em; } h2 { font-size: 1.15rem; margin: 0 0 .7rem; }
p { margin: .4rem 0 .8rem; } p.lead, .note { color: var(--soft); } .note { font-size: .87rem; }
section { background: #fff; border: 1px solid var(--line); border-radius: 12px;
          padding: 1.2rem 1.3rem; margin: 1.1rem 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: .8rem; margin: 1.2rem 0; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 12px; padding: .8rem 1rem; }
.card b { display: block; font-size: 1.4rem; font-variant-numeric: tabular-nums; }
.card > span { color: var(--soft); font-size: .85rem; }
.pass { color: #047857; } .fail { color: #b91c1c; } .inconclusive { color: #a16207; }
.badge { display: inline-block; padding: .05rem .6rem; border-radius: 999px; font-weight: 600; font-size: .85rem;
         border: 1px solid currentcolor; margin-right: .3rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .88rem; margin: .5rem 0; }
th { color: var(--soft); font-weight: 600; } th, td { text-align: left; padding: .38rem .55rem; vertical-align: top;
     border-bottom: 1px solid var(--line); } tbody tr:last-child td { border-bottom: 0; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { background: var(--paper); border-radius: 8px; padding: .6rem .8rem; overflow-x: auto;
      font-size: .8rem; margin: .6rem 0; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; } .two > *, .figure { min-width: 0; }
@media (max-width: 860px) { .two { grid-template-columns: 1fr; } }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""
