// Drawing the next token. Items are rows.
#pragma once

#include "kvkeye/common/blocks.h"
#include "kvkeye/common/kernel.h"

namespace kvkeye {

// A token with its logit, later its probability (relative to the most likely token's).
struct Candidate {
  double value;
  int32_t id;
};

// How often a token of the history occurs in the output; id is -1 in a free place.
struct PastToken {
  int32_t id, count;
};

// Tokens proposed for a row, in order, each drawn from `probability` without those before it.
struct Drafts {
  const float* probability; // [vocabulary], or null: the draw does not look at the proposals
  const int64_t* tokens;    // [count]
  int count;
};

static constexpr int64_t kScanBlock = 64; // logits whose maximum is kept

// Working memory of one thread. `row` is touched only without top-k.
struct SampleWorkspace {
  uint32_t* words;       // [ceil(vocabulary / 32)], bits of the tokens that are read as they are
  float* peaks;          // [ceil(vocabulary / kScanBlock)]
  PastToken* past;       // [past_places(longest history)]
  Candidate* penalised;  // [longest history]
  Candidate* candidates; // [vocabulary]
  double* row;           // [2 (vocabulary + 64)]
};

// Places of the hash table for so many tokens: a power of two, half of them free.
constexpr int64_t past_places(int64_t tokens) {
  int64_t places = 2;
  while (places < 2 * tokens)
    places *= 2;
  return places;
}

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
  SampleWorkspace work;
};

KVKEYE_KERNEL(sample, SampleParams)

} // namespace kvkeye
