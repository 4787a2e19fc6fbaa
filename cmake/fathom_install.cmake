# Installation: both libraries, all public headers, the programs, and a package other CMake
# projects find with find_package(fathom).
include(CMakePackageConfigHelpers)

set(fathom_package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/fathom")
install(TARGETS fathom fathom_capi_shared EXPORT fathom-targets
        ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}"
        LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}")
install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/fathom" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}"
        FILES_MATCHING PATTERN "*.hpp")
install(FILES "${PROJECT_SOURCE_DIR}/capi/fathom.h" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}"
        OPTIONAL)
install(EXPORT fathom-targets NAMESPACE fathom:: DESTINATION "${fathom_package_dir}")

set(FATHOM_USES_ONEDNN ${dnnl_FOUND})
configure_package_config_file(
  "${PROJECT_SOURCE_DIR}/cmake/fathom-config.cmake.in" "${PROJECT_BINARY_DIR}/fathom-config.cmake"
  INSTALL_DESTINATION "${fathom_package_dir}")
write_basic_package_version_file("${PROJECT_BINARY_DIR}/fathom-config-version.cmake"
  COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/fathom-config.cmake"
              "${PROJECT_BINARY_DIR}/fathom-config-version.cmake"
        DESTINATION "${fathom_package_dir}")
if(TARGET fathom_cli)
  install(TARGETS fathom_cli RUNTIME DESTINATION "${CMAKE_INSTALL_BINDIR}")
endif()
if(TARGET fathom_cuda_plugin)
  install(TARGETS fathom_cuda_plugin LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}" OPTIONAL)
endif()
