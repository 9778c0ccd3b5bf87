"""Table of all foreign flags for the docs: `python -m restune_diffusion.cli.foreign_flags.page > docs/flags.md`."""

from __future__ import annotations

from .translate import TABLES

_INTRO = """# Flags of diffusers and kohya

`restune train` accepts the flags of diffusers' `train_dreambooth_lora.py` and `train_text_to_image_lora.py`, of their
SDXL versions, and of kohya's `train_network.py` and `sdxl_train_network.py`. kohya's TOML files work as
`--config_file` and `--dataset_config`. The translated command is printed.
`python -m restune_diffusion.cli.foreign_flags.page` writes this page.
"""


def page() -> str:
    """Return the page in Markdown."""
    lines = [_INTRO]
    for program, table in TABLES.items():
        lines += [f"## {program}", "", "| flag | verdict | here | note |", "|---|---|---|---|"]
        lines += [
            f"| `--{flag.name}` | {flag.verdict} | {f'`{flag.ours}`' if flag.ours else ''} | {flag.note} |"
            for flag in sorted(table.values(), key=lambda flag: flag.name)
        ]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
