# How every target of ours is compiled, and the function that makes an object library of a folder.

# Sanitizers, asked for with FATHOM_SANITIZE; libFuzzer's coverage hooks with FATHOM_FUZZ.
function(fathom_sanitize target)
  set(flags)
  if(FATHOM_SANITIZE)
    list(APPEND flags "-fsanitize=${FATHOM_SANITIZE}" -fno-sanitize-recover=all
         -fno-omit-frame-pointer -g1)
    # These three find what the address sanitizer finds too, and double the time to compile.
    if(FATHOM_SANITIZE MATCHES "undefined")
      list(APPEND flags -fno-sanitize=null,vptr,object-size)
    endif()
    # GCC takes the instrumentation itself for uses of uninitialised variables.
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
      list(APPEND flags -Wno-maybe-uninitialized)
    endif()
  endif()
  if(FATHOM_FUZZ)
    list(APPEND flags -fsanitize=fuzzer-no-link)
  endif()
  target_compile_options(${target} PRIVATE ${flags})
  target_link_options(${target} PRIVATE ${flags})
endfunction()

# Language, warnings, hidden symbols, sanitizers.  Products and sums are never fused behind the
# source's back (-ffp-contract=off): results must not depend on the compiler's mood.  Kernel
# files for newer processors are excepted in fathom_isa.cmake.
function(fathom_compile target)
  set_target_properties(${target} PROPERTIES
    CXX_STANDARD 20 CXX_STANDARD_REQUIRED ON CXX_EXTENSIONS OFF
    C_STANDARD 99 C_STANDARD_REQUIRED ON C_EXTENSIONS OFF
    C_VISIBILITY_PRESET hidden CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON
    POSITION_INDEPENDENT_CODE ON)
  target_compile_options(${target} PRIVATE -Wall -Wextra -ffp-contract=off)
  # GCC 12 sees overlaps and uninitialised members in libstdc++ and nlohmann-json that are not there
  # (PR 105651, PR 105329).
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    target_compile_options(${target} PRIVATE
      $<$<COMPILE_LANGUAGE:CXX>:-Wno-restrict> -Wno-maybe-uninitialized)
  endif()
  if(FATHOM_WERROR)
    target_compile_options(${target} PRIVATE -Werror)
  endif()
  fathom_sanitize(${target})
endfunction()

# fathom_object_library(<name> <folder> LINK <libraries>...): objects fathom_<name> of all
# <folder>/*.cc.  They end up in libfathom through the global property fathom_objects.
function(fathom_object_library name folder)
  cmake_parse_arguments(PARSE_ARGV 2 arg "" "" "LINK")
  file(GLOB sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/${folder}/*.cc")
  if(NOT sources)
    return()
  endif()
  add_library(fathom_${name} OBJECT ${sources})
  fathom_compile(fathom_${name})
  target_include_directories(fathom_${name} PRIVATE
    "${PROJECT_SOURCE_DIR}/include" "${PROJECT_SOURCE_DIR}")
  target_compile_definitions(fathom_${name} PRIVATE FATHOM_BUILD)
  target_link_libraries(fathom_${name} PRIVATE ${arg_LINK} Threads::Threads)
  set_property(GLOBAL APPEND PROPERTY fathom_objects $<TARGET_OBJECTS:fathom_${name}>)
endfunction()
