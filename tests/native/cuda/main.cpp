// main SEED OP FOLDER [OP FOLDER]...: runs the calls one after the other.
#include "case.h"

namespace kvkeye::host_cuda {

std::map<std::string, Call>& calls() {
  static std::map<std::string, Call> all;
  return all;
}

} // namespace kvkeye::host_cuda

extern "C" const char* __asan_default_options() {
  return "detect_leaks=0:detect_stack_use_after_return=0";
}

int main(int count, char** words) {
  using namespace kvkeye::host_cuda;
  for (int i = 2; i + 1 < count; i += 2) {
    const auto call = calls().find(words[i]);
    if (call == calls().end()) {
      std::fprintf(stderr, "no call named %s\n", words[i]);
      return 1;
    }
    shuffle_by(std::strtoull(words[1], nullptr, 10));
    Case c(words[i + 1]);
    if (const int status = call->second(c); status != 0) {
      std::fprintf(stderr, "%s of %s: the launch returned CUDA error %d\n", words[i], words[i + 1], status);
      return 2;
    }
    c.save();
  }
  return 0;
}
