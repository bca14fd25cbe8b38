// Choice of the instruction set: what the CPU has, or what KVKEYE_CPU_ISA asks for.
#include "kvkeye/common/isa.h"

#include <cstdint>
#include <cstdlib>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

namespace kvkeye {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "amx"};

#if defined(__x86_64__) && defined(__linux__)
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64};
  uint8_t rows[16] = {16, 16, 16};
};

// A product of ones; ends the process with 0 where it comes out right.
__attribute__((target("amx-tile,amx-bf16"))) [[noreturn]] void try_tiles() {
  for (const int number : {SIGILL, SIGSEGV, SIGBUS})
    signal(number, SIG_DFL);
  const TileShapes shapes;
  alignas(64) uint16_t ones[16 * 32];
  alignas(64) float product[16 * 16];
  for (uint16_t& one : ones)
    one = 0x3f80;
  _tile_loadconfig(&shapes);
  _tile_zero(0);
  _tile_loadd(1, ones, 64);
  _tile_loadd(2, ones, 64);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, product, 64);
  _tile_release();
  for (const float value : product)
    if (value != 32.0f)
      _exit(1);
  _exit(0);
}

// Linux lends tiles to a process that asks. Some hypervisors announce them and do not keep their word, so a
// child process goes first.
bool tiles() {
  unsigned a, b, c, d;
  constexpr unsigned bf16_and_tile = 1u << 22 | 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & bf16_and_tile) != bf16_and_tile)
    return false;
  constexpr long request = 0x1023, tile_data = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, request, tile_data) != 0)
    return false;
  const pid_t child = fork();
  if (child == 0)
    try_tiles();
  int status = -1;
  return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}
#else
bool tiles() {
  return false;
}
#endif

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
  static const bool amx = avx512 && tiles();
  return isa == Isa::generic || (isa == Isa::avx2 && avx2) || (isa == Isa::avx512 && avx512) ||
         (isa == Isa::amx && amx);
#else
  return isa == Isa::generic;
#endif
}

Isa widest() {
  for (const Isa isa : {Isa::amx, Isa::avx512})
    if (supported(isa))
      return isa;
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
  for (const Isa isa : {Isa::generic, Isa::avx2, Isa::avx512, Isa::amx}) {
    if (std::string(asked) != kNames[int(isa)])
      continue;
    if (supported(isa))
      return {isa, kNames[int(isa)], nullptr};
    return failure(given + "this CPU or operating system does not support it." + advice);
  }
  return failure(given + "expected one of generic, avx2, avx512, amx." + advice);
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
