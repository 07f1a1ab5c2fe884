#!/usr/bin/env bash
# Installs NVIDIA's compiler from PyPI into a folder: install_nvcc.sh PYTHON FOLDER. nvcc is then
# FOLDER/nvidia/cu13/bin/nvcc. The wheels of a release are built with it, and the tests execute what it compiles. Its code
# loads on drivers of CUDA 13, from 580 on.
set -euo pipefail
version="13.0.*"
"$1" -m pip --disable-pip-version-check install --upgrade --target "$2" \
    "nvidia-cuda-nvcc==$version" "nvidia-cuda-crt==$version" "nvidia-nvvm==$version" "nvidia-cuda-runtime==$version"
# Where nvcc looks for its libraries, and CMake for the runtime and for headers that these kernels do without.
toolkit=$2/nvidia/cu13
ln -sfn libcudart.so.13 "$toolkit/lib/libcudart.so"
ln -sfn lib "$toolkit/lib64"
mkdir -p "$toolkit/include/cccl"
