"""A file on tmpfs in the place of a devdax, and the tree that describes it as sysfs does."""

from __future__ import annotations

from pathlib import Path

MIB = 1 << 20


class FakeDax:
    """The stand-in.

    Args:
        directory: on tmpfs: the driver registers no memory of other files.

    Attributes:
        path: of the file.
        root: holds the tree that describes it.
    """

    def __init__(self, directory: Path, nbytes: int = 64 * MIB, align: int = 2 * MIB) -> None:
        self.path = directory / "dax9.0"
        with self.path.open("wb") as file:
            file.truncate(nbytes)
        self.root = directory / "root"
        facts = self.root / "sys/dev/char/0:0"  # a file's device number
        facts.mkdir(parents=True)
        (facts / "size").write_text(f"{nbytes}\n")
        (facts / "align").write_text(f"{align}\n")
        (facts / "subsystem").symlink_to("../../../bus/dax")
