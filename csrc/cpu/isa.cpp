// Choice of the instruction set: what the CPU has, or what KVKEYE_CPU_ISA asks for.
#include "kvkeye/common/isa.h"

#include <cstdlib>
#include <string>

namespace kvkeye {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512"};

// The compiler's runtime also asks the operating system (XGETBV) whether the registers are saved.
bool supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
                      __builtin_cpu_supports("avx512bf16");
  return isa == Isa::generic || (isa == Isa::avx2 && avx2) || (isa == Isa::avx512 && avx512);
#else
  return isa == Isa::generic;
#endif
}

Isa widest() {
  if (supported(Isa::avx512))
    return Isa::avx512;
  return supported(Isa::avx2) ? Isa::avx2 : Isa::generic;
}

IsaChoice failure(const std::string& message) {
  static const std::string kept = message;
  return {Isa::generic, kNames[0], kept.c_str()};
}

IsaChoice choose() {
  const char* asked = std::getenv("KVKEYE_CPU_ISA");
  if (asked == nullptr || *asked == '\0')
    return {widest(), kNames[int(widest())], nullptr};
  const std::string given = std::string("KVKEYE_CPU_ISA='") + asked + "': ";
  const std::string advice = std::string(" Unset it to use ") + kNames[int(widest())] + ".";
  for (const Isa isa : {Isa::generic, Isa::avx2, Isa::avx512}) {
    if (std::string(asked) != kNames[int(isa)])
      continue;
    if (supported(isa))
      return {isa, kNames[int(isa)], nullptr};
    return failure(given + "this CPU or operating system does not support it." + advice);
  }
  return failure(given + "expected one of generic, avx2, avx512." + advice);
}

} // namespace

const IsaChoice& active_isa() {
  static const IsaChoice choice = choose();
  return choice;
}

bool fast_bf16_pairs() {
#if defined(__x86_64__)
  // AMD: half the time. Intel (Emerald Rapids): the time of four.
  return supported(Isa::avx512) && __builtin_cpu_is("amd");
#else
  return false;
#endif
}

} // namespace kvkeye
