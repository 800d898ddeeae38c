// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the only source of randomness.
//
// A draw is a pure function of (key, counter), so it does not depend on the thread, the tile or the device.
#pragma once

#include <cstdint>

#include "qexport/host_device.h"

namespace qexport {

struct PhiloxBlock {
  uint32_t word[4];
};

// Ten rounds over `counter` with the key (key_lo, key_hi).
QEXPORT_HOST_DEVICE static inline PhiloxBlock philox4x32(uint32_t key_lo, uint32_t key_hi, PhiloxBlock counter) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t even = uint64_t{0xD2511F53u} * counter.word[0];
    const uint64_t odd = uint64_t{0xCD9E8D57u} * counter.word[2];
    counter = {{static_cast<uint32_t>(odd >> 32) ^ counter.word[1] ^ key_lo, static_cast<uint32_t>(odd),
                static_cast<uint32_t>(even >> 32) ^ counter.word[3] ^ key_hi, static_cast<uint32_t>(even)}};
    key_lo += 0x9E3779B9u;
    key_hi += 0xBB67AE85u;
  }
  return counter;
}

}  // namespace qexport
