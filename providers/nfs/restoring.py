"""A member's content written into a new file as a volume: shared or copied where its own file is one, else converted.

A member's own file is a volume when it has the volume's format and the backing files that its header names are in
their places, or can be put back there. Otherwise the chain is converted into a file that stands alone: when a
template was replaced, and when what lies below is only the snapshot's.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from providers.nfs import chains, copying, layout, qemu
from providers.nfs.beneath import open_beneath

_SECTOR = 512


@dataclass(frozen=True, slots=True)
class Source:
    """A member to be written: its chain, open, and whether its own file can be the volume."""

    member: layout.StoredMember
    chain: list[qemu.Image]
    is_volume: bool

    def cost_bytes(self, *, cloning: bool) -> int:
        """Return about how many bytes have to be copied: 0 for what is done at once."""
        if self.is_volume:
            return 0 if cloning else _allocated(self.chain[:1])
        return min(_allocated(self.chain), self.member.size_bytes)


@contextmanager
def sources(root_fd: int, group_fd: int, members: Sequence[layout.StoredMember]) -> Iterator[list[Source]]:
    """Yield the members, open; closed afterwards. Raises SnapshotNotFound, SnapshotDamaged, OSError."""
    with ExitStack() as opened:
        yield [
            Source(member, opened.enter_context(chains.member(group_fd, member)), _is_volume(root_fd, member))
            for member in members
        ]


def write(source: Source, target: int, copied: Callable[[int], None], *, cloning: bool) -> None:
    """Write a member into an empty file. Nothing is synced.

    `copied` is called with bytes as they are done, cost_bytes() in all, and may raise. Raises PoolFull,
    CapabilityMissing (an encrypted image that would have to be converted), SnapshotDamaged, PoolUnavailable, OSError.
    """
    if source.is_volume:
        own = source.chain[0].descriptor
        if cloning:
            copying.clone(own, target)
        else:
            copying.copy(own, target, copied)
        return
    cost, done = source.cost_bytes(cloning=cloning), 0

    def progress(fraction: float) -> None:
        nonlocal done
        copied(int(cost * fraction) - done)
        done = int(cost * fraction)

    size = source.member.size_bytes
    if source.member.format == "raw":
        os.ftruncate(target, -(-size // _SECTOR) * _SECTOR)  # QEMU thinks in sectors
    qemu.convert(source.chain, qemu.Image(target, source.member.format), progress)
    if source.member.format == "raw":
        os.ftruncate(target, size)


def needs(source: Source) -> layout.StoredMember:
    """Return the member with the backing files that what write() made of it needs: give them to put_back()."""
    return source.member if source.is_volume else source.member.model_copy(update={"backing": []})


def put_back(root_fd: int, group_fd: int, member: layout.StoredMember) -> None:
    """Put backing files that are lost from the pool back in their places; what is there stays. Raises OSError."""
    for backing in member.backing:
        directory, _, name = backing.path.rpartition("/")
        parent = open_beneath(root_fd, directory or ".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            kept = open_beneath(group_fd, f"{layout.BACKING}/{backing.kept}", os.O_RDONLY)
            try:
                with suppress(FileExistsError):
                    os.link(f"/proc/self/fd/{kept}", name, dst_dir_fd=parent, follow_symlinks=True)
                    os.fsync(parent)
            finally:
                os.close(kept)
        finally:
            os.close(parent)


def _is_volume(root_fd: int, member: layout.StoredMember) -> bool:
    if member.stored_format != member.format:
        return False
    return all(backing.path and _is_in_place(root_fd, backing) for backing in member.backing)


def _is_in_place(root_fd: int, backing: layout.StoredBacking) -> bool:
    """Tell whether a backing file is where the header expects it, or can be put there."""
    try:
        descriptor = open_beneath(root_fd, backing.path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return _has_directory(root_fd, os.path.dirname(backing.path))
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EXDEV, errno.ENOTDIR, errno.ENXIO):
            return False
        raise
    try:
        return chains.is_unchanged(descriptor, backing)
    finally:
        os.close(descriptor)


def _has_directory(root_fd: int, path: str) -> bool:
    try:
        os.close(open_beneath(root_fd, path or ".", os.O_RDONLY | os.O_DIRECTORY))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.EXDEV, errno.ENOTDIR):
            return False
        raise
    return True


def _allocated(chain: Sequence[qemu.Image]) -> int:
    return sum(os.fstat(image.descriptor).st_blocks * 512 for image in chain)
