// The settings of the ops that draw tokens, on any device: shapes and types are checked, no value is read.
#pragma once

#include "checks.h"

#include <optional>

namespace kvkeye {

// A per-row setting of the right shape and type, contiguous.
inline Tensor setting(const char* op, const char* name, const Tensor& tensor, int64_t rows,
                      ScalarType dtype) {
  const Argument argument{op, name, tensor};
  argument.has_shape({rows});
  argument.has_dtype(dtype);
  return dense(tensor);
}

inline Tensor allowed(const char* op, const Tensor& mask, int64_t rows, int64_t vocabulary) {
  const Argument argument{op, "mask", mask};
  argument.has_shape({rows, (vocabulary + 31) / 32});
  argument.has_dtype(ScalarType::Int);
  return dense(mask);
}

// The settings of B draws over `vocabulary` tokens, in the order of the ops' arguments.
struct Settings {
  Tensor temperature, top_k, top_p, min_p, repetition, presence, frequency, history, cu_history, num_prompt,
      seeds, positions, sample_index;

  Settings(const char* op, int64_t rows, const Tensor& temperature_, const Tensor& top_k_,
           const Tensor& top_p_, const Tensor& min_p_, const Tensor& repetition_, const Tensor& presence_,
           const Tensor& frequency_, const Tensor& history_, const Tensor& cu_history_,
           const Tensor& num_prompt_, const Tensor& seeds_, const Tensor& positions_,
           const Tensor& sample_index_)
      : temperature(setting(op, "temperature", temperature_, rows, ScalarType::Float)),
        top_k(setting(op, "top_k", top_k_, rows, ScalarType::Int)),
        top_p(setting(op, "top_p", top_p_, rows, ScalarType::Float)),
        min_p(setting(op, "min_p", min_p_, rows, ScalarType::Float)),
        repetition(setting(op, "repetition", repetition_, rows, ScalarType::Float)),
        presence(setting(op, "presence", presence_, rows, ScalarType::Float)),
        frequency(setting(op, "frequency", frequency_, rows, ScalarType::Float)),
        history(setting(op, "history", history_, history_.numel(), ScalarType::Int)),
        cu_history(setting(op, "cu_history", cu_history_, rows + 1, ScalarType::Int)),
        num_prompt(setting(op, "num_prompt", num_prompt_, rows, ScalarType::Int)),
        seeds(setting(op, "seeds", seeds_, rows, ScalarType::Long)),
        positions(setting(op, "positions", positions_, rows, ScalarType::Long)),
        sample_index(setting(op, "sample_index", sample_index_, rows, ScalarType::Long)) {}

  template <class Params> void fill(Params& params) const {
    params.temperature = read<float>(temperature);
    params.top_p = read<float>(top_p);
    params.min_p = read<float>(min_p);
    params.top_k = read<int32_t>(top_k);
    params.repetition = read<float>(repetition);
    params.presence = read<float>(presence);
    params.frequency = read<float>(frequency);
    params.history = read<int32_t>(history);
    params.cu_history = read<int32_t>(cu_history);
    params.num_prompt = read<int32_t>(num_prompt);
    params.seeds = read<int64_t>(seeds);
    params.positions = read<int64_t>(positions);
    params.sample_index = read<int64_t>(sample_index);
  }
};

} // namespace kvkeye
