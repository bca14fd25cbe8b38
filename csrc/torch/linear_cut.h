// What the bindings of linear layers share: how work is cut for the threads.
#pragma once

#include "checks.h"
#include "kvkeye/linear.h"

#include <algorithm>

namespace kvkeye {

// The cut that gives every thread the same share; of equal ones the one with most bands, since a thread then
// reads its part of the weights alone.
inline void choose_cut(LinearCut& cut) {
  const int64_t threads = torch::stable::get_num_threads();
  const auto share = [](int64_t size, int64_t parts) {
    return (double)size / (double)(parts * blocks_of(size, parts));
  };
  const int64_t units = blocks_of(cut.rows, LinearCut::kRowUnit);
  cut.bands = 1;
  cut.row_blocks = blocks_of(cut.rows, LinearCut::kRowBlock);
  double best = 0;
  for (int64_t bands = threads; bands > 0; --bands) {
    const int64_t beside = threads / bands; // threads that share a band
    const double even = share(cut.blocks(), bands) * share(units, beside);
    if (threads % bands == 0 && even > best) {
      best = even;
      cut.bands = bands;
      cut.row_blocks = blocks_of(blocks_of(cut.rows, LinearCut::kRowBlock), beside) * beside;
    }
  }
  cut.groups = blocks_of(blocks_of(cut.blocks(), cut.bands), LinearCut::kGroupPanels / cut.parts());
}

inline int64_t cost_of_item(const LinearCut& cut) {
  return cut.rows * cut.parts() * cut.outputs * (cut.inputs + 1) / std::max<int64_t>(cut.items(), 1);
}

} // namespace kvkeye
