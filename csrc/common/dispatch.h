// Run-time choice of the vector instructions on a CPU.
#pragma once

// A function so marked is compiled once for each instruction set and chosen when the library loads.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define GRACE_CPU_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define GRACE_CPU_CLONES
#endif
