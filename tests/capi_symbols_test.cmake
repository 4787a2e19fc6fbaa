# The functions that libfathom.so exports, those that capi/fathom.h declares, and those listed in
# capi_symbols.txt are the same.  The list is what reviewers see change.
#
# usage: cmake -D nm=NM -D library=SO -D header=H -D list=TXT -P capi_symbols_test.cmake
cmake_minimum_required(VERSION 3.22)
execute_process(COMMAND "${nm}" --dynamic --defined-only --format=posix "${library}"
  OUTPUT_VARIABLE text COMMAND_ERROR_IS_FATAL ANY)
string(REGEX REPLACE "([^ \n]+) [^\n]*" "\\1" text "${text}")
string(REGEX MATCHALL "[^\n]+" exported "${text}")

# Comments go first: they may speak of functions.  Then every FATHOM_API up to its semicolon holds
# one declaration, and the name before its first parenthesis.
file(READ "${header}" text)
string(REPLACE ";" "@" text "${text}")
string(REGEX REPLACE "//[^\n]*" "" text "${text}")
string(REGEX REPLACE "/\\*([^*]|\\*+[^*/])*\\*+/" "" text "${text}")
string(REGEX REPLACE "#[ \t]*define[^\n]*" "" text "${text}")
string(REGEX MATCHALL "FATHOM_API[^@(]*\\(" declarations "${text}")
set(declared)
foreach(declaration IN LISTS declarations)
  if(declaration MATCHES "(fathom_[a-z0-9_]+)[ \t\n]*\\($")
    list(APPEND declared "${CMAKE_MATCH_1}")
  else()
    message(SEND_ERROR "${header}: no function name in '${declaration}'")
  endif()
endforeach()

file(STRINGS "${list}" listed REGEX "^[a-z]")

foreach(name exported declared listed)
  list(SORT ${name})
  list(LENGTH ${name} n)
  message(STATUS "${n} ${name}")
endforeach()
if(NOT declared)
  message(SEND_ERROR "${header}: no FATHOM_API declarations found")
endif()

function(compare a b)
  foreach(symbol IN LISTS ${a})
    if(NOT symbol IN_LIST ${b})
      message(SEND_ERROR "${symbol} is ${a}, but not ${b}")
    endif()
  endforeach()
endfunction()
compare(declared exported)
compare(exported declared)
compare(declared listed)
compare(listed declared)
