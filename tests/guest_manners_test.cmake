# The library is a guest in its host's process: it does not print, end the process, read the
# environment, or change locale, signals and floating-point modes.  What it calls tells.
#
# usage: cmake -D nm=NM -D library=libfathom.a -P guest_manners_test.cmake
cmake_minimum_required(VERSION 3.22)
set(forbidden
  # prints
  printf vprintf __printf_chk __vprintf_chk puts putchar perror stdout stderr
  _ZSt4cout _ZSt4cerr _ZSt4clog _ZNSt8ios_base4InitC1Ev
  # ends the process
  abort exit _exit _Exit quick_exit __assert_fail raise kill atexit
  # looks around, or changes what the whole process sees
  getenv secure_getenv setenv putenv environ setlocale _ZNSt6locale6globalERKS_
  signal sigaction fesetround feenableexcept fesetenv srand rand system fork chdir umask)

execute_process(COMMAND "${nm}" --undefined-only --format=posix "${library}"
  OUTPUT_VARIABLE text COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[^\n]+" lines "${text}")
set(object "")
set(n_symbols 0)
foreach(line IN LISTS lines)
  if(line MATCHES "\\[(.+)\\]:$")
    set(object "${CMAKE_MATCH_1}")
  elseif(line MATCHES "^([^ ]+) [Uw]")
    math(EXPR n_symbols "${n_symbols} + 1")
    if(CMAKE_MATCH_1 IN_LIST forbidden)
      message(SEND_ERROR "${object} uses ${CMAKE_MATCH_1}")
    endif()
  endif()
endforeach()
if(n_symbols LESS 10)
  message(FATAL_ERROR "${library}: only ${n_symbols} undefined symbols; is it the library?")
endif()
message(STATUS "${n_symbols} undefined symbols looked at")
