"""The CUDA sources, compiled by g++ for the CPU: once for all tests."""

from __future__ import annotations

import pytest

from tests.cuda.host import (
    SOURCES,
    STAND_IN,
    Library,
    compile_kernels,
    compile_shared,
)
from tests.cuda.product_checks import cublaslt_flags


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Library:
    target = tmp_path_factory.mktemp("kernels") / "kernels.so"
    compile_kernels(SOURCES, target, "-O1", "-fsanitize=undefined", "-fno-sanitize=vptr")
    return Library(target, "host_error")


@pytest.fixture(scope="session")
def cublaslt(tmp_path_factory: pytest.TempPathFactory) -> Library:
    target = tmp_path_factory.mktemp("lt") / "lt.so"
    compile_shared(STAND_IN, target, "-O1", f"-I{SOURCES}", *cublaslt_flags())
    return Library(target, "lt_error")
