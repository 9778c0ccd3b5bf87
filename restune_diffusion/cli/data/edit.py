"""`restune data edit`: change captions in bulk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from ...utils.display import counted, printable
from ...utils.errors import UsageError
from ...utils.settings import Settings
from ..options.early_checks import check_data, check_writable
from ..options.interruption import stoppable


class EditOptions(Settings):
    """Change the captions of a folder in bulk: caption files beside the images, or the rows of metadata.jsonl.

    The edits are made in the order of the options below. If one caption cannot be changed, no file is.

    Example: restune data edit ./watercolors --find "a painting of " --replace "" --dry-run

    Example: restune data edit ./watercolors --remove-tag watermark signature --remove-duplicate-tags --backup old.zip
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(name="data")]
    """Folder of images; subfolders are included."""
    find: str | None = None
    """Text to replace; upper and lower case differ."""
    replace: str | None = None
    """Text in place of it; give "" to delete it."""
    regex: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Read --find as a regular expression of Python, to whose groups --replace refers as \\1."""
    remove_tag: tuple[str, ...] = ()
    """Tags to remove. Tags are what commas separate; case does not matter."""
    remove_duplicate_tags: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Remove repetitions of a tag; the first one stays."""
    prefix: str = ""
    """Text to put before each caption that does not start with it, for instance "ink style, "."""
    suffix: str = ""
    """Text to put behind each caption that does not end with it."""
    caption_column: str = "text"
    """Key of the captions in metadata.jsonl."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print each caption that would change, before and after, and write nothing."""
    backup: Path | None = None
    """ZIP file to write the changed files to as they were; unpack it in the folder to undo the edit."""

    def run(self) -> None:
        """Edit the captions, or print what would change, and print a count."""
        self._check()
        from ...data.caption_edits.folder import diff, plan_edit
        from ...data.caption_edits.rules import CaptionEdit

        edit = CaptionEdit(
            self.find,
            self.replace or "",
            self.regex,
            self.remove_tag,
            self.remove_duplicate_tags,
            self.prefix,
            self.suffix,
        )
        plan = plan_edit(self.folder, edit, self.caption_column)
        for each in plan.refused:
            print(each.inside(self.folder))
        if self.dry_run:
            for line in diff(plan.changes):
                print(printable(line))
        elif plan.contents:
            with stoppable(lambda: "the captions are as before"):
                plan.write(self.backup)
        verb = "would change" if self.dry_run else "changed"
        print(
            f"{len(plan.changes)} of {counted(plan.captions, 'caption')} {verb}, in "
            f"{counted(len(plan.contents), 'file')}."
        )
        if self.backup is not None and plan.contents and not self.dry_run:
            print(self.backup)

    def _check(self) -> None:
        check_data(self.folder)
        if not (self.find is not None or self.remove_tag or self.remove_duplicate_tags or self.prefix or self.suffix):
            raise UsageError(
                "There is nothing to edit; give --find with --replace, --remove-tag, --remove-duplicate-tags, "
                "--prefix or --suffix."
            )
        if (self.find is None) != (self.replace is None):
            raise UsageError('--find and --replace belong together; give both, with --replace "" to delete.')
        if self.regex and self.find is None:
            raise UsageError("--regex needs --find.")
        if self.backup is not None:
            if self.backup.exists():
                raise UsageError(f"{self.backup} exists; choose another file for the backup.")
            check_writable(self.backup.parent)
