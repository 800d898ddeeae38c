# Finds the compiler of the CUDA plugin, as QEXPORT_CUDA asks: sets QEXPORT_BUILD_CUDA, and CMAKE_CUDA_COMPILER with it.
# In this order:
#   1. CMAKE_CUDA_COMPILER, or the environment variable CUDACXX
#   2. nvcc on the path, in CUDA_PATH, in /usr/local/cuda
#   3. the wheels of the extra `cuda-build`, where the Python that builds has them
# No step needs a GPU. A build for another processor has no plugin.

set(QEXPORT_CUDA AUTO CACHE STRING "Build the CUDA plugin: AUTO (where there is nvcc), ON or OFF")
set_property(CACHE QEXPORT_CUDA PROPERTY STRINGS AUTO ON OFF)
set(QEXPORT_CUDA_OLDEST 12.8)  # the first that knows sm_120
set(QEXPORT_BUILD_CUDA OFF)

# Sets `result` to the nvcc of the wheels, which is on no path, or to "".
function(_qexport_nvcc_of_wheels result)
  if(NOT Python_EXECUTABLE)
    find_package(Python COMPONENTS Interpreter REQUIRED)
  endif()
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c "
from importlib.util import find_spec
from pathlib import Path
spec = find_spec('nvidia')
roots = spec.submodule_search_locations if spec else []
print(next((nvcc for root in roots for nvcc in sorted(Path(root).glob('*/bin/nvcc'))), ''), end='')"
    OUTPUT_VARIABLE nvcc ERROR_QUIET)
  set(${result} "${nvcc}" PARENT_SCOPE)
endfunction()

# Sets `reason` to why the plugin cannot be built, or to "".
function(_qexport_find_nvcc reason)
  if(CMAKE_CROSSCOMPILING)
    set(${reason} "no nvcc that compiles for another processor" PARENT_SCOPE)
    return()
  endif()
  if(NOT CMAKE_CUDA_COMPILER AND DEFINED ENV{CUDACXX})
    set(CMAKE_CUDA_COMPILER "$ENV{CUDACXX}")
  endif()
  if(NOT CMAKE_CUDA_COMPILER)
    find_program(QEXPORT_NVCC nvcc PATHS ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin)
    set(CMAKE_CUDA_COMPILER "${QEXPORT_NVCC}")
  endif()
  if(NOT CMAKE_CUDA_COMPILER)
    _qexport_nvcc_of_wheels(CMAKE_CUDA_COMPILER)
  endif()
  if(NOT CMAKE_CUDA_COMPILER)
    set(${reason} "no nvcc: install a CUDA toolkit or the extra 'cuda-build', or set CUDACXX" PARENT_SCOPE)
    return()
  endif()
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --version OUTPUT_VARIABLE text ERROR_QUIET)
  if(NOT text MATCHES "release ([0-9]+\\.[0-9]+)")
    set(${reason} "${CMAKE_CUDA_COMPILER} is not nvcc: set CUDACXX to it" PARENT_SCOPE)
  elseif(CMAKE_MATCH_1 VERSION_LESS QEXPORT_CUDA_OLDEST)
    set(${reason} "${CMAKE_CUDA_COMPILER} is of CUDA ${CMAKE_MATCH_1}, the oldest that will do is ${QEXPORT_CUDA_OLDEST}"
        PARENT_SCOPE)
  else()
    set(${reason} "" PARENT_SCOPE)
    set(CMAKE_CUDA_COMPILER "${CMAKE_CUDA_COMPILER}" PARENT_SCOPE)
  endif()
endfunction()

if(QEXPORT_CUDA)
  _qexport_find_nvcc(_qexport_no_cuda)
  if(NOT _qexport_no_cuda)
    set(QEXPORT_BUILD_CUDA ON)
  elseif(QEXPORT_CUDA STREQUAL "AUTO")
    message(STATUS "CUDA plugin: not built, ${_qexport_no_cuda}")
  else()
    message(FATAL_ERROR "QEXPORT_CUDA is ON, but there is ${_qexport_no_cuda}")
  endif()
endif()

if(QEXPORT_BUILD_CUDA)
  if(NOT CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 75-real 80 90-real 120)  # 80 and 120 as PTX too, for 10.x and 11.x and what is newer
  endif()
  # Nothing but sm_90 runs code for it, and sm_90a is that with the products of warpgroups.
  list(TRANSFORM CMAKE_CUDA_ARCHITECTURES REPLACE "^90(-real)?$" "90a\\1")
  # Wheels have lib/ where nvcc looks for lib64/.
  get_filename_component(_qexport_cuda_root "${CMAKE_CUDA_COMPILER}" DIRECTORY)
  get_filename_component(_qexport_cuda_root "${_qexport_cuda_root}" DIRECTORY)
  if(EXISTS "${_qexport_cuda_root}/lib/libcudart_static.a")
    set(CMAKE_CUDA_FLAGS "${CMAKE_CUDA_FLAGS} -L${_qexport_cuda_root}/lib")
  endif()
  enable_language(CUDA)
  message(STATUS "CUDA plugin: built for ${CMAKE_CUDA_ARCHITECTURES} by ${CMAKE_CUDA_COMPILER}")
endif()
