# Flags that every target shares.

set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)

function(qexport_flags target)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wno-psabi)
  if(QEXPORT_WERROR)
    target_compile_options(${target} PRIVATE -Werror)
  endif()
  if(QEXPORT_SANITIZE)
    target_compile_options(${target} PRIVATE -g -fsanitize=address,undefined -fno-sanitize-recover=undefined)
    target_link_options(${target} PRIVATE -fsanitize=address,undefined)
  endif()
endfunction()

# Adds the kernels of attention, density matrices and matrix product states to `target` once more, compiled with FLAGS for
# one instruction set. With REST_OF only those of blocks of keys: the others would come out as that set's again, and are its.
function(qexport_add_isa target isa)
  cmake_parse_arguments(PARSE_ARGV 2 arg "" REST_OF FLAGS)
  add_library(qexport_${isa} OBJECT cpu/block_kernels.cc)
  target_compile_definitions(qexport_${isa} PRIVATE QEXPORT_ISA=${isa})
  if(arg_REST_OF)
    target_compile_definitions(qexport_${isa} PRIVATE QEXPORT_REST_OF=${arg_REST_OF})
  else()
    target_sources(qexport_${isa} PRIVATE cpu/density_kernels.cc cpu/mps_kernels.cc cpu/product_kernels.cc
                                          cpu/row_kernels.cc cpu/trellis_kernels.cc)
  endif()
  target_link_libraries(qexport_${isa} PRIVATE EigenHeaders::EigenHeaders)
  target_include_directories(qexport_${isa} PRIVATE include)
  # -ffp-contract=fast: a * b + c is one fused operation where the processor has it.
  target_compile_options(qexport_${isa} PRIVATE -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math ${arg_FLAGS})
  qexport_flags(qexport_${isa})
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:qexport_${isa}>)
  set_property(GLOBAL APPEND PROPERTY QEXPORT_ISA_OBJECTS $<TARGET_OBJECTS:qexport_${isa}>)
endfunction()
