# One object library per instruction set: the files of CPU_KERNELS with that set's flags and
# SSL_FAST_ISA=<name>, linked into _native, which learns of each by SSL_FAST_HAVE_<NAME>.
include(CheckCXXSourceCompiles)

# Kernels throw nothing; without exceptions they don't refer to the C++ personality routine, which would
# be a weak symbol in each object. What a callee throws still passes through them.
set(isa_flags -fno-exceptions -fno-rtti)
if(CMAKE_CXX_COMPILER_ID STREQUAL GNU)
  # GCC warns of its own intrinsics, which start from an undefined register.
  list(APPEND isa_flags -Wno-uninitialized -Wno-maybe-uninitialized)
endif()

function(ssl_fast_add_isa name)
  add_library(ssl_fast_${name} OBJECT ${CPU_KERNELS})
  set_target_properties(ssl_fast_${name} PROPERTIES INTERPROCEDURAL_OPTIMIZATION OFF)
  target_compile_definitions(ssl_fast_${name} PRIVATE SSL_FAST_ISA=${name})
  target_compile_options(ssl_fast_${name} PRIVATE ${isa_flags} ${ARGN})
  target_link_libraries(ssl_fast_${name} PRIVATE ssl_fast_flags)
  target_link_libraries(_native PRIVATE ssl_fast_${name})
  string(TOUPPER ${name} upper)
  target_compile_definitions(_native PRIVATE SSL_FAST_HAVE_${upper}=1)
endfunction()

# An intrinsic of the set is compiled with its flags, not the flags alone: an assembler older than its
# compiler accepts the flags and fails on the instruction.
function(ssl_fast_try_isa name intrinsic)
  string(TOUPPER ${name} upper)
  list(JOIN ARGN " " CMAKE_REQUIRED_FLAGS)
  check_cxx_source_compiles("#include <immintrin.h>\nint main() { ${intrinsic}; }"
                            SSL_FAST_COMPILES_${upper})
  if(SSL_FAST_COMPILES_${upper})
    ssl_fast_add_isa(${name} ${ARGN})
  else()
    message(STATUS "ssl_fast: no ${name} kernels, this compiler does not build them")
  endif()
endfunction()

ssl_fast_add_isa(baseline)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(avx2 -mavx2 -mfma -mf16c -mprfchw)
  set(avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl ${avx2})
  set(avx512_bf16 ${avx512} -mavx512bf16)
  set(amx_bf16 ${avx512_bf16} -mamx-tile -mamx-bf16)

  ssl_fast_try_isa(avx2 "(void)_mm256_fmadd_ps(__m256(), __m256(), __m256())" ${avx2})
  ssl_fast_try_isa(avx512 "(void)_mm512_scalef_ps(__m512(), __m512())" ${avx512})
  ssl_fast_try_isa(avx512_bf16
    "(void)_mm512_dpbf16_ps(__m512(), __m512bh(), __m512bh())" ${avx512_bf16})
  ssl_fast_try_isa(amx_bf16 "_tile_dpbf16ps(0, 1, 2)" ${amx_bf16})
endif()
