// MDT_TARGETS compiles a function for several x86 vector widths, and the loader picks the widest that the processor
// has. The targets are named by feature, because GCC picks the code of a named model ("arch=haswell") only on exactly
// that model.
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
