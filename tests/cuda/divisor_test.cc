// Divisor against the division of the language, where its rounding is at its worst.
#include <cstdio>

#include "common.cuh"

int main() {
  constexpr int64_t kMost = INT32_MAX;
  int64_t wrong = 0;
  for (int64_t by = 1; by <= kMost; by += by < 4099 ? 1 : by / 1021) {
    const qexport::cuda::Divisor divisor(by);
    for (const int64_t multiple : {int64_t{0}, by, kMost / 2 / by * by, kMost / by * by, kMost + 1}) {
      for (int64_t x = std::max<int64_t>(multiple - 2, 0); x <= std::min(multiple + 1, kMost); ++x) {
        int rest = 0;
        const int quotient = divisor.divide(static_cast<int>(x), &rest);
        if (quotient == x / by && rest == x % by) continue;
        if (++wrong < 10) std::printf("%lld / %lld: %d, %d\n", (long long)x, (long long)by, quotient, rest);
      }
    }
  }
  return wrong > 0;
}
