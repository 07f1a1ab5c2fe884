#!/usr/bin/env bash
# Installs NVIDIA's compiler in a manylinux_2_28 container: install_nvcc.sh 12-8
set -euo pipefail
version=$1
case $(uname -m) in
x86_64) machine=x86_64 ;;
aarch64) machine=sbsa ;;
*)
    echo "no CUDA compiler for $(uname -m)" >&2
    exit 1
    ;;
esac
dnf install -y dnf-plugins-core
dnf config-manager --add-repo "https://developer.download.nvidia.com/compute/cuda/repos/rhel8/$machine/cuda-rhel8.repo"
dnf install -y "cuda-nvcc-$version" "cuda-cudart-devel-$version"
ln -sfn "/usr/local/cuda-${version/-/.}" /usr/local/cuda
