# The CUDA backend.  Its host code is plain C++ and compiles everywhere (the tests run it over an
# emulated device); what needs the toolkit, kernels and the files gpu_*.cc, is compiled for the
# plug-in alone.
file(GLOB fathom_cuda_sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/cuda/*.cc")
list(FILTER fathom_cuda_sources EXCLUDE REGEX "/(gpu_[^/]*|plugin)\\.cc$")
add_library(fathom_cuda OBJECT ${fathom_cuda_sources})
fathom_compile(fathom_cuda)
target_include_directories(fathom_cuda PRIVATE
  "${PROJECT_SOURCE_DIR}/include" "${PROJECT_SOURCE_DIR}")
target_link_libraries(fathom_cuda PRIVATE fmt::fmt Threads::Threads)
