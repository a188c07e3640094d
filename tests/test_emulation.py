"""The emulation of CUDA kernels on a CPU: it runs them, and makes errors of undefined behaviour."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = r"""
#include <cstdio>
#include <stdexcept>
#include <string>
#include "emulation/cuda.h"

float out[8];

__global__ void reverse_and_sum() {
  __shared__ float shared[64];
  shared[threadIdx.x] = static_cast<float>(threadIdx.x + 100 * blockIdx.x);
  __syncthreads();
  float x = shared[blockDim.x - 1 - threadIdx.x];
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  if (threadIdx.x % 32 == 0) out[blockIdx.x * 2 + threadIdx.x / 32] = x;
}

__global__ void some_leave_before_a_barrier_of_all() {
  if (threadIdx.x < 5) __syncwarp();
}

__global__ void reads_what_nobody_wrote() {
  float x;
  std::memcpy(&x, grace::emulation::dynamic_shared() + 4 * threadIdx.x, 4);
  out[0] = x;
}

int main() {
  grace::emulation::run(dim3(2), dim3(64), 0, reverse_and_sum);
  std::printf("%g %g %g %g\n", out[0], out[1], out[2], out[3]);
  try {
    grace::emulation::run(dim3(1), dim3(32), 0, some_leave_before_a_barrier_of_all);
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
  }
  grace::emulation::run(dim3(1), dim3(1), 64, reads_what_nobody_wrote);
  std::printf("%d\n", out[0] != out[0]);
}
"""


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("emulation")
    (folder / "program.cpp").write_text(PROGRAM)
    command = [compiler, "-std=c++20", "-O1", "-I", ROOT / "csrc", folder / "program.cpp"]
    command += [ROOT / "csrc/emulation/fibers.cpp", "-o", folder / "program"]
    subprocess.run(command, check=True)
    done = subprocess.run([folder / "program"], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def test_barriers_and_exchanges(output):
    upper, lower = sum(range(32, 64)), sum(range(32))  # read in reverse order
    assert output[0] == f"{upper} {lower} {upper + 3200} {lower + 3200}"


def test_exchange_with_a_lane_that_left_is_an_error(output):
    assert output[1].endswith("a warp exchange names a lane that does not take part in it")


def test_shared_memory_begins_as_not_a_number(output):
    assert output[2] == "1"
