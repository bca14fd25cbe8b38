// What the CPU's ops that draw tokens share: their settings' values, checked, and working memory.
#pragma once

#include "kvkeye/sampling.h"
#include "sampling_settings.h"

#include <algorithm>
#include <memory>

namespace kvkeye {

inline void check_history(const char* op, const Settings& settings, int64_t vocabulary) {
  const int32_t *ids = read<int32_t>(settings.history), *bounds = read<int32_t>(settings.cu_history),
                *prompt = read<int32_t>(settings.num_prompt);
  const int64_t rows = settings.num_prompt.size(0), length = settings.history.size(0);
  for (int64_t b = 0; b < rows; ++b) {
    require(0 <= bounds[b] && bounds[b] <= bounds[b + 1] && bounds[b + 1] <= length, op, ": cu_history[", b,
            "] = ", bounds[b], " and [", b + 1, "] = ", bounds[b + 1],
            "; expected ascending values from 0 to ", length, ".");
    require(prompt[b] >= 0, op, ": num_prompt[", b, "] = ", prompt[b], "; expected 0 or more.");
  }
  for (int64_t i = 0; i < length; ++i)
    require(0 <= ids[i] && ids[i] < vocabulary, op, ": history[", i, "] = ", ids[i],
            "; expected a token id from 0 to ", vocabulary - 1, ".");
}

inline int64_t longest_history(const Settings& settings) {
  const int32_t* bounds = read<int32_t>(settings.cu_history);
  int64_t longest = 0;
  for (int64_t b = 0; b + 1 < settings.cu_history.size(0); ++b)
    longest = std::max<int64_t>(longest, bounds[b + 1] - bounds[b]);
  return longest;
}

// Working memory of one thread.
struct Workspace {
  std::unique_ptr<uint32_t[]> words;
  std::unique_ptr<float[]> peaks;
  std::unique_ptr<PastToken[]> past;
  std::unique_ptr<Candidate[]> penalised, candidates;
  std::unique_ptr<double[]> row;

  Workspace(int64_t vocabulary, int64_t longest_history)
      : words(new uint32_t[(vocabulary + 31) / 32]), peaks(new float[blocks_of(vocabulary, kScanBlock)]),
        past(new PastToken[past_places(longest_history)]), penalised(new Candidate[longest_history]),
        candidates(new Candidate[vocabulary]), row(new double[2 * (vocabulary + 64)]) {}

  template <class T> void lend(SampleParams<T>& params) const {
    params.work = {words.get(), peaks.get(), past.get(), penalised.get(), candidates.get(), row.get()};
  }
};

} // namespace kvkeye
