// MDT_TARGETS: compile a function for several generations of x86 and pick one when the library is loaded.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define MDT_TARGETS __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define MDT_TARGETS
#endif
