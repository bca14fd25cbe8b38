// Drawing the next token. Items are rows.
#pragma once

#include "kvkeye/common/kernel.h"

namespace kvkeye {

struct Candidate {
  double probability;
  int32_t id;
};

// Tokens proposed for a row, in order, each drawn from `probability` without those before it.
struct Drafts {
  const float* probability; // [vocabulary], or null: the draw does not look at the proposals
  const int64_t* tokens;    // [count]
  int count;
};

// Order: mask, penalties, temperature, top-k, top-p, min-p, inverse CDF in vocabulary order; fp64 throughout.
template <class T> struct SampleParams {
  const T* logits;                                  // [B, vocabulary], rows logits_stride apart
  const float *temperature, *top_p, *min_p;         // [B]
  const int32_t* top_k;                             // [B], 0 is off
  const float *repetition, *presence, *frequency;   // [B]
  const int32_t *history, *cu_history, *num_prompt; // [S], [B + 1], [B]
  const int64_t *seeds, *positions, *sample_index;  // [B]
  const int32_t* mask;                              // [B, ceil(vocabulary / 32)] bits, or null
  Drafts drafts;                                    // of the row; B is 1 then
  int64_t* tokens;                                  // [B]; -1 where nothing can be drawn
  int64_t vocabulary, logits_stride;
  // Working memory, one set per thread.
  double* row;           // [vocabulary]
  Candidate* candidates; // [vocabulary]
  int32_t* counts;       // [vocabulary], zero before and after a call
};

KVKEYE_KERNEL(sample, SampleParams)

} // namespace kvkeye
