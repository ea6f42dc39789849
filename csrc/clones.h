// Functions marked VIMNAS_CLONES are compiled for AVX-512, AVX2 and the baseline; the loader picks
// the widest that the processor has. Elsewhere they are compiled once.
#pragma once

#include <cstdlib>  // defines __GLIBC__

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define VIMNAS_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VIMNAS_CLONES
#endif
