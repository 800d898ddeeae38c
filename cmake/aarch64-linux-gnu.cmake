# Cross-compiles for Linux on 64-bit ARM with the compiler of Debian's and Ubuntu's package g++-aarch64-linux-gnu
# (docs/aarch64.md):
#   cmake -S . -B build/aarch64 -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake -DQEXPORT_PYTHON=OFF
# What is built needs the C library of that package or a newer one. With -DCMAKE_SYSROOT=FOLDER, the root of an older Debian or
# Ubuntu for arm64 with libc6-dev and libstdc++-N-dev, it needs those of that system.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)

set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
# Headers of onnxruntime and Eigen and the CMake files of pybind11 are the same for every processor.
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE BOTH)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE BOTH)

if(CMAKE_SYSROOT)
  # The compiler looks into its own folders before those of a sysroot: libstdc++ and libgcc, the C library too.
  file(GLOB _gcc "${CMAKE_SYSROOT}/usr/lib/gcc/aarch64-linux-gnu/*")
  list(LENGTH _gcc _count)
  if(NOT _count EQUAL 1)
    message(FATAL_ERROR "CMAKE_SYSROOT is ${CMAKE_SYSROOT}, which must have one libstdc++-N-dev for arm64, but has ${_count}")
  endif()
  get_filename_component(_version "${_gcc}" NAME)
  set(CMAKE_CXX_FLAGS_INIT "-nostdinc++")
  foreach(_folder c++/${_version} aarch64-linux-gnu/c++/${_version} aarch64-linux-gnu .)
    string(APPEND CMAKE_CXX_FLAGS_INIT " -isystem ${CMAKE_SYSROOT}/usr/include/${_folder}")
  endforeach()
  foreach(_kind EXE MODULE SHARED)
    set(CMAKE_${_kind}_LINKER_FLAGS_INIT
        "-L${_gcc} -L${CMAKE_SYSROOT}/usr/lib/aarch64-linux-gnu -L${CMAKE_SYSROOT}/lib/aarch64-linux-gnu")
  endforeach()
endif()
