"""Image folders: PATH/train and PATH/val, each a folder of images per class or a tar of such."""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from timm.data import create_dataset
from timm.utils.misc import natural_key

from ...errors import VitslimError
from .kinds import endings, hidden, told_to_timm
from .passed import Passed, sentence


class Folder:
    """The images of a folder by index, each with the number of its class.

    It gives what timm's reader of folders gives, and sees what that one passes over in one walk.

    Args:
        place: The folder; an image belongs to the class that its own folder is called.
    """

    def __init__(self, place: Path) -> None:
        self.passed = Passed(f"folder:{place}")
        found, read = list[tuple[str, str]](), endings()
        for name, inner, files in os.walk(place, onerror=_refuse, followlinks=True):
            inner[:] = [each for each in inner if not hidden(each)]
            folder = Path(name)
            _refuse_a_circle(folder, inner)
            relative, before = folder.relative_to(place), len(found)
            for file in files:
                if hidden(file):
                    continue
                if Path(file).suffix.lower() in read:
                    found.append((str(folder / file), relative.name))
                else:
                    self.passed.files.append(str(relative / file))
            if relative.name and not inner and len(found) == before:
                self.passed.empty.append(str(relative))
        self.class_to_idx = _numbered({label for _, label in found})
        # As timm sorts, which takes 1 and 01 for the same.
        found.sort(key=lambda each: (natural_key(each[0]), each[0]))
        self.files = [file for file, _ in found]
        self.targets = [self.class_to_idx[label] for _, label in found]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return Path(self.files[index]).open("rb"), self.targets[index]

    def filename(self, index: int, absolute: bool = False) -> str:
        """Returns the path of an image."""
        return self.files[index]


def open_folder(root: Path) -> tuple[tuple[Any, Any], tuple[Path, Path], int, list[str]]:
    """Opens PATH/train and PATH/val (or validation).

    Returns:
        The readers of both, where they are, the number of classes, and what was passed over.
    """
    if not root.is_dir():
        raise VitslimError(f"There is no image folder {root}.")
    places = _place(root, "train"), _place(root, "val", "validation")
    opened = [_open_tar(place) if place.suffix == ".tar" else Folder(place) for place in places]
    notes = [note for reader in opened if (note := reader.passed.note())]
    for place, reader in zip(places, opened, strict=True):
        _check(place, reader, notes)
    names = [set(reader.class_to_idx) for reader in opened]
    if names[0] != names[1]:
        odd = sorted(names[0] ^ names[1])
        wrong = f"{places[0]} and {places[1]} have different classes"
        raise VitslimError(sentence(notes, f"{wrong} ({', '.join(odd[:5])} on one side)."))
    return (opened[0], opened[1]), places, len(names[0]), notes


def _place(root: Path, *names: str) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
        if (root / f"{name}.tar").is_file():
            return root / f"{name}.tar"
    raise VitslimError(
        f"{root} has no folder {names[0]} and no {names[0]}.tar: train and val are needed."
    )


def _check(place: Path, reader: Any, notes: list[str]) -> None:
    wanted = "one folder of images per class is needed."
    if not len(reader):
        raise VitslimError(sentence(notes, f"{place} has no images: {wanted}"))
    # A tar that was made of `.` calls its root so.
    numbers = [reader.class_to_idx[each] for each in ("", ".") if each in reader.class_to_idx]
    for index, target in enumerate(reader.targets) if numbers else ():
        if target in numbers:
            first = Path(reader.filename(index)).name
            wrong = f"{place} has images that are in no class (the first is {first})"
            raise VitslimError(sentence(notes, f"{wrong}: {wanted}"))


def _open_tar(place: Path) -> Any:
    """Opens a tar of images, or of tars of them, with timm's reader."""
    passed = Passed(f"folder:{place}")
    try:
        with tarfile.open(place) as tar:
            _list(tar, passed)
        if not passed.images:
            return _Nothing(passed)
        with told_to_timm():
            # timm would leave a pickle beside a large tar, and read it the next time.
            reader = create_dataset(
                "", root=str(place), search_split=False, cache_tarinfo=False
            ).reader
    except (RuntimeError, ValueError, AssertionError, OSError, tarfile.TarError) as error:
        raise VitslimError(
            f"{place} has no images: one folder of images per class is needed ({error})."
        ) from error
    seen = [not hidden(member.name) for member, _, _ in reader.samples]
    names = {number: name for name, number in reader.class_name_to_idx.items()}
    labels = [names[number] for number in reader.targets[seen]]
    reader.class_to_idx = reader.class_name_to_idx = _numbered(set(labels))
    reader.samples = reader.samples[seen]
    reader.targets = [reader.class_to_idx[label] for label in labels]
    reader.passed = passed
    return reader


class _Nothing:
    """A tar without any image, which timm's reader cannot open."""

    def __init__(self, passed: Passed) -> None:
        self.passed, self.class_to_idx = passed, dict[str, int]()

    def __len__(self) -> int:
        return 0


def _list(tar: tarfile.TarFile, passed: Passed) -> None:
    """Lists what a tar holds beside images, and the folders in it that hold none."""
    full, seen = set[PurePosixPath](), set[PurePosixPath]()
    read = endings()
    for path, is_folder in _members(tar, PurePosixPath()):
        if hidden(str(path)):
            continue
        if is_folder:
            seen.add(path)
            continue
        seen.add(path.parent)
        if path.suffix.lower() in read:
            passed.images += 1
            full.update((path.parent, *path.parents))
        else:
            passed.files.append(str(path))
    outer = {parent for each in seen for parent in each.parents}
    passed.empty += sorted(map(str, seen - full - outer - {PurePosixPath(".")}))


def _members(tar: tarfile.TarFile, above: PurePosixPath) -> Iterator[tuple[PurePosixPath, bool]]:
    for member in tar:
        path = above / member.name
        if member.isfile() and path.suffix.lower() == ".tar":
            with tarfile.open(fileobj=tar.extractfile(member)) as inner:
                yield from _members(inner, path.with_suffix(""))
        elif member.isfile() or member.isdir():
            yield path, member.isdir()


def _numbered(labels: set[str]) -> dict[str, int]:
    """Numbers classes by name, as timm does.

    The name itself decides between "1" and "01" or "a" and "A", which are equal to timm and would
    come in another order in another process.
    """
    ordered = sorted(labels, key=lambda label: (natural_key(label), label))
    return {label: number for number, label in enumerate(ordered)}


def _refuse(error: OSError) -> None:
    raise VitslimError(
        f"{error.filename} cannot be read ({error.strerror}): allow it to be read, or move it away."
    ) from error


def _refuse_a_circle(folder: Path, inner: list[str]) -> None:
    """Refuses a link to a folder that it lies in, which would be walked through for ever."""
    for each in inner:
        link = folder / each
        above = (each.resolve() for each in (folder, *folder.parents))
        if link.is_symlink() and link.resolve() in above:
            raise VitslimError(f"{link} is a link to a folder that it lies in: remove the link.")
