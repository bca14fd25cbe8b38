// One kernel, compiled once per instruction set, called by one name.
//
// KVKEYE_KERNEL(rms_norm, RmsNormParams) declares kvkeye::generic::rms_norm<T>, kvkeye::avx2::rms_norm<T> and
// kvkeye::avx512::rms_norm<T>, and defines kvkeye::cpu::rms_norm, which forwards to the active one.
// A kernel works on items [begin, end) and nothing else: the caller splits the items over threads, so a
// result cannot depend on how many there are.
#pragma once

#include "kvkeye/common/isa.h"
#include "kvkeye/common/types.h"

#include <cstdint>

#if defined(__x86_64__)
#define KVKEYE_FORWARD(name)                                                                                 \
  switch (active_isa().isa) {                                                                                \
  case Isa::amx:                                                                                             \
  case Isa::avx512:                                                                                          \
    return avx512::name(params, begin, end);                                                                 \
  case Isa::avx2:                                                                                            \
    return avx2::name(params, begin, end);                                                                   \
  case Isa::generic:                                                                                         \
    return generic::name(params, begin, end);                                                                \
  }
#else
#define KVKEYE_FORWARD(name) generic::name(params, begin, end);
#endif

// A kernel over a storage type: float and bf16 are instantiated by KVKEYE_INSTANTIATE in its source file.
#define KVKEYE_KERNEL(name, Params)                                                                          \
  namespace generic {                                                                                        \
  template <class T> void name(const Params<T>& params, int64_t begin, int64_t end);                         \
  }                                                                                                          \
  namespace avx2 {                                                                                           \
  template <class T> void name(const Params<T>& params, int64_t begin, int64_t end);                         \
  }                                                                                                          \
  namespace avx512 {                                                                                         \
  template <class T> void name(const Params<T>& params, int64_t begin, int64_t end);                         \
  }                                                                                                          \
  namespace cpu {                                                                                            \
  template <class T> void name(const Params<T>& params, int64_t begin, int64_t end) {                        \
    KVKEYE_FORWARD(name)                                                                                     \
  }                                                                                                          \
  }

// A kernel that is blind to the storage type.
#define KVKEYE_UNTYPED_KERNEL(name, Params)                                                                  \
  namespace generic {                                                                                        \
  void name(const Params& params, int64_t begin, int64_t end);                                               \
  }                                                                                                          \
  namespace avx2 {                                                                                           \
  void name(const Params& params, int64_t begin, int64_t end);                                               \
  }                                                                                                          \
  namespace avx512 {                                                                                         \
  void name(const Params& params, int64_t begin, int64_t end);                                               \
  }                                                                                                          \
  namespace cpu {                                                                                            \
  inline void name(const Params& params, int64_t begin, int64_t end) {                                       \
    KVKEYE_FORWARD(name)                                                                                     \
  }                                                                                                          \
  }

#define KVKEYE_INSTANTIATE(name, Params)                                                                     \
  template void name<float>(const Params<float>&, int64_t, int64_t);                                         \
  template void name<bf16>(const Params<bf16>&, int64_t, int64_t);
