"""What is said of files and folders in an image folder that give no image."""

import dataclasses
from collections import Counter
from pathlib import PurePath

from timm.utils.misc import natural_key

# So many kinds of files, or folders, are named.
NAMED = 4


@dataclasses.dataclass
class Passed:
    """What was found in one folder or tar beside the images that are read.

    Attributes:
        place: How the folder or the tar is called when there is something to say.
        files: Files that are no images, by their path in it.
        empty: Folders at the ends of the tree that hold no image.
        images: How many there are, where they were counted.
    """

    place: str
    files: list[str] = dataclasses.field(default_factory=list)
    empty: list[str] = dataclasses.field(default_factory=list)
    images: int = 0

    def note(self) -> str:
        """Says what was passed over, without a full stop; nothing where nothing was."""
        parts = []
        if self.files:
            parts.append(f"{_counted(self.files)} passed over ({self._kinds()})")
        if self.empty:
            few = sorted(self.empty, key=natural_key)[:NAMED]
            more = ", ..." if len(self.empty) > NAMED else ""
            have = "1 folder has" if len(self.empty) == 1 else f"{len(self.empty)} folders have"
            parts.append(f"{have} no images ({', '.join(few)}{more})")
        return f"{self.place}: {', and '.join(parts)}" if parts else ""

    def _kinds(self) -> str:
        kinds = Counter(PurePath(file).suffix.lower() or "without ending" for file in self.files)
        told = [f"{count} {kind}" for kind, count in kinds.most_common(NAMED)]
        if rest := kinds.total() - sum(count for _, count in kinds.most_common(NAMED)):
            told.append(f"{rest} others")
        return f"{', '.join(told)}; the first is {min(self.files, key=natural_key)}"


def _counted(files: list[str]) -> str:
    if len(files) == 1:
        return "1 file is no image that Pillow reads and is"
    return f"{len(files)} files are no images that Pillow reads and are"


def sentence(notes: list[str], wrong: str) -> str:
    """Puts what was passed over, which may be the cause, before what is wrong."""
    return "; ".join([*notes, wrong])
