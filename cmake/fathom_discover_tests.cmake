# fathom_discover_tests(<target>): every Catch2 case of the program becomes a test of ctest named
# "<target>: <case>".  Tags become properties: [slow] gives the label `slow` instead of `quick`
# and more time, [serial] keeps other tests away (for cases that measure time or memory).
# A case that prints a line beginning with "SKIPPED: " (WARN will do) counts as skipped.
#
# Run as a script after each link, this file also does the work.
if(NOT CMAKE_SCRIPT_MODE_FILE)
  set(fathom_discover_script "${CMAKE_CURRENT_LIST_FILE}")

  function(fathom_discover_tests target)
    set(listing "${CMAKE_CURRENT_BINARY_DIR}/${target}_cases.cmake")
    add_custom_command(TARGET ${target} POST_BUILD BYPRODUCTS "${listing}"
      COMMAND "${CMAKE_COMMAND}" -D "target=${target}" -D "program=$<TARGET_FILE:${target}>"
              -D "listing=${listing}" -P "${fathom_discover_script}"
      VERBATIM)
    # A program that was not built must not vanish from the tests.
    file(WRITE "${listing}.include"
      "if(EXISTS \"${listing}\")\n  include(\"${listing}\")\n"
      "else()\n  add_test(\"${target} (not built)\" \"${target}\")\nendif()\n")
    set_property(DIRECTORY APPEND PROPERTY TEST_INCLUDE_FILES "${listing}.include")
  endfunction()
  return()
endif()

cmake_minimum_required(VERSION 3.22)

function(list_cases spec out)
  execute_process(COMMAND "${program}" "${spec}" --list-test-names-only
    OUTPUT_VARIABLE text ERROR_VARIABLE errors RESULT_VARIABLE result)
  if(NOT result MATCHES "^[0-9]+$")  # the exit status is the number of cases
    file(REMOVE "${program}")        # so that the next build tries again
    message(FATAL_ERROR "${target} cannot list its cases: ${result}\n${errors}")
  endif()
  string(REPLACE ";" "\\;" text "${text}")
  string(REGEX REPLACE "\n+$" "" text "${text}")
  string(REPLACE "\n" ";" text "${text}")
  set(${out} "${text}" PARENT_SCOPE)
endfunction()

list_cases("~[slow]~[.]" quick)
list_cases("[slow]~[.]" slow)
list_cases("[serial]" serial)

set(script "# Written by fathom_discover_tests.\n")
foreach(label quick slow)
  if(label STREQUAL "quick")
    set(timeout 300)
  else()
    set(timeout 1800)
  endif()
  foreach(case IN LISTS ${label})
    string(REGEX REPLACE "([][,\\])" "\\\\\\1" escaped "${case}")
    string(APPEND script
      "add_test([==[${target}: ${case}]==] [==[${program}]==] [==[${escaped}]==])\n"
      "set_tests_properties([==[${target}: ${case}]==] PROPERTIES LABELS ${label} "
      "TIMEOUT ${timeout} SKIP_REGULAR_EXPRESSION [==[(^|\n) *SKIPPED: ]==]")
    if(case IN_LIST serial)
      string(APPEND script " RUN_SERIAL ON")
    endif()
    string(APPEND script ")\n")
  endforeach()
endforeach()
file(WRITE "${listing}" "${script}")
