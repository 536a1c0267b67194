"""A disk of a few megabytes that can be filled, grown and made read-only.

- A tmpfs in a user and mount namespace of its own, kept by a sleeping process: runs enter it, the test looks in through /proc.
- Where namespaces are forbidden root mounts it, by way of sudo where that asks nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType

import pytest

__all__ = ["SmallDisk"]


class SmallDisk:
    """A file system of `size_bytes`; the test is skipped where the machine allows none.

    Attributes:
        inside: where runs see it; use their `prefix`.
        folder: where the test sees it.
        prefix: command in front of a run that makes it see the disk.
    """

    def __init__(self, at: Path, size_bytes: int) -> None:
        at.mkdir()
        self.inside = self.folder = at
        self.prefix: list[str] = []
        self._keeper: subprocess.Popen | None = None
        self._root = [] if os.geteuid() == 0 else ["sudo", "-n"]
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=1777", "tmpfs", str(at)]
        if not (self._enter_namespace(mount) or self._mount_as_root(mount)):
            pytest.skip("no small disk can be mounted here: neither unshare -Urm nor root")

    def _enter_namespace(self, mount: list[str]) -> bool:
        if shutil.which("unshare") is None or shutil.which("nsenter") is None:
            return False
        script = '"$@" && echo ready && exec sleep 1000'
        command = ["unshare", "-Urm", "sh", "-c", script, "sh", *mount]
        keeper = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, text=True)
        assert keeper.stdout is not None
        if keeper.stdout.readline().strip() != "ready":
            keeper.kill()
            keeper.wait()
            keeper.stdout.close()
            return False
        self._keeper = keeper
        self.prefix = ["nsenter", "-t", str(keeper.pid), "-U", "-m", "--preserve-credentials", "--"]
        self.folder = Path(f"/proc/{keeper.pid}/root{self.inside}")
        return True

    def _mount_as_root(self, mount: list[str]) -> bool:
        if self._root and shutil.which("sudo") is None:
            return False
        return subprocess.run([*self._root, *mount], capture_output=True, check=False).returncode == 0

    def fill(self) -> None:
        """Leave not a byte."""
        with open(self.folder / "filling", "ab", buffering=0) as file:
            for size in (1 << 16, 1 << 12, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue

    def free(self) -> None:
        """Take away what `fill` wrote and make the disk large."""
        (self.folder / "filling").unlink(missing_ok=True)
        self.remount("size=200000000")

    def remount(self, options: str) -> None:
        """Change the mount: "ro", or "size=…"."""
        enter = self.prefix if self._keeper is not None else self._root
        subprocess.run([*enter, "mount", "-o", f"remount,{options}", str(self.inside)], check=True)

    def __enter__(self) -> SmallDisk:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._keeper is not None:
            self._keeper.kill()
            self._keeper.wait()
            assert self._keeper.stdout is not None
            self._keeper.stdout.close()
        else:
            subprocess.run([*self._root, "umount", "-l", str(self.inside)], check=False)
