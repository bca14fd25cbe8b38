// The two passes of a resize over one tile: input rows to lines, and lines to a line.
//
// A line holds 8-bit levels as [3, kTileColumns]. Both passes sum exact products in int32, so that every
// instruction set gives the same levels: resample_portable.h multiplies in 32 bits, resample_vnni.h cuts a
// weight into three signed bytes and applies four taps with one instruction per byte.
#pragma once

#include "resample_portable.h"

#if defined(__AVX512VBMI__)
#include "resample_vnni.h"
#endif

namespace kvkeye::KVKEYE_ISA {
#if defined(__AVX512VBMI__)
namespace passes = vnni;
#else
namespace passes = portable;
#endif
} // namespace kvkeye::KVKEYE_ISA
