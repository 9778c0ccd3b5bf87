"""The page that asks for the password: plain HTML, without a script."""

from __future__ import annotations

from html import escape

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Restune studio</title>
<style>
:root {{ color-scheme: light dark; --paper: #f8fafc; --card: #fff; --ink: #0f172a; --line: #94a3b8; --red: #b91c1c; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #0b1120; --card: #1e293b; --ink: #f1f5f9; --line: #64748b; --red: #fca5a5; }}
}}
body {{ margin: 0; min-height: 100vh; display: grid; place-items: center; font: 16px/1.5 system-ui, sans-serif;
  background: var(--paper); color: var(--ink); }}
main {{ box-sizing: border-box; width: min(24rem, calc(100vw - 2rem)); padding: 2rem; border-radius: 12px;
  background: var(--card); box-shadow: 0 1px 3px rgb(0 0 0 / .2); }}
h1 {{ margin: 0 0 1rem; font-size: 1.5rem; }}
label {{ display: block; margin-bottom: .25rem; font-weight: 600; }}
input, button {{ box-sizing: border-box; width: 100%; padding: .6rem .75rem; font: inherit; border-radius: 8px; }}
input {{ border: 1px solid var(--line); background: var(--paper); color: var(--ink); }}
button {{ margin-top: 1rem; border: 0; background: #0f766e; color: #fff; font-weight: 600; cursor: pointer; }}
:focus-visible {{ outline: 3px solid #14b8a6; outline-offset: 2px; }}
.problem {{ margin: .75rem 0 0; color: var(--red); }}
</style>
</head>
<body>
<main>
<h1>Restune studio</h1>
<form method="post" action="/login">
<label for="password">Password</label>
<input id="password" name="password" type="password" autocomplete="current-password" required autofocus>
{problem}
<button type="submit">Open the studio</button>
</form>
</main>
</body>
</html>
"""


def login_page(problem: str | None = None) -> bytes:
    """Return the page.

    Args:
        problem: sentence to show below the field.
    """
    shown = "" if problem is None else f'<p class="problem" role="alert">{escape(problem)}</p>'
    return _PAGE.format(problem=shown).encode()
