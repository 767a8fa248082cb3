// MDT_TARGETS: compile a function for several widths of x86's vectors; the loader picks the widest that the processor
// has. Named by what a processor has: of a named one ("arch=haswell") GCC picks the code on that very model alone.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define MDT_WIDTHS 1
#ifndef MDT_NO_AVX512  // set by a test, to run what other processors do
#define MDT_AVX512 1
#define MDT_TARGETS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MDT_TARGETS __attribute__((target_clones("avx2", "default")))
#endif
#else
#define MDT_TARGETS
#endif
