# A project of its own builds hello.cpp and hello.c against an installed Fathom, found with
# find_package(fathom), and both continue a text.
#   cmake -D build=... -D source=... -D model=... -D generator=... -P install_test.cmake
set(root "${build}/install_test")
file(REMOVE_RECURSE "${root}")
file(MAKE_DIRECTORY "${root}/project")

function(run what)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE code OUTPUT_VARIABLE out ERROR_VARIABLE out)
  if(NOT code EQUAL 0)
    message(FATAL_ERROR "${what}: exit ${code}\n${out}")
  endif()
  set(output "${out}" PARENT_SCOPE)
endfunction()

run("install" "${CMAKE_COMMAND}" --install "${build}" --prefix "${root}/prefix")
file(COPY "${source}/examples/hello.cpp" "${source}/examples/hello.c"
     DESTINATION "${root}/project")
file(WRITE "${root}/project/CMakeLists.txt" [[
cmake_minimum_required(VERSION 3.22)
project(consumer LANGUAGES C CXX)
find_package(fathom 0.1 REQUIRED)
add_executable(hello_cpp hello.cpp)
target_link_libraries(hello_cpp PRIVATE fathom::fathom)
add_executable(hello_c hello.c)
target_link_libraries(hello_c PRIVATE fathom::capi)
]])
run("configure" "${CMAKE_COMMAND}" -G "${generator}" -S "${root}/project" -B "${root}/out"
    "-DCMAKE_PREFIX_PATH=${root}/prefix" -DCMAKE_BUILD_TYPE=Debug)
run("build" "${CMAKE_COMMAND}" --build "${root}/out")
foreach(program hello_cpp hello_c)
  run("${program}" "${root}/out/${program}" "${model}" "Once upon a time there was")
  string(LENGTH "${output}" length)
  if(length LESS 20)
    message(FATAL_ERROR "${program} says only: ${output}")
  endif()
endforeach()
file(REMOVE_RECURSE "${root}")
