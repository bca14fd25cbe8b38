// Checking proposed tokens on the GPU: every row of every tree is drawn at once, then each tree is walked.
#pragma once

#include "kvkeye/sampling_cuda.h"

namespace kvkeye {

constexpr int kCudaTreeRows = 64;

// Row 0 of a tree is the last token known; every other row a proposed token, after its parent.
template <class T> struct VerifyDraftCudaParams {
  SampleCudaParams<T> sample;  // logits and mask of R rows, settings of `trees` requests; tokens [R]
  const int64_t* draft_tokens; // [R]
  const int32_t* tree_parents; // [R], rows of the same tree; -1 for row 0
  const int32_t* cu_rows;      // [trees + 1]
  const float* draft_probs;    // [R, vocabulary] or null: what a row's children were drawn from
  int64_t* rows;   // [R], from whose logits a token was drawn; -1 behind the count, like the tokens
  int64_t* counts; // [trees]
  int64_t trees;
};

namespace cuda {
// As `sample`. Traps at bounds that do not cover the rows, at a tree of more than kCudaTreeRows rows, at a
// parent that is not an earlier row of the tree, and at a proposal outside the vocabulary.
template <class T> int verify_draft(const VerifyDraftCudaParams<T>& params, void* stream);
} // namespace cuda

} // namespace kvkeye
