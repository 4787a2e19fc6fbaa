# The CUDA backend.  Its host code is plain C++ and compiles everywhere (the tests run it over an
# emulated device); what needs the toolkit, kernels and the files gpu_*.cc, is compiled for the
# plug-in libfathom_cuda.so alone.
#
#   FATHOM_CUDA                AUTO: build the plug-in where nvcc 13 is found, in release builds;
#                              ON: or fail; OFF: do not
#   FATHOM_CUDA_ARCHITECTURES  what it is built for
file(GLOB fathom_cuda_sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/cuda/*.cc")
list(FILTER fathom_cuda_sources EXCLUDE REGEX "/(gpu_[^/]*|plugin)\\.cc$")
add_library(fathom_cuda OBJECT ${fathom_cuda_sources})
fathom_compile(fathom_cuda)
target_include_directories(fathom_cuda PRIVATE
  "${PROJECT_SOURCE_DIR}/include" "${PROJECT_SOURCE_DIR}")
target_link_libraries(fathom_cuda PRIVATE fmt::fmt Threads::Threads)

set(FATHOM_CUDA_ARCHITECTURES "80;86;89;90;100;120" CACHE STRING "GPU generations of the plug-in")
set(fathom_cuda_found OFF)
if(NOT FATHOM_CUDA STREQUAL "OFF" AND NOT FATHOM_SANITIZE AND NOT FATHOM_FUZZ AND
   (CMAKE_BUILD_TYPE STREQUAL "Release" OR NOT FATHOM_CUDA STREQUAL "AUTO"))
  find_program(FATHOM_NVCC nvcc HINTS "$ENV{CUDA_PATH}/bin" "$ENV{CUDA_HOME}/bin"
               PATHS /usr/local/cuda/bin /opt/cuda/bin)
  if(FATHOM_NVCC)
    execute_process(COMMAND "${FATHOM_NVCC}" --version OUTPUT_VARIABLE text ERROR_QUIET)
    if(text MATCHES "release ([0-9]+\\.[0-9]+)" AND CMAKE_MATCH_1 VERSION_GREATER_EQUAL 13.0)
      set(fathom_cuda_found ON)
    else()
      message(STATUS "CUDA: ${FATHOM_NVCC} is older than 13.0")
    endif()
  endif()
  if(NOT fathom_cuda_found AND NOT FATHOM_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "FATHOM_CUDA is ${FATHOM_CUDA}, and no nvcc 13 was found; "
                        "-D FATHOM_NVCC=/path/to/nvcc names one")
  endif()
endif()
if(NOT fathom_cuda_found)
  message(STATUS "CUDA: no plug-in is built")
  return()
endif()
message(STATUS "CUDA: ${FATHOM_NVCC}, for ${FATHOM_CUDA_ARCHITECTURES}")

set(CMAKE_CUDA_COMPILER "${FATHOM_NVCC}")
set(CMAKE_CUDA_ARCHITECTURES "${FATHOM_CUDA_ARCHITECTURES}")
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
file(GLOB fathom_cuda_kernels CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/cuda/*.cu")
file(GLOB fathom_cuda_gpu CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/cuda/gpu_*.cc")
add_library(fathom_cuda_plugin MODULE ${fathom_cuda_kernels} ${fathom_cuda_gpu}
  "${PROJECT_SOURCE_DIR}/cuda/plugin.cc" $<TARGET_OBJECTS:fathom_cuda>)
set_target_properties(fathom_cuda_plugin PROPERTIES
  OUTPUT_NAME fathom_cuda PREFIX lib
  CXX_VISIBILITY_PRESET hidden CUDA_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON
  POSITION_INDEPENDENT_CODE ON
  # Where the plug-in looks for cuBLASLt before the system does.
  BUILD_RPATH "$ORIGIN;${CUDAToolkit_LIBRARY_DIR}"
  INSTALL_RPATH "$ORIGIN;${CUDAToolkit_LIBRARY_DIR}"
  LINK_DEPENDS "${PROJECT_SOURCE_DIR}/cmake/plugin.map")
# The language as an option: CMake before 3.26 does not know that nvcc has C++20.
target_compile_options(fathom_cuda_plugin PRIVATE -std=c++20
  $<$<COMPILE_LANGUAGE:CXX>:-Wall$<SEMICOLON>-Wextra>
  $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr>)
target_include_directories(fathom_cuda_plugin PRIVATE
  "${PROJECT_SOURCE_DIR}/include" "${PROJECT_SOURCE_DIR}")
target_include_directories(fathom_cuda_plugin SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
# Of libfathom.a it takes what the public headers promise: Status, the table of types.
target_link_libraries(fathom_cuda_plugin PRIVATE fathom CUDA::cudart_static)
target_link_options(fathom_cuda_plugin PRIVATE
  "LINKER:--version-script=${PROJECT_SOURCE_DIR}/cmake/plugin.map" "LINKER:--as-needed"
  "LINKER:--no-undefined" "LINKER:--gc-sections")
