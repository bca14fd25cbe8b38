// Speculative sampling: the accepted proposal, or a draw from what the proposals leave over.
//
// The leftover is not stored: a token's share of it follows from its probability, the draft's, and two masses
// of each rejection.
#pragma once

#include "kvkeye/speculative_cuda.h"

#include "sampling_draw.h"

namespace kvkeye::cuda {

// The proposals for one row, in order, each drawn from `probability` without those before it.
struct Offers {
  int count;
  int tokens[kCudaTreeRows];
  double share[kCudaTreeRows]; // of the draft; 0 for a token that an earlier proposal has
  double draft[kCudaTreeRows]; // mass of the draft without the earlier proposals
  // Of the rejected ones, in order: the masses before.
  double mass_before[kCudaTreeRows], draft_before[kCudaTreeRows];
  double weight; // of the proposal in question
};

// What a token weighs after the rejections.
template <class T> struct Leftover {
  const Weight<T>& weight;
  const Offers& offers;
  const float* probability;
  int rejections;

  __device__ double operator()(int i, double value) const {
    double left = weight(i, value);
    for (int n = 0; n < rejections && left > 0.0; ++n)
      left = left / offers.mass_before[n] - probability[i] / offers.draft_before[n];
    return left > 0.0 ? left : 0.0;
  }
};

__device__ inline bool is_first(const Offers& offers, int sibling) {
  for (int i = 0; i < sibling; ++i)
    if (offers.tokens[i] == offers.tokens[sibling])
      return false;
  return true;
}

__device__ inline bool was_offered(const Offers& offers, int token) {
  for (int i = 0; i < offers.count; ++i)
    if (offers.tokens[i] == token)
      return true;
  return false;
}

// The shares of all offers. Masses add up from what was not offered, so that nothing is left by rounding.
__device__ inline void weigh_offers(Offers& offers, BlockScratch& scratch, const float* probability,
                                    int vocabulary) {
  const int i = (int)threadIdx.x;
  if (i < offers.count)
    offers.share[i] = is_first(offers, i) ? probability[offers.tokens[i]] : 0.0;
  double others = 0.0;
  for (int token = i; token < vocabulary; token += kBlockThreads)
    others += was_offered(offers, token) ? 0.0 : probability[token];
  others = block_sum(scratch, others);
  if (i < offers.count) {
    for (int sibling = i; sibling < offers.count; ++sibling)
      others += offers.share[sibling];
    offers.draft[i] = others;
  }
  __syncthreads();
}

// The first sibling from `sibling` on that can have been drawn from what was left of the draft.
__device__ inline int next_offer(const Offers& offers, int sibling) {
  while (sibling < offers.count && !(offers.share[sibling] > 0.0 && offers.draft[sibling] > 0.0))
    ++sibling;
  return sibling;
}

// The mass of what is left. Leaves the weight of the offer in question, if there is one, in offers.weight.
template <class T>
__device__ double mass_left(const Row<T>& row, BlockScratch& scratch, Offers& offers, const Leftover<T>& left,
                            int sibling) {
  const int token = sibling < offers.count ? offers.tokens[sibling] : -1;
  double mass = 0.0;
  row.for_tokens([&](int i, double value) {
    const double weight = left(i, value);
    mass += weight;
    if (i == token)
      offers.weight = weight;
  });
  return block_sum(scratch, mass);
}

template <class T>
__device__ int64_t accept_or_draw(const Row<T>& row, CutMemory& memory, Offers& offers,
                                  const float* probability, const Weight<T>& weight, double u) {
  weigh_offers(offers, memory.scratch, probability, row.p.vocabulary);
  Leftover<T> left{weight, offers, probability, 0};
  int sibling = next_offer(offers, 0);
  double mass = mass_left(row, memory.scratch, offers, left, sibling);
  while (sibling < offers.count) {
    const int token = offers.tokens[sibling];
    const double draft = offers.draft[sibling];
    if (uniform(row, accept_draw(sibling)) * (offers.share[sibling] / draft) < offers.weight / mass)
      return token;
    if (threadIdx.x == 0) {
      offers.mass_before[left.rejections] = mass;
      offers.draft_before[left.rejections] = draft;
    }
    __syncthreads(); // the weight is read as well
    ++left.rejections;
    sibling = next_offer(offers, sibling + 1);
    mass = mass_left(row, memory.scratch, offers, left, sibling);
    if (!(mass > 0.0)) // only rounding kept it from being accepted
      return token;
  }
  return draw_from_row(row, memory, left, u);
}

// A draw at a row whose children were drawn from `probability`.
template <class T>
__device__ int64_t draw_after_offers(Row<T>& row, CutMemory& memory, Offers& offers,
                                     const float* probability) {
  const int64_t token = without_draw(row, memory.scratch);
  if (token != -2)
    return token;
  const Settings given = settings_of(row);
  Weight<T> weight{row, whole_row(), given.min_p};
  if (given.limited || given.shared) {
    const Goal goal = goal_of(given, total_of(row, memory, given));
    weight.cut = cut_of(row, memory, given, goal, find_first(row, memory, whole_row(), goal));
  }
  return accept_or_draw(row, memory, offers, probability, weight, given.u);
}

} // namespace kvkeye::cuda
