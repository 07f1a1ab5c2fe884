# Toolchain: aarch64 by Debian's g++-aarch64-linux-gnu, on another processor in qemu-user. The environment says the rest:
# QEMU_LD_PREFIX where its libraries lie, QEMU_CPU which processor it is.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64)
