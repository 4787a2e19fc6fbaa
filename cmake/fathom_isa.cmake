# Compiler flags of single files in cpu/: each instruction set has files of its own, and only they
# are compiled for it.  The choice among them is made at run time.
#
#   kernels_avx2*.cc        AVX2 + FMA + F16C
#   kernels_avx512*.cc      and AVX-512 F/BW/VL/DQ with VNNI
#   kernels_avx512bf16*.cc  and AVX512_BF16
#   kernels_avx512vbmi*.cc  and AVX512_BF16 and AVX512_VBMI
#   kernels_amx*.cc         and AMX tiles, int8 and bf16
#
# On other processors than x86-64 these files are left out; the sources ask with __x86_64__.
if(NOT TARGET fathom_cpu)
  return()
endif()

set(fathom_flags_avx2 -mavx2 -mfma -mf16c)
set(fathom_flags_avx512 ${fathom_flags_avx2}
    -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni)
set(fathom_flags_avx512bf16 ${fathom_flags_avx512} -mavx512bf16)
set(fathom_flags_avx512vbmi ${fathom_flags_avx512bf16} -mavx512vbmi)
set(fathom_flags_amx ${fathom_flags_avx512bf16} -mamx-tile -mamx-int8 -mamx-bf16)

get_target_property(fathom_cpu_sources fathom_cpu SOURCES)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|amd64|AMD64)$")
  foreach(isa avx2 avx512 avx512bf16 avx512vbmi amx)  # the more special pattern comes later and wins
    set(files ${fathom_cpu_sources})
    list(FILTER files INCLUDE REGEX "/kernels_${isa}[^/]*\\.cc$")
    if(files)
      set_source_files_properties(${files} PROPERTIES
        COMPILE_OPTIONS "${fathom_flags_${isa}};-ffp-contract=fast")
    endif()
  endforeach()
else()
  list(FILTER fathom_cpu_sources EXCLUDE REGEX "/kernels_(avx|amx)[^/]*\\.cc$")
  set_target_properties(fathom_cpu PROPERTIES SOURCES "${fathom_cpu_sources}")
endif()

# The one file that knows oneDNN; without the definition it answers "not built in".
if(dnnl_FOUND)
  set(files ${fathom_cpu_sources})
  list(FILTER files INCLUDE REGEX "/gemm_onednn\\.cc$")
  if(files)
    set_source_files_properties(${files} PROPERTIES
      COMPILE_DEFINITIONS FATHOM_HAVE_ONEDNN
      INCLUDE_DIRECTORIES "$<TARGET_PROPERTY:DNNL::dnnl,INTERFACE_INCLUDE_DIRECTORIES>")
  endif()
endif()
