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

# Adds the kernels of attention, density matrices and matrix product states to `target` once more, compiled for one
# instruction set.
function(qexport_add_isa target isa)
  add_library(qexport_${isa} OBJECT cpu/attention_kernels.cc cpu/density_kernels.cc cpu/mps_kernels.cc
              cpu/product_kernels.cc cpu/trellis_kernels.cc)
  target_link_libraries(qexport_${isa} PRIVATE EigenHeaders::EigenHeaders)
  target_include_directories(qexport_${isa} PRIVATE include)
  target_compile_definitions(qexport_${isa} PRIVATE QEXPORT_ISA=${isa})
  # -ffp-contract=fast: a * b + c is one fused operation where the processor has it.
  target_compile_options(qexport_${isa} PRIVATE -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math ${ARGN})
  qexport_flags(qexport_${isa})
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:qexport_${isa}>)
endfunction()
