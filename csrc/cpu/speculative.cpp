// Checking proposed tokens against the model: down the tree for as long as the drawn token was proposed.
#include "kvkeye/speculative.h"

#include <cstring>

namespace kvkeye::KVKEYE_ISA {
namespace {

// One tree while it is walked.
template <class T> struct Walk {
  const VerifyDraftParams<T>& p;
  SampleParams<T> one; // the draw at one row
  int64_t tree, first, size;
  int64_t position, token, children[kTreeRows]; // of the draw
  int32_t bounds[2];
  int64_t child_rows[kTreeRows];

  Walk(const VerifyDraftParams<T>& params, int64_t b)
      : p(params), one(params.sample), tree(b), first(params.cu_rows[b]), size(params.cu_rows[b + 1] - first),
        position(params.sample.positions[b]) {
    const SampleParams<T>& all = p.sample;
    one.temperature = all.temperature + b;
    one.top_k = all.top_k + b;
    one.top_p = all.top_p + b;
    one.min_p = all.min_p + b;
    one.repetition = all.repetition + b;
    one.presence = all.presence + b;
    one.frequency = all.frequency + b;
    one.num_prompt = all.num_prompt + b;
    one.seeds = all.seeds + b;
    one.sample_index = all.sample_index + b;
    one.positions = &position;
    one.tokens = &token;
    one.history = p.history;
    one.cu_history = bounds;
    bounds[0] = 0;
    bounds[1] = all.cu_history[b + 1] - all.cu_history[b];
    std::memcpy(p.history, all.history + all.cu_history[b], (size_t)bounds[1] * sizeof(int32_t));
  }

  int find_children(int64_t row) {
    int count = 0;
    for (int64_t child = row + 1; child < size; ++child)
      if (p.tree_parents[first + child] == row) {
        child_rows[count] = child;
        children[count++] = p.draft_tokens[first + child];
      }
    return count;
  }

  // Draws the token after `row`; the row that proposed it, or -1.
  int64_t step(int64_t row) {
    const int64_t at = first + row, words = (one.vocabulary + 31) / 32;
    const int count = find_children(row);
    one.logits = p.logits + at * p.logits_stride;
    one.mask = p.sample.mask == nullptr ? nullptr : p.sample.mask + at * words;
    one.drafts = {nullptr, children, count};
    if (p.draft_probs != nullptr && count > 0)
      one.drafts.probability = p.draft_probs + at * one.vocabulary;
    sample(one, 0, 1);
    for (int i = 0; i < count; ++i)
      if (children[i] == token)
        return child_rows[i];
    return -1;
  }

  void run() {
    int64_t count = 0, row = size > 0 ? 0 : -1;
    while (row >= 0) {
      const int64_t next = step(row);
      p.tokens[first + count] = token;
      p.rows[first + count++] = first + row;
      p.history[bounds[1]++] = (int32_t)token;
      ++position;
      row = next;
    }
    p.counts[tree] = count;
    for (; count < size; ++count)
      p.tokens[first + count] = p.rows[first + count] = -1;
  }
};

} // namespace

template <class T> void verify_draft(const VerifyDraftParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b)
    Walk<T>(p, b).run();
}

KVKEYE_INSTANTIATE(verify_draft, VerifyDraftParams)

} // namespace kvkeye::KVKEYE_ISA
