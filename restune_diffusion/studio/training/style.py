"""Style sheet of the tab."""

STYLE = """<style>
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: 0; }
.facts dt { color: var(--body-text-color-subdued); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.refused { margin: .5rem 0 0; padding-left: 1.2rem; overflow-wrap: anywhere; }
.problem { border-left: 4px solid var(--error-border-color, #b91c1c); padding: .5rem .75rem; margin: .5rem 0;
  background: var(--background-fill-secondary); color: var(--body-text-color); overflow-wrap: anywhere; }
.hint { color: var(--body-text-color-subdued); margin: .25rem 0; }
.run-head { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; margin-bottom: .5rem; }
.run-head strong { font-size: 1.15rem; overflow-wrap: anywhere; }
.chip { border: 1px solid var(--border-color-primary); border-radius: 999px; padding: .05rem .7rem; font-size: .9rem;
  color: var(--body-text-color); }
.chip.running, .chip.finished { background: var(--primary-700, #0f766e); color: #fff; border-color: transparent; }
.chip.failed { background: #b91c1c; color: #fff; border-color: transparent; }
.bar { height: .6rem; border-radius: 999px; background: var(--border-color-primary); overflow: hidden;
  margin: .5rem 0; }
.bar > div { height: 100%; background: var(--primary-600, #0d9488); }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .75rem;
  margin: .75rem 0; }
.numbers > div { background: var(--background-fill-secondary); border-radius: .5rem; padding: .5rem .75rem; }
.numbers small { display: block; color: var(--body-text-color-subdued); }
.numbers span { font-size: 1.1rem; font-variant-numeric: tabular-nums; }
.loss-plot { margin: .75rem 0; }
.loss-plot svg { width: 100%; height: auto; max-width: 52rem; }
.loss-plot text { fill: var(--body-text-color-subdued); font-size: 12px; }
.loss-plot polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
.loss-plot .grid { stroke: var(--border-color-primary); }
.loss-plot .raw { stroke: var(--body-text-color-subdued); stroke-width: 1; opacity: .35; }
.loss-plot .mean { stroke: var(--primary-600, #0d9488); }
.loss-plot .held-out { stroke: #c2410c; }
.loss-plot circle.held-out { fill: #c2410c; }
.dark .loss-plot .mean { stroke: #2dd4bf; } .dark .loss-plot .held-out { stroke: #fb923c; }
.dark .loss-plot circle.held-out { fill: #fb923c; }
.key { margin-right: 1rem; font-size: .9rem; } .key::before { content: ""; display: inline-block; width: 1.2rem;
  height: 3px; vertical-align: middle; margin-right: .4rem; background: var(--primary-600, #0d9488); }
.key.held-out::before { background: #c2410c; }
.samples { overflow-x: auto; margin: .75rem 0; contain: inline-size; width: 100%; }
.samples table { border-collapse: separate; border-spacing: .4rem; }
.samples tr, .samples td, .samples th, .samples table { border: none !important; background: none !important;
  padding: .2rem; }
.samples th { font-weight: 500; text-align: left; font-size: .9rem; color: var(--body-text-color-subdued); }
.samples th[scope=row] { min-width: 6rem; max-width: 14rem; overflow-wrap: anywhere; vertical-align: top; }
.samples img { display: block; width: 8rem; min-width: 5rem; max-width: none !important; height: auto;
  border-radius: .4rem; }
.log { max-height: 16rem; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; }
#train-pages, #train-run, #train-samples { width: 100%; min-width: 0; max-width: 100%; }
#train-pages > *, #train-pages [role=tabpanel] > * { min-width: 0; max-width: 100%; }
#train-bucketing, #train-flip, #train-gradient-checkpointing { flex-grow: 1; min-width: min(100%, 220px); }
#train-runs .wrap, #train-purpose .wrap { flex-direction: column; align-items: stretch; }
</style>"""
"""Style sheet; every color is that of the page's theme, or has the contrast of WCAG AA on both of its backgrounds."""
