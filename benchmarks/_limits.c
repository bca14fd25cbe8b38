// What the machine can do, for the tables to compare with: register-only arithmetic and plain reads.
// _limits.py compiles this for the machine it runs on. Every loop keeps its sums in registers; a spilled
// accumulator would report a fraction of the truth.

#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__AMX_BF16__) && defined(__x86_64__)
#include <immintrin.h>
// Products of bf16 tiles summed in fp32; 0 where there are none or the system does not lend them.
double tile_flops(int64_t rounds) {
  enum { kRequestPermission = 0x1023, kTileData = 18 };
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0)
    return 0;
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } config = {.palette = 1};
  for (int i = 0; i < 8; ++i)
    config.row_bytes[i] = 64, config.rows[i] = 16;
  __asm__ volatile("ldtilecfg %0" : : "m"(config)); // the compiler's own form forgets that it reads memory
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t r = 0; r < rounds; ++r) {
    _tile_dpbf16ps(0, 6, 7);
    _tile_dpbf16ps(1, 6, 7);
    _tile_dpbf16ps(2, 6, 7);
    _tile_dpbf16ps(3, 6, 7);
    _tile_dpbf16ps(4, 6, 7);
    _tile_dpbf16ps(5, 6, 7);
  }
  _tile_release();
  return (double)rounds * 6 * 16 * 16 * 32 * 2;
}
#else
double tile_flops(int64_t rounds) {
  return 0 * (double)rounds;
}
#endif

#ifdef __AVX512F__
#include <immintrin.h>
enum { kSums = 24 };

#define FOR_SUMS(X)                                                                                          \
  X(0)                                                                                                       \
  X(1)                                                                                                       \
  X(2)                                                                                                       \
  X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15) X(16) X(17) X(18) X(19) X(20) X(21) \
      X(22) X(23)

// Multiplications and additions of fp32 in `rounds` rounds.
double fp32_flops(int64_t rounds) {
  const __m512 a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(0.25f);
#define DECLARE(i) __m512 s##i = _mm512_set1_ps((float)i);
#define STEP(i) __asm__ volatile("vfmadd231ps %1, %2, %0" : "+v"(s##i) : "v"(a), "v"(b));
#define KEEP(i) __asm__ volatile("" ::"v"(s##i));
  FOR_SUMS(DECLARE)
  for (int64_t r = 0; r < rounds; ++r) {
    FOR_SUMS(STEP)
  }
  FOR_SUMS(KEEP)
#undef STEP
#undef DECLARE
  return (double)rounds * kSums * 32;
}

// The same for products of bf16 pairs summed in fp32; 0 where the CPU has none.
double bf16_flops(int64_t rounds) {
#ifdef __AVX512BF16__
  const __m512i a = _mm512_set1_epi16(0x3f00), b = _mm512_set1_epi16(0x3e80);
#define DECLARE(i) __m512 s##i = _mm512_set1_ps((float)i);
#define STEP(i) __asm__ volatile("vdpbf16ps %1, %2, %0" : "+v"(s##i) : "v"(a), "v"(b));
  FOR_SUMS(DECLARE)
  for (int64_t r = 0; r < rounds; ++r) {
    FOR_SUMS(STEP)
  }
  FOR_SUMS(KEEP)
  return (double)rounds * kSums * 64;
#else
  (void)rounds;
  return 0;
#endif
}

// Reads `bytes` (a multiple of 1024) once; the sum keeps the loads.
uint64_t read_bytes(const char* data, size_t bytes) {
  __m512i s0 = _mm512_setzero_si512(), s1 = s0, s2 = s0, s3 = s0;
  for (size_t i = 0; i < bytes; i += 256) {
    for (size_t line = 0; line < 256; line += 64)
      _mm_prefetch(data + i + 8192 + line, _MM_HINT_T0);
    s0 = _mm512_xor_si512(s0, _mm512_load_si512((const void*)(data + i)));
    s1 = _mm512_xor_si512(s1, _mm512_load_si512((const void*)(data + i + 64)));
    s2 = _mm512_xor_si512(s2, _mm512_load_si512((const void*)(data + i + 128)));
    s3 = _mm512_xor_si512(s3, _mm512_load_si512((const void*)(data + i + 192)));
  }
  s0 = _mm512_xor_si512(_mm512_xor_si512(s0, s1), _mm512_xor_si512(s2, s3));
  return (uint64_t)_mm512_reduce_or_epi64(s0);
}
#else
double fp32_flops(int64_t rounds) {
  return 0 * (double)rounds;
}
double bf16_flops(int64_t rounds) {
  return 0 * (double)rounds;
}
uint64_t read_bytes(const char* data, size_t bytes) {
  uint64_t s[8] = {0};
  for (size_t i = 0; i < bytes; i += 64)
    for (int j = 0; j < 8; ++j)
      s[j] ^= *(const uint64_t*)(data + i + 8 * j);
  return s[0] ^ s[1] ^ s[2] ^ s[3] ^ s[4] ^ s[5] ^ s[6] ^ s[7];
}
#endif
