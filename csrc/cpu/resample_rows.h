// The two passes of a resize over one tile: input rows to lines, and lines to a line.
//
// A line holds 8-bit levels as [3, kTileColumns]. Both passes sum exact products in int32, so that every
// instruction set gives the same levels: resample_portable.h multiplies in 32 bits, resample_avx2.h cuts the
// weights of the horizontal pass into two 16-bit parts, resample_vnni.h all weights into three signed bytes.
#pragma once

#include "resample_portable.h"

#if defined(__AVX512VBMI__)
#include "resample_vnni.h"
#elif defined(__AVX2__)
#include "resample_avx2.h"
#endif

namespace kvkeye::KVKEYE_ISA {
#if defined(__AVX512VBMI__)
namespace passes = vnni;
#elif defined(__AVX2__)
namespace passes = avx2_pairs;
#else
namespace passes = portable;
#endif
} // namespace kvkeye::KVKEYE_ISA
