# Resolves GRACE_CUDA and GRACE_CUDA_ARCHS and enables the CUDA language where kernels are built:
#   GRACE_CUDA=OFF           CPU build
#   GRACE_CUDA_ARCHS given   CUDA build for them; needs nvcc and no GPU
#   neither                  CUDA build for the GPUs present if nvcc is there, else a CPU build
function(grace_present_architectures result)
  find_program(nvidia_smi nvidia-smi)
  set(archs "")
  if(nvidia_smi)
    execute_process(COMMAND ${nvidia_smi} --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE output ERROR_QUIET RESULT_VARIABLE status OUTPUT_STRIP_TRAILING_WHITESPACE)
    if(status EQUAL 0 AND output MATCHES "^[0-9.\n ]+$")
      string(REPLACE "." "" output "${output}")
      string(REPLACE "\n" ";" archs "${output}")
      list(REMOVE_DUPLICATES archs)
      list(TRANSFORM archs REPLACE "^90$" "90a")  # wgmma and setmaxnreg exist under 90a only
    endif()
  endif()
  set(${result} "${archs}" PARENT_SCOPE)
endfunction()

string(REPLACE "," ";" GRACE_CUDA_ARCHS "${GRACE_CUDA_ARCHS}")
set(grace_cuda_asked "${GRACE_CUDA}")  # "" stays a value: unquoted, it would unset the variable
if(GRACE_CUDA_ARCHS AND GRACE_CUDA STREQUAL "")
  set(grace_cuda_asked ON)
endif()
if(NOT GRACE_CUDA_ARCHS AND (GRACE_CUDA STREQUAL "" OR GRACE_CUDA))
  grace_present_architectures(GRACE_CUDA_ARCHS)
endif()

if(GRACE_CUDA AND NOT GRACE_CUDA_ARCHS)
  message(FATAL_ERROR "grace: GRACE_CUDA=ON but no GPU was found: name the architectures, "
    "e.g. GRACE_CUDA_ARCHS=\"80;89;90a\"")
endif()

# CMake looks for nvcc on PATH and in CUDACXX; toolkits are often installed beside them.
if(NOT DEFINED ENV{CUDACXX} AND NOT CMAKE_CUDA_COMPILER)
  find_program(grace_nvcc nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH ENV CUDA_ROOT PATHS /usr/local/cuda
    PATH_SUFFIXES bin)
  if(grace_nvcc)
    set(ENV{CUDACXX} ${grace_nvcc})
  endif()
endif()

set(GRACE_CUDA OFF)
if(GRACE_CUDA_ARCHS AND (grace_cuda_asked OR grace_cuda_asked STREQUAL ""))
  include(CheckLanguage)
  set(CMAKE_CUDA_ARCHITECTURES "${GRACE_CUDA_ARCHS}")
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(GRACE_CUDA ON)
  elseif(grace_cuda_asked)
    message(FATAL_ERROR "grace: building for CUDA architectures ${GRACE_CUDA_ARCHS} needs nvcc, which "
      "was not found: put it on PATH or set CUDACXX, or set GRACE_CUDA=OFF for a CPU build")
  else()
    message(WARNING "grace: a GPU is present but nvcc was not found (PATH, CUDACXX)")
  endif()
endif()

if(GRACE_CUDA)
  enable_language(CUDA)
  message(STATUS "grace: CUDA build for ${GRACE_CUDA_ARCHS} (nvcc ${CMAKE_CUDA_COMPILER_VERSION})")
else()
  set(GRACE_CUDA_ARCHS "")
  message(STATUS "grace: CPU build. For CUDA kernels set GRACE_CUDA_ARCHS=\"80;89;90a\" "
    "(needs nvcc, no GPU)")
endif()
