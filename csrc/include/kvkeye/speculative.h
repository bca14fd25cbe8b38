// Checking proposed tokens against the model. Items are trees.
#pragma once

#include "kvkeye/sampling.h"

namespace kvkeye {

static constexpr int64_t kTreeRows = 64;

// Row 0 of a tree is the last token known; every other row a proposed token, after its parent.
template <class T> struct VerifyDraftParams {
  const T* logits;             // [R, vocabulary], rows logits_stride apart
  const int64_t* draft_tokens; // [R]
  const int32_t* tree_parents; // [R], rows of the same tree; -1 for row 0
  const int32_t* cu_rows;      // [B + 1]
  const float* draft_probs;    // [R, vocabulary] or null: what a row's children were drawn from
  SampleParams<T> sample;      // settings per tree; mask per row; working memory
  int64_t *tokens, *rows;      // [R]; -1 behind the count
  int64_t* counts;             // [B]
  int64_t logits_stride;
  int32_t* history; // working memory: [longest history + kTreeRows], one per thread
};

KVKEYE_KERNEL(verify_draft, VerifyDraftParams)

} // namespace kvkeye
