#include "case.h"
#include "kvkeye/speculative_cuda.h"

using namespace kvkeye;

namespace {

template <class T> SampleCudaParams<T> draws(host_cuda::Case& c) {
  SampleCudaParams<T> p{};
  p.logits = c.buffer<T>("logits");
  p.temperature = c.buffer<float>("temperature");
  p.top_p = c.buffer<float>("top_p");
  p.min_p = c.buffer<float>("min_p");
  p.top_k = c.buffer<int32_t>("top_k");
  p.repetition = c.buffer<float>("repetition");
  p.presence = c.buffer<float>("presence");
  p.frequency = c.buffer<float>("frequency");
  p.history = c.buffer<int32_t>("history");
  p.cu_history = c.buffer<int32_t>("cu_history");
  p.num_prompt = c.buffer<int32_t>("num_prompt");
  p.seeds = c.buffer<int64_t>("seeds");
  p.positions = c.buffer<int64_t>("positions");
  p.sample_index = c.buffer<int64_t>("sample_index");
  p.mask = c.number("masked") != 0 ? c.buffer<int32_t>("mask") : nullptr;
  p.tokens = c.buffer<int64_t>("tokens");
  p.rows = c.number("rows");
  p.logits_stride = c.number("logits_stride");
  p.history_size = c.number("history_size");
  p.vocabulary = (int32_t)c.number("vocabulary");
  return p;
}

template <class T> int verify_draft(host_cuda::Case& c) {
  VerifyDraftCudaParams<T> p{};
  p.sample = draws<T>(c);
  p.draft_tokens = c.buffer<int64_t>("draft_tokens");
  p.tree_parents = c.buffer<int32_t>("tree_parents");
  p.cu_rows = c.buffer<int32_t>("cu_rows");
  p.draft_probs = c.number("probable") != 0 ? c.buffer<float>("draft_probs") : nullptr;
  p.rows = c.buffer<int64_t>("from_rows");
  p.counts = c.buffer<int64_t>("counts");
  p.trees = c.number("trees");
  return cuda::verify_draft(p, nullptr);
}

} // namespace

KVKEYE_CALL(sample) {
  return c.number("bf16") != 0 ? cuda::sample(draws<bf16>(c), nullptr)
                               : cuda::sample(draws<float>(c), nullptr);
}

KVKEYE_CALL(verify_draft) {
  return c.number("bf16") != 0 ? verify_draft<bf16>(c) : verify_draft<float>(c);
}
