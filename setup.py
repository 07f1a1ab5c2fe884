"""Drives the CMake build; names, versions and options are in pyproject.toml and CMakeLists.txt.

``AFA_BUILD_MODULES=0`` installs the Python part alone. The Makefile does that: it calls CMake itself, in a folder that
stays, so that a change compiles only what it touches.
"""

import os

from setuptools import setup

setup(**({} if os.environ.get("AFA_BUILD_MODULES") == "0" else {"cmake_source_dir": "."}))
