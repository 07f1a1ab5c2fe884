"""Drives the CMake build; names, versions and options are in pyproject.toml and CMakeLists.txt."""

from setuptools import setup

setup(cmake_source_dir=".")
