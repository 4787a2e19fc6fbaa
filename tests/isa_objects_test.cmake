# Object files made for one instruction set export exactly one symbol and share nothing: a weak
# function (an inline one, a template instance) compiled for AVX-512 could be the copy the linker
# keeps for the whole program, and a static constructor would run on every machine.
#
# usage: cmake -D nm=NM -D objects=FILE;FILE... -P isa_objects_test.cmake
cmake_minimum_required(VERSION 3.22)

# The complaints about what nm says of one object file.
function(complaints_about text out)
  string(REGEX MATCHALL "[^\n]+" lines "${text}")
  set(exported)
  set(found)
  foreach(line IN LISTS lines)
    if(NOT line MATCHES "^([^ ]+) ([A-Za-z?])")
      list(APPEND found "cannot read: ${line}")
      continue()
    endif()
    set(symbol "${CMAKE_MATCH_1}")
    set(kind "${CMAKE_MATCH_2}")
    if(symbol MATCHES "^_GLOBAL__")
      list(APPEND found "static constructor ${symbol}")
    elseif(kind MATCHES "[WwVvu]")
      list(APPEND found "weak symbol ${symbol}")
    elseif(kind MATCHES "[TDBRGSC]")
      list(APPEND exported "${symbol}")
    endif()
  endforeach()
  list(LENGTH exported n)
  if(NOT n EQUAL 1)
    list(APPEND found "${n} exported symbols (${exported}) instead of 1")
  endif()
  set(${out} "${found}" PARENT_SCOPE)
endfunction()

# The check itself must bite.
complaints_about("_ZN6fathom3cpu12kernels_avx2Ev T 0 9\n_ZL4body t 0 9\nmemcpy U         \n" good)
if(good)
  message(FATAL_ERROR "a good object was refused: ${good}")
endif()
foreach(bad "a T 0 1\nb T 0 1\n" "_ZL4body t 0 9\n" "a T 0 1\n_ZSt3maxIfE W 0 9\n"
            "a T 0 1\n_GLOBAL__sub_I_a t 0 1\n")
  complaints_about("${bad}" found)
  if(NOT found)
    message(FATAL_ERROR "a bad object was accepted:\n${bad}")
  endif()
endforeach()

set(failed OFF)
set(seen 0)
foreach(object IN LISTS objects)
  if(NOT object MATCHES "/kernels_(avx|amx|neon)[^/]*$")
    continue()
  endif()
  math(EXPR seen "${seen} + 1")
  execute_process(COMMAND "${nm}" --format=posix "${object}"
    OUTPUT_VARIABLE text COMMAND_ERROR_IS_FATAL ANY)
  complaints_about("${text}" found)
  foreach(complaint IN LISTS found)
    message(SEND_ERROR "${object}: ${complaint}")
  endforeach()
endforeach()
message(STATUS "${seen} object files for one instruction set each")
