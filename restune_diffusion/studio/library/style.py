"""Style sheet of the tab; colors are those of the page's theme."""

STYLE = """
#library-style { display: none; }
#library-reload { align-self: end; }
.tuner-cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem;
  padding: 4px; }
.tuner-card { display: flex; flex-direction: column; align-items: stretch; padding: 0; overflow: hidden;
  font: inherit; text-align: left; cursor: pointer;
  border: 1px solid var(--border-color-primary); border-radius: 12px; color: var(--body-text-color);
  background: var(--background-fill-primary); }
.tuner-card:hover { border-color: var(--primary-500); }
.tuner-card[aria-pressed=true] { border-color: var(--primary-600); box-shadow: 0 0 0 2px var(--primary-600); }
.tuner-card img, .tuner-blank { width: 100%; height: 9rem; object-fit: contain; background: #fff; }
.tuner-blank { display: grid; place-items: center; font-size: 3rem; font-weight: 600;
  color: var(--body-text-color-subdued); background: var(--background-fill-secondary); }
.tuner-text { display: flex; flex-direction: column; gap: .3rem; padding: .75rem 1rem 1rem; min-width: 0;
  text-align: left; }
.tuner-text strong { font-size: 1.05rem; overflow-wrap: anywhere; }
.tuner-text small { color: var(--body-text-color-subdued); overflow-wrap: anywhere; font-size: .85rem; }
.tuner-chip { display: inline-block; margin-right: .35rem; padding: 0 .6rem; border-radius: 999px; font-size: .8rem;
  line-height: 1.5rem; border: 1px solid var(--border-color-primary); }
.tuner-chip.tuner-bad { background: #b91c1c; color: #fff; border-color: transparent; }
.tuner-none { padding: 2rem; text-align: center; color: var(--body-text-color-subdued); border-radius: 12px;
  border: 1px dashed var(--border-color-primary); }
.tuner-fit { margin: 0 0 .75rem; padding: .5rem .75rem; border-left: 4px solid var(--primary-600);
  color: var(--body-text-color); background: var(--background-fill-secondary); overflow-wrap: anywhere; }
.tuner-fit.tuner-bad { border-color: #b91c1c; }
.tuner-facts { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.25rem; margin: 0; }
.tuner-facts dt { color: var(--body-text-color-subdued); }
.tuner-facts dd { margin: 0; overflow-wrap: anywhere; }
.tuner-compared { overflow-x: auto; }
.tuner-compared table { border-spacing: .5rem; border-collapse: separate; }
.tuner-compared table, .tuner-compared td, .tuner-compared th { border: none !important; background: none !important; }
.tuner-compared th { font-weight: 600; text-align: left; overflow-wrap: anywhere; color: var(--body-text-color); }
.tuner-compared img { display: block; width: 12rem; max-width: none; height: auto; border-radius: 8px; }
@media (max-width: 640px) {
  .tuner-cards { grid-template-columns: 1fr; }
  .tuner-card { flex-direction: row; }
  .tuner-card img, .tuner-blank { width: 7rem; height: auto; min-height: 7rem; flex: none; }
  .tuner-facts { grid-template-columns: 1fr; gap: 0; }
  .tuner-facts dd { margin-bottom: .5rem; }
  .tuner-compared img { width: 8rem; }
}
"""
