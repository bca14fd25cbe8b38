// Which instruction set the CPU kernels run on. Decided once, at the first question.
#pragma once

namespace kvkeye {

// amx is avx512 and tiles: kernels that have no use for tiles run their avx512 build.
enum class Isa { generic, avx2, avx512, amx };

struct IsaChoice {
  Isa isa;
  const char* name;  // "generic", "avx2", "avx512" or "amx"
  const char* error; // null, or why no choice could be made (a bad or unsupported KVKEYE_CPU_ISA)
};

// The widest instruction set that the CPU and the operating system support, or the one KVKEYE_CPU_ISA names.
const IsaChoice& active_isa();

// Whether one vdpbf16ps takes less time than the two fp32 multiply-adds that it stands for.
bool fast_bf16_pairs();

} // namespace kvkeye
