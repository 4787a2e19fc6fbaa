# Who may include whom:
#
#   include/fathom <- lib/io <- lib/nn <- lib/run     left never includes right
#   include/fathom <- cpu, cuda, capi                 nothing of lib, nothing of each other
#   include/fathom, capi/fathom.h <- examples         public headers only
#
# Tests may include anything.  Third-party headers have their places, and none of them is public.
#
# usage: cmake -D source=REPOSITORY -P include_rules_test.cmake
cmake_minimum_required(VERSION 3.22)

# Folder -> regular expression of the folders it may include, itself among them.
set(may_include/include/fathom "^include/fathom$")
set(may_include/lib/io "^(include/fathom|lib/io)$")
set(may_include/lib/nn "^(include/fathom|lib/io|lib/nn)$")
set(may_include/lib/run "^(include/fathom|lib/io|lib/nn|lib/run)$")
set(may_include/cpu "^(include/fathom|cpu)$")
set(may_include/cuda "^(include/fathom|cuda)$")
set(may_include/capi "^(include/fathom|capi)$")
set(may_include/examples "^(include/fathom|capi|examples)$")
set(may_include/examples/fathom "^(include/fathom|capi|examples/fathom)$")
set(folders include/fathom lib/io lib/nn lib/run cpu cuda capi examples examples/fathom)

# Header -> regular expression of the files that may include it.  A header in a folder, or one with
# an ending other than the standard library's, that no row matches is refused.
set(third_party
  "^(sys|linux|asm)/" "^(lib|cpu|cuda|capi|examples)/"
  "^(unistd|fcntl|pthread|sched|dlfcn|time|signal|poll|ucontext)\\.h$" "^(lib|cpu|cuda|capi|examples)/"
  "^(stdint|stddef|stdbool|string|stdio|stdlib|inttypes|math|float|limits|errno)\\.h$" "."
  "^(immintrin|emmintrin|x86intrin|cpuid)\\.h$" "^cpu/(amx_tiles|isa|kernels|simd|threads)[^/]*$"
  "^arm_neon\\.h$" "^cpu/(kernels|simd)[^/]*$"
  "^fmt/" "^(lib|cpu|cuda|capi|examples)/.*\\.(h|cc|cpp)$"
  "^nlohmann/" "^(lib/io/json[^/]*|examples/.*)$"
  "^Eigen/" "^(lib/nn/|cpu/)"
  "^(oneapi/)?dnnl" "^cpu/gemm_onednn\\.cc$"
  "^(cublas|cuda)[a-zA-Z_0-9]*\\.h$" "^cuda/"
  "^CLI/" "^examples/")
set(public "^(include/fathom/|capi/fathom\\.h$)")

# Why `file` may not hold this include line ("" if it may).  `file` is relative to the repository.
function(complaint file line out)
  set(${out} "" PARENT_SCOPE)
  get_filename_component(folder "${file}" DIRECTORY)
  if(line MATCHES "#[ \t]*include[ \t]*\"([^\"]+)\"")
    set(header "${CMAKE_MATCH_1}")
    if(header MATCHES "\\.\\.")
      cmake_path(SET header NORMALIZE "${folder}/${header}")
    endif()
    if(header MATCHES "^fathom/")
      set(target include/fathom)
    elseif(header STREQUAL "fathom.h")
      set(target capi)
    elseif(header MATCHES "/")
      get_filename_component(target "${header}" DIRECTORY)
    else()
      set(target "${folder}")
    endif()
    if(file STREQUAL "capi/fathom.h")
      set(${out} "the C header stands alone" PARENT_SCOPE)
    elseif(NOT target MATCHES "${may_include/${folder}}")
      set(${out} "${folder} may not include ${target}" PARENT_SCOPE)
    elseif(target STREQUAL "capi" AND NOT folder STREQUAL "capi" AND NOT header MATCHES "fathom\\.h$")
      set(${out} "only fathom.h is public in capi" PARENT_SCOPE)
    endif()
  elseif(line MATCHES "#[ \t]*include[ \t]*<([^>]+)>")
    set(header "${CMAKE_MATCH_1}")
    if(header MATCHES "^fathom(/[a-z_]+\\.hpp|\\.h)$")
      if(NOT folder MATCHES "^examples")
        set(${out} "our own headers are included with quotes" PARENT_SCOPE)
      endif()
      return()
    endif()
    if(NOT header MATCHES "[/.]")
      return()  # the C++ standard library
    endif()
    if(file MATCHES "${public}" AND NOT header MATCHES "^(stdint|stddef)\\.h$")
      set(${out} "a public header includes only itself and the standard library" PARENT_SCOPE)
      return()
    endif()
    set(rows ${third_party})
    while(rows)
      list(POP_FRONT rows pattern allowed)
      if(header MATCHES "${pattern}")
        if(NOT file MATCHES "${allowed}")
          set(${out} "<${header}> has no place here; allowed: ${allowed}" PARENT_SCOPE)
        endif()
        return()
      endif()
    endwhile()
    set(${out} "<${header}> is not known to this test" PARENT_SCOPE)
  else()
    set(${out} "cannot read this include" PARENT_SCOPE)
  endif()
endfunction()

# The check itself must bite.
foreach(case
    "lib/io/a.cc|#include \"lib/nn/b.h\"" "lib/nn/a.h|#include \"lib/run/b.h\""
    "cpu/a.cc|#include \"lib/io/b.h\"" "lib/run/a.cc|#include \"cpu/b.h\""
    "capi/a.cc|#include \"lib/run/b.h\"" "examples/fathom/a.cc|#include \"lib/io/b.h\""
    "include/fathom/a.hpp|#include <fmt/format.h>" "include/fathom/a.hpp|#include \"lib/io/b.h\""
    "capi/fathom.h|#include \"fathom/status.hpp\"" "lib/nn/a.cc|#include <nlohmann/json.hpp>"
    "cpu/b.cc|#include <oneapi/dnnl/dnnl.hpp>" "lib/io/a.cc|#include <boost/x.hpp>"
    "lib/io/a.cc|#include \"../nn/b.h\"" "lib/run/a.cc|#include <CLI/CLI.hpp>")
  string(REPLACE "|" ";" case "${case}")
  list(POP_FRONT case file line)
  complaint("${file}" "${line}" why)
  if(NOT why)
    message(FATAL_ERROR "accepted in ${file}: ${line}")
  endif()
endforeach()

set(n_includes 0)
foreach(folder IN LISTS folders)
  file(GLOB files RELATIVE "${source}" "${source}/${folder}/*")
  list(FILTER files INCLUDE REGEX "\\.(hpp|h|cc|cpp|c|cu|cuh)$")
  foreach(file IN LISTS files)
    file(STRINGS "${source}/${file}" lines REGEX "^[ \t]*#[ \t]*include")
    foreach(line IN LISTS lines)
      math(EXPR n_includes "${n_includes} + 1")
      complaint("${file}" "${line}" why)
      if(why)
        message(SEND_ERROR "${file}: ${line}\n  ${why}")
      endif()
    endforeach()
  endforeach()
endforeach()
if(n_includes LESS 50)
  message(FATAL_ERROR "${source}: only ${n_includes} includes found; is it the repository?")
endif()
message(STATUS "${n_includes} includes looked at")
