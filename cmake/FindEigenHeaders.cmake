# Finds the headers of Eigen (MPL-2.0), 3.4 or newer. In this order:
#   1. the folder in the environment variable or CMake variable QEXPORT_EIGEN_INCLUDE_DIR
#   2. a system package (libeigen3-dev)
#   3. the wheel pinned in eigen-headers.txt, through pip
# Defines the target EigenHeaders::EigenHeaders.

if(NOT QEXPORT_EIGEN_INCLUDE_DIR AND DEFINED ENV{QEXPORT_EIGEN_INCLUDE_DIR})
  set(QEXPORT_EIGEN_INCLUDE_DIR "$ENV{QEXPORT_EIGEN_INCLUDE_DIR}")
endif()
if(QEXPORT_EIGEN_INCLUDE_DIR)
  find_path(EigenHeaders_INCLUDE_DIR Eigen/Eigenvalues PATHS "${QEXPORT_EIGEN_INCLUDE_DIR}" PATH_SUFFIXES eigen3
            NO_DEFAULT_PATH NO_CMAKE_FIND_ROOT_PATH)
  if(NOT EigenHeaders_INCLUDE_DIR)
    message(FATAL_ERROR "QEXPORT_EIGEN_INCLUDE_DIR is ${QEXPORT_EIGEN_INCLUDE_DIR}, which holds no Eigen/Eigenvalues")
  endif()
else()
  find_path(EigenHeaders_INCLUDE_DIR Eigen/Eigenvalues PATH_SUFFIXES eigen3)
endif()

if(NOT EigenHeaders_INCLUDE_DIR)
  if(NOT Python_EXECUTABLE)
    find_package(Python COMPONENTS Interpreter REQUIRED)
  endif()
  set(_eigen_dir "${CMAKE_CURRENT_BINARY_DIR}/eigen-headers")
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -m pip download --quiet --no-deps --only-binary=:all: --require-hashes
            --requirement "${CMAKE_CURRENT_LIST_DIR}/eigen-headers.txt" --dest "${_eigen_dir}"
    RESULT_VARIABLE _eigen_code ERROR_VARIABLE _eigen_error)
  if(_eigen_code EQUAL 0)
    file(GLOB _eigen_wheel "${_eigen_dir}/*.whl")
    file(ARCHIVE_EXTRACT INPUT ${_eigen_wheel} DESTINATION "${_eigen_dir}/wheel")
    find_path(EigenHeaders_INCLUDE_DIR Eigen/Eigenvalues PATHS "${_eigen_dir}/wheel/cmeel.prefix/include/eigen3"
              NO_DEFAULT_PATH NO_CMAKE_FIND_ROOT_PATH)
  endif()
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  EigenHeaders REQUIRED_VARS EigenHeaders_INCLUDE_DIR
  REASON_FAILURE_MESSAGE "set QEXPORT_EIGEN_INCLUDE_DIR to a folder that holds them, install libeigen3-dev, or give pip access to a package index. ${_eigen_error}")

if(EigenHeaders_FOUND AND NOT TARGET EigenHeaders::EigenHeaders)
  add_library(EigenHeaders::EigenHeaders INTERFACE IMPORTED)
  # SYSTEM: their warnings are not ours.
  target_include_directories(EigenHeaders::EigenHeaders SYSTEM INTERFACE "${EigenHeaders_INCLUDE_DIR}")
endif()
