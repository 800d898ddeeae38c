# Finds the shared library of onnxruntime, for programs that link against it. In this order:
#   1. the file in the environment variable or CMake variable QEXPORT_ORT_LIBRARY
#   2. a system package (libonnxruntime-dev), or a folder in CMAKE_PREFIX_PATH
#   3. the pip package onnxruntime or onnxruntime-gpu of the Python that is found
# Defines the target OnnxRuntime::Library.

if(NOT QEXPORT_ORT_LIBRARY AND DEFINED ENV{QEXPORT_ORT_LIBRARY})
  set(QEXPORT_ORT_LIBRARY "$ENV{QEXPORT_ORT_LIBRARY}")
endif()
if(QEXPORT_ORT_LIBRARY)
  if(NOT EXISTS "${QEXPORT_ORT_LIBRARY}")
    message(FATAL_ERROR "QEXPORT_ORT_LIBRARY is ${QEXPORT_ORT_LIBRARY}, which does not exist")
  endif()
  set(OnnxRuntimeLibrary_FILE "${QEXPORT_ORT_LIBRARY}")
else()
  find_library(OnnxRuntimeLibrary_FILE onnxruntime)
endif()

if(NOT OnnxRuntimeLibrary_FILE)
  if(NOT Python_EXECUTABLE)
    find_package(Python COMPONENTS Interpreter)
  endif()
  if(Python_EXECUTABLE)
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c "
from importlib.util import find_spec
from pathlib import Path
spec = find_spec('onnxruntime')
roots = spec.submodule_search_locations if spec else []
print(next((f for root in roots for f in sorted(Path(root, 'capi').glob('libonnxruntime.so.*'))), ''), end='')"
      OUTPUT_VARIABLE OnnxRuntimeLibrary_FILE ERROR_QUIET)
  endif()
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  OnnxRuntimeLibrary REQUIRED_VARS OnnxRuntimeLibrary_FILE
  REASON_FAILURE_MESSAGE "set QEXPORT_ORT_LIBRARY to libonnxruntime.so, or install libonnxruntime-dev or the pip package onnxruntime.")

if(OnnxRuntimeLibrary_FOUND AND NOT TARGET OnnxRuntime::Library)
  get_filename_component(_ort_file "${OnnxRuntimeLibrary_FILE}" REALPATH)
  # A wheel holds libonnxruntime.so.1.N.M alone, and programs look for the name that it was linked with.
  set(_ort_link "${CMAKE_CURRENT_BINARY_DIR}/onnxruntime/libonnxruntime.so.1")
  file(MAKE_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/onnxruntime")
  file(CREATE_LINK "${_ort_file}" "${_ort_link}" SYMBOLIC)
  add_library(OnnxRuntime::Library SHARED IMPORTED)
  set_target_properties(OnnxRuntime::Library PROPERTIES IMPORTED_LOCATION "${_ort_link}" IMPORTED_SONAME libonnxruntime.so.1)
endif()
