# Target grace::torch: headers and libtorch of the stable ABI, found by path (see find_torch.py).
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
execute_process(
  COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/find_torch.py
  OUTPUT_VARIABLE found RESULT_VARIABLE status ERROR_VARIABLE reason)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "grace: ${reason}")
endif()
list(GET found 0 torch_directory)
list(GET found 1 GRACE_TORCH_VERSION)
if(GRACE_TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "grace: torch must be 2.11 or later, got ${GRACE_TORCH_VERSION}")
endif()

add_library(grace_torch INTERFACE)
add_library(grace::torch ALIAS grace_torch)
target_include_directories(grace_torch SYSTEM INTERFACE ${torch_directory}/include)
# 2.11 of the stable ABI, whatever is compiled against: one build loads on every later torch.
target_compile_definitions(grace_torch INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
# libtorch.so only forwards to the libraries that hold the symbols, so it must not be dropped.
target_link_directories(grace_torch INTERFACE ${torch_directory}/lib)
target_link_options(grace_torch INTERFACE LINKER:--no-as-needed)
# A compiler may link libstdc++ statically. Half bound to the copy that torch uses, it would fail as
# soon as an error message is formatted: a static library's symbols are for its own library alone.
target_link_options(grace_torch INTERFACE LINKER:--exclude-libs,ALL)
target_link_libraries(grace_torch INTERFACE torch)
