"""A running guest's files: put back by its agent, and seen in the mount of every VM's snapshots."""

import os
import re
import subprocess
import time
from pathlib import Path

from tests.conftest import Cloud


def wait_for(directory: Path, name: str, *, there: bool) -> None:
    deadline = time.monotonic() + 60
    while (name in os.listdir(directory)) != there:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def restore(cloud: Cloud, *words: str):  # type: ignore[no-untyped-def]
    return cloud.gateway.cli("restore", *words, env={"LIBVIRT_DEFAULT_URI": cloud.hypervisor.uri})


def left_behind(cloud: Cloud) -> list[str]:
    code, said = cloud.machine.exec(["/bin/find", "/mnt/vda", "-name", "*.frostgate-??????"])
    assert code == 0
    return said.split()


def test_a_file_goes_back_into_the_guest_with_its_owner_and_mode(cloud: Cloud) -> None:
    script = (
        "cd /mnt/vda && dd if=/dev/urandom of=precious bs=1k count=150 && "
        "chown 12:34 precious && chmod 640 precious && sync"
    )
    code, _ = cloud.machine.exec(["/bin/sh", "-c", script])
    assert code == 0
    wanted = cloud.machine.exec(["/bin/sha256sum", "/mnt/vda/precious"])
    assert cloud.vm("snapshot", "web1", "--id", "kept").returncode == 0
    cloud.machine.write_file("/mnt/vda/precious", b"overwritten")
    place = "kept:a.raw/whole/precious"
    # what a user of the guest prepared for us: it leads nowhere
    prepared = (
        "echo victim > /mnt/vda/victim; ln -s victim /mnt/vda/precious.frostgate-restored; "
        "mkdir /mnt/vda/directory; ln -s directory /mnt/vda/away; ln -s victim /mnt/vda/linked"
    )
    assert cloud.machine.exec(["/bin/sh", "-c", prepared])[0] == 0
    done = restore(cloud, place, "--into-guest", "web1", "/mnt/vda/precious")
    assert done.returncode == 0, done.stderr
    assert cloud.machine.exec(["/bin/sha256sum", "/mnt/vda/precious"]) == wanted
    code, said = cloud.machine.exec(["/bin/stat", "-c", "%u:%g %a", "/mnt/vda/precious"])
    assert (code, said.strip()) == (0, "12:34 640")
    done = restore(cloud, place, "--into-guest", "web1", "/mnt/vda/linked")
    assert done.returncode == 0, done.stderr
    restore(cloud, place, "--into-guest", "web1", "/mnt/vda/away")  # busybox's mv refuses it, GNU's replaces the link
    code, said = cloud.machine.exec(["/bin/sh", "-c", "cd /mnt/vda && cat victim && ls directory && stat -c %F linked"])
    assert (code, said.splitlines()) == (0, ["victim", "regular file"])
    assert left_behind(cloud) == []

    refused = restore(cloud, place, "--into-guest", "web1", "/nowhere/precious")
    assert refused.returncode == 1
    assert re.search(r"nothing can be made in /nowhere: mktemp failed in the guest: .*No such file", refused.stderr)
    refused = restore(cloud, place, "--into-guest", "no-such-vm", "/mnt/vda/precious")
    assert refused.returncode == 3
    refused = restore(cloud, "kept:a.raw/whole", "--into-guest", "web1", "/mnt/vda/all")
    assert refused.returncode == 4
    assert "Traceback" not in refused.stderr
    # what stands there is a directory: the guest's own mv says so, and nothing is lost
    cloud.machine.exec(["/bin/mkdir", "-p", "/mnt/vda/full/precious/x"])
    refused = restore(cloud, place, "--into-guest", "web1", "/mnt/vda/full/precious/x/")
    assert refused.returncode == 2
    refused = restore(cloud, place, "--into-guest", "web1", "/mnt/vda/full/precious/x")
    assert refused.returncode == 1
    assert "mv failed in the guest: " in refused.stderr
    assert left_behind(cloud) == []
    assert cloud.vm("delete", "kept", "--yes").returncode == 0


def test_the_mount_of_all_shows_vms_and_their_snapshots_as_they_come_and_go(cloud: Cloud, tmp_path: Path) -> None:
    cloud.machine.write_file("/mnt/vdb/note", b"first")
    cloud.machine.exec(["/bin/sync"])
    directory = tmp_path / "all"
    assert cloud.vm("snapshot", "web1", "--id", "first").returncode == 0
    cloud.gateway.cli("mount", "--all", directory, check=True)
    try:
        assert os.listdir(directory) == ["web1"]
        assert os.listdir(directory / "web1") == ["first"]
        note = directory / "web1" / "first" / "files" / "b.raw" / "whole" / "note"
        assert note.read_bytes() == b"first"
        # the guest was quiet at the cut: there is nothing that a journal would replay
        assert not (note.parents[1] / "whole.NOTICE.txt").exists()

        cloud.machine.write_file("/mnt/vdb/note", b"second")
        cloud.machine.exec(["/bin/sync"])
        assert cloud.vm("snapshot", "web1", "--id", "second").returncode == 0
        wait_for(directory / "web1", "second", there=True)
        later = directory / "web1" / "second" / "files" / "b.raw" / "whole" / "note"
        assert (note.read_bytes(), later.read_bytes()) == (b"first", b"second")
        told = cloud.gateway.cli("diff", "first:b.raw/whole/note", "second", check=True)
        assert told.stdout == "M b.raw/whole/note\n"

        assert cloud.gateway.cli("snapshot", "create", "of-no-vm", "fast/a.raw", "fast/b.raw").returncode == 0
        wait_for(directory, "no-vm", there=True)
        other = directory / "no-vm" / "of-no-vm" / "files" / "b.raw"
        assert (other / "whole" / "note").read_bytes() == b"second"
        # cut while the guest wrote: said
        assert "journal was not replayed" in (other / "whole.NOTICE.txt").read_text()

        assert cloud.vm("delete", "second", "of-no-vm", "--yes").returncode == 0
        wait_for(directory / "web1", "second", there=False)
        wait_for(directory, "no-vm", there=False)
        assert note.read_bytes() == b"first"
    finally:
        cloud.gateway.cli("umount", "--lazy", directory, check=True)
        cloud.vm("delete", "first", "second", "of-no-vm", "--yes")
    assert subprocess.run(["mountpoint", "--quiet", directory], check=False).returncode
