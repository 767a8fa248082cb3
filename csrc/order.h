// Map floating-point numbers to unsigned integers in the same order, with -0 equal to 0 and NaN last.
#pragma once

#include "update.h"

namespace mdt_fast {

MDT_HOST_DEVICE uint32_t ordered(float x) {
  if (x != x) return 0xffffffffu;
  const uint32_t bits = bits_of(x == 0 ? 0.0f : x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

MDT_HOST_DEVICE uint64_t ordered(double x) {
  if (x != x) return ~0ull;
  if (x == 0) x = 0.0;
  uint64_t bits;
  memcpy(&bits, &x, 8);
  return bits >> 63 ? ~bits : bits | (1ull << 63);
}

}  // namespace mdt_fast
