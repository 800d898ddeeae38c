// For tests of what the emulation notices: kernels with a fault, of which most must end their process.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>

#include "barriers.cuh"
#include "wgmma.cuh"

namespace qexport {
namespace cuda {

constexpr size_t kPlantedBytes = 8192;  // of shared memory

// Whether the kernel ends the process, run so often, by blocks of as many threads.
inline bool dies(void (*kernel)(), int threads, unsigned blocks = 1, int runs = 1) {
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    if (!std::freopen("/dev/null", "w", stderr)) _exit(2);
    Status status;
    const dim3 block(static_cast<unsigned>(threads));
    for (int i = 0; i < runs; ++i) launch(status, kernel, dim3(blocks), block, kPlantedBytes, nullptr);
    _exit(status.ok() ? 0 : 2);
  }
  int how = 0;
  return waitpid(child, &how, 0) == child && !(WIFEXITED(how) && WEXITSTATUS(how) == 0);
}

inline int wrong = 0;
inline void expect(bool holds, const char* what) {
  if (!holds) std::printf("not so: %s\n", what), ++wrong;
}

}  // namespace cuda
}  // namespace qexport
