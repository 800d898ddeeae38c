# Cross-compiles for Linux on 64-bit ARM with the compiler of Debian's and Ubuntu's package g++-aarch64-linux-gnu
# (docs/aarch64.md):
#   cmake -S . -B build -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake -DQEXPORT_PYTHON=OFF
# With -DCMAKE_SYSROOT=FOLDER the C library is the one in that folder: what is built runs where that version or a newer one is.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)

set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
# Headers of onnxruntime and Eigen and the CMake files of pybind11 are the same for every processor.
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE BOTH)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE BOTH)
