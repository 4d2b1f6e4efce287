"""The names in a directory, and the targets of ext's links, from the Sleuth Kit: where a libyal library has none.

That is of names that are not UTF-8, as the Sleuth Kit gives bytes, and of inodes that a library refuses. Runs in the
confined process.
"""

from __future__ import annotations

import errno
from typing import Any, Literal

from clients.files.ranges import Bytes


class SleuthkitNames:
    """The names in the directories of one file system; it is opened when first asked."""

    def __init__(self, source: Bytes, kind: Literal["EXT", "NTFS"]) -> None:
        """Take its bytes."""
        self._source = source
        self._kind = kind
        self._opened: Any = None

    def of(self, inode: int, directory: object = None) -> dict[bytes, int]:
        """Return a directory's names with their inodes. Raises OSError."""
        import pytsk3

        names = {}
        for found in self._filesystem().open_dir(inode=inode):
            name = found.info.name
            allocated = int(name.flags) & int(pytsk3.TSK_FS_NAME_FLAG_ALLOC)
            invented = int(name.type) == int(pytsk3.TSK_FS_NAME_TYPE_VIRT_DIR)  # the Sleuth Kit's own $OrphanFiles
            if name.name not in (b".", b"..") and allocated and not invented:
                names[bytes(name.name)] = int(name.meta_addr)
        return names

    def target(self, inode: int, length: int) -> bytes:
        """Return where a symbolic link points. Raises OSError."""
        found = self._filesystem().open_meta(inode=inode).info.meta
        if not found or not found.link:
            raise OSError(errno.EIO, "a link without a target")
        return bytes(found.link)[:length]

    def _filesystem(self) -> Any:
        import pytsk3

        if self._opened is None:
            kind = getattr(pytsk3, f"TSK_FS_TYPE_{self._kind}_DETECT")
            self._opened = pytsk3.FS_Info(sleuthkit_image(self._source), 0, kind)
        return self._opened


def sleuthkit_image(source: Bytes) -> Any:
    """Return bytes as what the Sleuth Kit reads from."""
    import pytsk3

    class Image(pytsk3.Img_Info):  # type: ignore[misc]
        """Reads from our bytes."""

        def __init__(self) -> None:
            super().__init__(url="", type=pytsk3.TSK_IMG_TYPE_EXTERNAL)

        def close(self) -> None:
            """Nothing of ours."""

        def read(self, offset: int, size: int) -> bytes:
            """Read a range."""
            return source.pread(offset, size)

        def get_size(self) -> int:
            """Return the size in bytes."""
            return source.size_bytes

    return Image()
