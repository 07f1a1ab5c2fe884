"""Drives the CMake build; names, versions and options are in pyproject.toml and CMakeLists.txt.

``AFA_BUILD_MODULES=0`` installs the Python part alone. The Makefile does that: it calls CMake itself, in a folder that
stays, so that a change compiles only what it touches.
"""

import gzip
import os
import tarfile
import time
from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist


class ReproducibleSdist(sdist):
    """A source distribution that is the same bytes wherever and whenever it is made of the same sources.

    Where ``SOURCE_DATE_EPOCH`` is set, that is; setuptools heeds it in wheels alone.
    """

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):
        epoch = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))

        def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
            entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname = epoch, 0, 0, "", ""
            entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
            return entry

        archive = Path(f"{base_name}.tar.gz")
        archive.parent.mkdir(parents=True, exist_ok=True)
        with (
            archive.open("wb") as file,
            gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=epoch) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as entries,
        ):
            entries.add(base_dir, filter=plain)  # in the order of the names
        return str(archive)


modules = {} if os.environ.get("AFA_BUILD_MODULES") == "0" else {"cmake_source_dir": "."}
setup(cmdclass={"sdist": ReproducibleSdist}, **modules)
