"""Package build: CMakeLists.txt is the one build definition, scikit-build-core drives it."""

from setuptools import setup

setup(cmake_source_dir=".")
