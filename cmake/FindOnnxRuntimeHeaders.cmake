# Finds onnxruntime_c_api.h, which onnxruntime's own wheels do not hold. In this order:
#   1. the folder in the environment variable or CMake variable QEXPORT_ORT_INCLUDE_DIR
#   2. a system package (libonnxruntime-dev)
#   3. the release archive at QEXPORT_ORT_URL, when that is given
#   4. the MIT-licensed wheel pinned in ort-headers.txt, which carries the headers of onnxruntime 1.17, through pip
# Defines the target OnnxRuntime::Headers. Any headers from 1.17 on give the same library: it uses version 17 of the API.

set(OnnxRuntimeHeaders_SUFFIXES onnxruntime onnxruntime/core/session core/session include include/onnxruntime
    include/onnxruntime/core/session)

if(NOT QEXPORT_ORT_INCLUDE_DIR AND DEFINED ENV{QEXPORT_ORT_INCLUDE_DIR})
  set(QEXPORT_ORT_INCLUDE_DIR "$ENV{QEXPORT_ORT_INCLUDE_DIR}")
endif()
if(QEXPORT_ORT_INCLUDE_DIR)
  find_path(OnnxRuntimeHeaders_INCLUDE_DIR onnxruntime_c_api.h PATHS "${QEXPORT_ORT_INCLUDE_DIR}"
            PATH_SUFFIXES ${OnnxRuntimeHeaders_SUFFIXES} NO_DEFAULT_PATH NO_CMAKE_FIND_ROOT_PATH)
  if(NOT OnnxRuntimeHeaders_INCLUDE_DIR)
    message(FATAL_ERROR "QEXPORT_ORT_INCLUDE_DIR is ${QEXPORT_ORT_INCLUDE_DIR}, which holds no onnxruntime_c_api.h")
  endif()
else()
  find_path(OnnxRuntimeHeaders_INCLUDE_DIR onnxruntime_c_api.h PATH_SUFFIXES ${OnnxRuntimeHeaders_SUFFIXES})
endif()

# Looks below `root` for the header and sets OnnxRuntimeHeaders_INCLUDE_DIR.
function(_onnxruntime_headers_below root)
  file(GLOB_RECURSE headers "${root}/*/onnxruntime_c_api.h")
  if(headers)
    list(GET headers 0 header)
    get_filename_component(folder "${header}" DIRECTORY)
    set(OnnxRuntimeHeaders_INCLUDE_DIR "${folder}" CACHE PATH "Folder of onnxruntime_c_api.h" FORCE)
  endif()
endfunction()

set(_ort_dir "${CMAKE_CURRENT_BINARY_DIR}/ort-headers")

if(NOT OnnxRuntimeHeaders_INCLUDE_DIR AND QEXPORT_ORT_URL)
  file(DOWNLOAD "${QEXPORT_ORT_URL}" "${_ort_dir}/release.archive" STATUS _ort_status)
  list(GET _ort_status 0 _ort_code)
  if(_ort_code EQUAL 0)
    file(ARCHIVE_EXTRACT INPUT "${_ort_dir}/release.archive" DESTINATION "${_ort_dir}/release")
    _onnxruntime_headers_below("${_ort_dir}/release")
  else()
    message(WARNING "${QEXPORT_ORT_URL} cannot be downloaded (${_ort_status}); trying the pinned wheel")
  endif()
endif()

if(NOT OnnxRuntimeHeaders_INCLUDE_DIR)
  if(NOT Python_EXECUTABLE)
    find_package(Python COMPONENTS Interpreter REQUIRED)
  endif()
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --require-hashes
            --requirement "${CMAKE_CURRENT_LIST_DIR}/ort-headers.txt" --dest "${_ort_dir}"
    RESULT_VARIABLE _ort_code ERROR_VARIABLE _ort_error)
  if(_ort_code EQUAL 0)
    file(GLOB _ort_wheel "${_ort_dir}/*.whl")
    file(ARCHIVE_EXTRACT INPUT ${_ort_wheel} DESTINATION "${_ort_dir}/wheel" PATTERNS "*/onnxruntime/core/*" "*LICENSE*")
    _onnxruntime_headers_below("${_ort_dir}/wheel")
  endif()
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  OnnxRuntimeHeaders REQUIRED_VARS OnnxRuntimeHeaders_INCLUDE_DIR
  REASON_FAILURE_MESSAGE "set QEXPORT_ORT_INCLUDE_DIR to a folder that holds them, install libonnxruntime-dev, or give pip access to a package index. ${_ort_error}")

if(OnnxRuntimeHeaders_FOUND AND NOT TARGET OnnxRuntime::Headers)
  add_library(OnnxRuntime::Headers INTERFACE IMPORTED)
  # SYSTEM: their warnings are not ours.
  target_include_directories(OnnxRuntime::Headers SYSTEM INTERFACE "${OnnxRuntimeHeaders_INCLUDE_DIR}")
endif()
