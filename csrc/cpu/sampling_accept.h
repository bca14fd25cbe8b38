// Speculative sampling: the accepted proposal, or a draw from what the proposals leave over.
#pragma once

#include "kvkeye/common/philox.h"
#include "sampling_mass.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

KVKEYE_INLINE double kept_mass(const double* row, int64_t size) {
  double total = 0.0;
  for (int64_t i = 0; i < size; ++i)
    total += row[i] > 0.0 ? row[i] : 0.0;
  return total;
}

// Whether a token is among the first `count` proposals.
KVKEYE_INLINE bool was_proposed(const Drafts& drafts, int count, int64_t token) {
  bool found = false;
  for (int i = 0; i < count; ++i)
    found = found || drafts.tokens[i] == token;
  return found;
}

// The mass of all but the first `count` proposals.
KVKEYE_INLINE double draft_mass(const Drafts& drafts, int count, int64_t size) {
  double total = 0.0;
  for (int64_t i = 0; i < size; ++i)
    total += was_proposed(drafts, count, i) ? 0.0 : (double)drafts.probability[i];
  return total;
}

// Exact for any `probability`. Afterwards `row` holds the leftover.
int64_t accept(double* row, int64_t size, double min_p, const Drafts& drafts, int64_t seed, int64_t position,
               int64_t sample_index) {
  for (int64_t i = 0; i < size; ++i)
    row[i] = row[i] >= min_p && row[i] > 0.0 ? row[i] : kDropped;
  for (int sibling = 0; sibling < drafts.count; ++sibling) {
    const int64_t token = drafts.tokens[sibling];
    const double mass = kept_mass(row, size), draft = draft_mass(drafts, sibling, size);
    if (!(drafts.probability[token] > 0.0f && draft > 0.0) || was_proposed(drafts, sibling, token))
      continue; // not a draw from what was left
    const double u = philox_uniform(seed, position, accept_draw(sibling), sample_index);
    if (u * (drafts.probability[token] / draft) < row[token] / mass)
      return token;
    double left = 0.0;
    for (int64_t i = 0; i < size; ++i) {
      const double rest = row[i] / mass - drafts.probability[i] / draft;
      row[i] = rest > 0.0 ? rest : kDropped;
      left += rest > 0.0 ? rest : 0.0;
    }
    if (!(left > 0.0)) // only rounding kept it from being accepted
      return token;
  }
  return invert(row, size, 0.0, philox_uniform(seed, position, Draw::sample, sample_index));
}

} // namespace
} // namespace kvkeye::KVKEYE_ISA
